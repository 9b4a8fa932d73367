"""A model's state, declared once: which rows exist per token, per window and per request.

The declaration drives allocation, the memory budget, block tables, shipping, prefix snapshots, the
digest, metrics and tests. It knows no tensors: `storage` holds them.
"""

import enum
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "uint8": 1}


class Kind(enum.StrEnum):
    PAGED = "paged"  # one row per `tokens_per_row` tokens, addressed by block table
    RING = "ring"  # one row per token, the last `ring_size` of them, at `position % ring_size`
    TAIL = "tail"  # one row per request


@dataclass(frozen=True, slots=True)
class Component:
    """One kind of row, held by some of the layers.

    A ring's live rows after n tokens are the positions from `first_live(n)` to n - 1: n rounded
    down to `live_align`, less `live_lookback`. Whatever else the ring holds is never read.
    """

    name: str
    kind: Kind
    layers: tuple[int, ...]  # the model's layer numbers, ascending
    row_shape: tuple[int, ...]
    dtype: str  # a key of DTYPE_BYTES
    tokens_per_row: int = 1  # paged
    ring_size: int = 0  # ring: rows per request
    live_align: int = 1  # ring
    live_lookback: int = 0  # ring
    initial: float = 0.0  # what a clean slot holds (score rings: -inf)

    def __post_init__(self) -> None:
        assert self.layers == tuple(sorted(set(self.layers))), self.layers
        assert self.dtype in DTYPE_BYTES, self.dtype
        assert (self.kind is Kind.RING) == (self.ring_size > 0), self.name

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * DTYPE_BYTES[self.dtype]

    def first_live(self, num_tokens: int) -> int:
        """The first position whose ring row is still read after `num_tokens` tokens."""
        assert self.kind is Kind.RING
        return max(0, num_tokens // self.live_align * self.live_align - self.live_lookback)

    def rows_between(self, start: int, end: int) -> tuple[int, int]:
        """Rows [first, last) that become final while the tokens [start, end) are computed.

        Paged: entry numbers (a row is final once its last token is in). Ring: positions. Tail: the
        one row.
        """
        match self.kind:
            case Kind.PAGED:
                return start // self.tokens_per_row, end // self.tokens_per_row
            case Kind.RING:
                return start, end
            case Kind.TAIL:
                return 0, 1

    def shipped_rows(self, num_tokens: int) -> tuple[int, int]:
        """Rows [first, last) of this component that a request of `num_tokens` tokens hands over."""
        if self.kind is Kind.RING:
            return self.first_live(num_tokens), num_tokens
        return self.rows_between(0, num_tokens)


@dataclass(frozen=True)
class CacheLayout:
    """All components of a model. Component numbers (on the wire) are positions in `components`."""

    components: tuple[Component, ...]
    block_size: int  # tokens; a multiple of every tokens_per_row

    def __post_init__(self) -> None:
        names = [component.name for component in self.components]
        assert len(set(names)) == len(names), names
        for component in self.components:
            assert self.block_size % component.tokens_per_row == 0, component

    @cached_property
    def paged(self) -> tuple[Component, ...]:
        return tuple(c for c in self.components if c.kind is Kind.PAGED)

    @cached_property
    def per_slot(self) -> tuple[Component, ...]:
        """Rings and tails: what lives in a request's state slot."""
        return tuple(c for c in self.components if c.kind is not Kind.PAGED)

    def component(self, name: str) -> Component:
        return next(c for c in self.components if c.name == name)

    def rows_per_block(self, component: Component) -> int:
        return self.block_size // component.tokens_per_row

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    @property
    def block_bytes(self) -> int:
        """One block of tokens, all layers and paged components."""
        return sum(self.rows_per_block(c) * c.row_bytes * len(c.layers) for c in self.paged)

    @property
    def slot_bytes(self) -> int:
        """One request's rings and tails."""
        return sum(max(c.ring_size, 1) * c.row_bytes * len(c.layers) for c in self.per_slot)

    def shipped_bytes(self, num_tokens: int) -> int:
        """Payload bytes of one request's hand-off, headers not counted."""
        total = 0
        for component in self.components:
            first, last = component.shipped_rows(num_tokens)
            total += (last - first) * component.row_bytes * len(component.layers)
        return total

    def describe(self) -> str:
        """Canonical text of the declaration, for the digest."""
        return json.dumps(
            {"block_size": self.block_size, "components": [asdict(c) for c in self.components]},
            sort_keys=True,
        )


def digest_fields(fields: Mapping[str, object]) -> dict[str, str]:
    """The layout digest: one short hash per named field, so that a mismatch can name its field."""
    return {name: _short_hash(value) for name, value in sorted(fields.items())}


def first_mismatch(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """The first field (by name) on which two digests differ, or None when they are equal."""
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            return name
    return None


def _short_hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
