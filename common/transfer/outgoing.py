"""What a prefill's end of the transfer knows of the state it ships, as values."""

from collections import deque
from dataclasses import dataclass, field

from scission.common.cache.storage import Mark
from scission.common.transfer.connection import Connection
from scission.common.transfer.events import StateSource, TransferHandle
from scission.common.transfer.plan import ChunkRows, Piece
from scission.protos import transfer_pb2


@dataclass(frozen=True, slots=True)
class Finish:
    sequences: list[transfer_pb2.Sequence]
    first_token_at: float
    at: float


@dataclass(slots=True)
class Shipped:
    """A chunk that went out, as it would go out again."""

    chunk: ChunkRows
    slot: int
    hash: int = 0
    is_done: bool = False  # injected, said the receiver


@dataclass(slots=True, eq=False)
class Outgoing:
    """One transfer, on the I/O thread."""

    handle: TransferHandle
    connection: Connection
    source: StateSource
    num_tokens: int
    num_sequences: int
    deadline: float
    reserved_at: float
    asked_at: float = 0.0  # RESERVE last sent; 0: not yet
    is_answered: bool = False  # by WAIT or GRANT
    granted_at: float | None = None
    computing: deque[tuple[Mark | None, Piece | Finish]] = field(default_factory=deque)
    pieces: list[Piece] = field(default_factory=list)
    chunks: deque[ChunkRows] = field(default_factory=deque)
    credits: list[int] = field(default_factory=list)
    shipped: list[Shipped] = field(default_factory=list)  # by sequence number
    in_slot: dict[int, int] = field(
        default_factory=dict
    )  # slot -> sequence number it was last filled with
    reship: deque[int] = field(default_factory=deque)
    num_undone: int = 0  # chunks shipped and not known to be injected
    num_bytes: int = 0
    finish: Finish | None = None
    is_final_planned: bool = False
    manifest: transfer_pb2.Manifest | None = None  # set: sent
    progress_at: float = 0.0
    queried_at: float = 0.0
