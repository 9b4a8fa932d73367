"""What a decode's end of the transfer knows of its peers and of their transfers, as values."""

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from scission.common.transfer.events import TransferHandle
from scission.common.transfer.plan import ChunkRows, Coverage
from scission.common.transfer.wire import Header
from scission.protos import transfer_pb2

MAX_ENDED = 1024  # transfers a session remembers after their end


@dataclass(slots=True, eq=False)
class Session:
    """One connection of one prefill."""

    number: int
    identity: bytes
    worker_id: str
    epoch: int
    tier: transfer_pb2.Tier | None  # None until the proof came
    lease: Path | None = None
    last_heard: float = 0.0
    is_lost: bool = False  # the connection is gone; the process perhaps not
    transfers: dict[int, "Incoming"] = field(default_factory=dict)
    ended: OrderedDict[int, None] = field(default_factory=OrderedDict)
    aborting: dict[int, "Incoming"] = field(
        default_factory=dict
    )  # slots in quarantine until ABORT_ACK
    outbox: deque[list[bytes]] = field(default_factory=deque)

    def remember(self, transfer_id: int) -> None:
        """This transfer has ended: what still comes of it is late."""
        self.ended[transfer_id] = None
        if len(self.ended) > MAX_ENDED:
            self.ended.popitem(last=False)


@dataclass(slots=True, eq=False)
class Incoming:
    """One transfer, on the I/O thread; also the owner of its slots."""

    handle: TransferHandle
    session: Session
    num_tokens: int
    deadline: float
    opened_at: float
    wait: int | None = None  # place in the engine's queue, once it said so
    coverage: Coverage | None = None  # set: granted
    granted_at: float = 0.0
    arrived: set[int] = field(default_factory=set)  # sequence numbers that wait for injection
    injected: dict[int, int] = field(default_factory=dict)  # sequence number -> hash
    credit: list[int] = field(default_factory=list)  # slots to announce
    credit_injected: list[int] = field(default_factory=list)  # sequence numbers to announce
    num_reships: Counter[int] = field(default_factory=Counter)
    manifest: transfer_pb2.Manifest | None = None
    manifest_at: float = 0.0
    inject_s: float = 0.0  # that checking and writing its chunks took
    is_ready: bool = False
    is_committed: bool = False
    is_acknowledged: bool = False
    progress_at: float = 0.0
    told_at: float = 0.0  # last COMMIT, ABORT or RESHIP for missing chunks
    end_reason: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """An arrived chunk on its way into its rows."""

    incoming: Incoming
    packed: bytes  # the header as it came
    header: Header
    rows: ChunkRows
    frame: zmq.Frame | None  # None: the rows lie in the arena slot


@dataclass(frozen=True, slots=True)
class Injected:
    """What became of a chunk."""

    chunk: Chunk
    is_sound: bool  # and written; else it must come again
    seconds: float
