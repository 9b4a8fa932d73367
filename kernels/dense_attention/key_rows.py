"""Where the keys of a ragged batch lie in a pool of rows."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class KeyRows:
    """Where the keys of every sequence of a ragged batch lie, in order of position.

    Column j of a sequence is position first + j. Columns that are no key of the sequence name a row
    with finite content all the same, so that whatever is gathered can be taken out by a mask.
    `spans` are the host's: the first query row, the queries and the keys of each sequence.
    """

    rows: Tensor  # [num_seqs, max_keys] int64, into the pool
    firsts: Tensor  # [num_seqs] int64
    positions: Tensor  # [num_tokens] int64, of the queries; -1 is padding
    spans: tuple[tuple[int, int, int], ...]
