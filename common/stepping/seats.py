"""Which row of the running batch each sequence has; rows are few and close together."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from scission.common.stepping.sequences import S


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """The numbers of rows that batches are padded to, ascending; the last is `max_rows`."""
    sizes = [1, 2, 4]
    for last, step in ((16, 4), (64, 8), (128, 16), (max_rows, 32)):
        sizes += range(sizes[-1] + step, last + 1, step)
    return (*(size for size in sizes if size < max_rows), max_rows)


@dataclass(frozen=True, slots=True)
class Seating(Generic[S]):
    """What an arrangement changed: rows that are padding now, who came, who moved from where."""

    emptied: list[int]
    joined: set[S]
    moved: dict[S, int]  # the row that was left


class Seats(Generic[S]):
    """Rows stay as they are while a sequence runs, unless fewer rows would do for all."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes`: how many rows a batch may have, ascending."""
        self.sizes = sizes
        self._free = list(range(sizes[-1]))  # ascending
        self.rows: dict[S, int] = {}

    @property
    def size(self) -> int:
        """The rows of a batch that holds everybody."""
        return self._size_for(max(self.rows.values(), default=0) + 1)

    def arrange(self, sequences: Sequence[S]) -> Seating[S]:
        """Seat exactly these. Nobody gets a row in the same call that somebody moved away from."""
        wanted = dict.fromkeys(sequences)
        emptied = [row for sequence, row in self.rows.items() if sequence not in wanted]
        if emptied:
            self.rows = {s: row for s, row in self.rows.items() if s in wanted}
            self._free = sorted(self._free + emptied)
        joined = set()
        for sequence in wanted:
            if sequence not in self.rows:
                self.rows[sequence] = self._free.pop(0)
                joined.add(sequence)
        moved: dict[S, int] = {}
        size = self._size_for(max(len(wanted), 1))
        if self.rows and max(self.rows.values()) >= size:
            for sequence, row in list(self.rows.items()):
                if row >= size:
                    self.rows[sequence] = self._free.pop(0)
                    moved[sequence] = row
            emptied += moved.values()
            self._free = sorted([*self._free, *moved.values()])
        taken = set(self.rows.values()) if emptied else set()
        return Seating([row for row in emptied if row not in taken], joined, moved)

    def _size_for(self, count: int) -> int:
        return self.sizes[bisect_left(self.sizes, count)]
