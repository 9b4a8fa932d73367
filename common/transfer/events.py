"""What the transfer endpoints tell their engine threads, as values.

A sender's transfer ends with exactly one of Committed, Refused, Failed (none of them after the
engine's own abort), and then Closed. A receiver's ends with one of Aborted and Failed (the engine
frees what it had granted), or with the engine's own commit, refuse or abort.
"""

from dataclasses import dataclass

from scission.protos import transfer_pb2

# Why a transfer was refused, aborted or failed: few and fixed, as they become metrics' labels.
REASONS = frozenset(
    {
        "cancelled",
        "corrupt",
        "deadline",
        "draining",
        "finished",
        "full",
        "incomplete",
        "internal",
        "layout_mismatch",
        "old_epoch",
        "peer_lost",
        "preempted",
        "protocol",
        "protocol_version",
        "stalled",
        "superseded",
        "too_large",
        "unknown_request",
        "unreachable",
    }
)


def known_reason(reason: str) -> str:
    """A peer's reason, or "other" for one that is not of ours."""
    return reason if reason in REASONS else "other"


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a decode takes state in, as its registration told the gateway."""

    worker_id: str
    epoch: int
    address: str


@dataclass(frozen=True, slots=True)
class StateSource:
    """Where the sender's rows lie; they stay as they are until Closed."""

    block_ids: list[int]
    slot: int


@dataclass(frozen=True, slots=True)
class TransferHandle:
    """Names one transfer at one endpoint: new for every (request, attempt, destination)."""

    transfer_id: int
    request_id: str
    attempt: int
    peer: str  # the other end's worker id
    connection: int = 0  # receiver: which of the peer's connections


@dataclass(frozen=True, slots=True)
class Granted:
    handle: TransferHandle
    wait_s: float  # from reserve() to the grant


@dataclass(frozen=True, slots=True)
class Waiting:
    handle: TransferHandle
    position: int  # in the decode's queue of reservations


@dataclass(frozen=True, slots=True)
class Refused:
    """The decode will not take this transfer; `field` is the part of the layout digest that
    differs.
    """

    handle: TransferHandle
    reason: str  # of REASONS, or "other"
    field: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Committed:
    """The decode has the state, checked, and owns the request from here on."""

    handle: TransferHandle
    seconds: float  # from the grant to the commit
    exposed_s: float  # from finish() to the commit: what no computation hid
    num_bytes: int
    tier: str = ""  # shared, tcp, inproc


@dataclass(frozen=True, slots=True)
class Closed:
    """The transfer's source is not read any more: its blocks and slot may be freed."""

    handle: TransferHandle


@dataclass(frozen=True, slots=True)
class Failed:
    """The transfer is over, for a reason of our own (unreachable, peer_lost, stalled, deadline,
    corrupt, incomplete, protocol, internal) or the peer's.
    """

    handle: TransferHandle
    reason: str


@dataclass(frozen=True, slots=True)
class ReserveRequested:
    """A prefill wants room; the engine answers with grant(), wait() or refuse()."""

    handle: TransferHandle
    num_tokens: int
    num_sequences: int
    deadline: float  # time.monotonic()


@dataclass(frozen=True, slots=True)
class Ready:
    """Every live row lies in the granted blocks and slot, every hash is right: commit() may
    follow.
    """

    handle: TransferHandle
    manifest: transfer_pb2.Manifest
    num_bytes: int
    seconds: float  # from the grant to here
    exposed_s: float = 0.0  # of those, after the first token was sampled
    inject_s: float = 0.0  # of those, spent checking and scattering chunks
    tier: str = ""  # shared, tcp, inproc


@dataclass(frozen=True, slots=True)
class Aborted:
    """The prefill withdrew. After commit() this means that the commit came too late: drop the
    request.
    """

    handle: TransferHandle
    reason: str  # of REASONS, or "other"


SenderEvent = Granted | Waiting | Refused | Committed | Failed | Closed
ReceiverEvent = ReserveRequested | Ready | Aborted | Failed
