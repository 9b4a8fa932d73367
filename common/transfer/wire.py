"""Messages as bytes: a fixed header and a body, one multipart message each. Nothing else is on the
wire.

Header, 64 bytes, little endian:

    offset  size  field
    0       4     magic "SCIS"
    4       1     version of the protocol
    5       1     kind
    6       2     component: position in the layout (CHUNK)
    8       8     transfer id, the sender's; 0 where a message is about the connection
    16      8     epoch of the destination
    24      2+2   first and last (exclusive) of the component's own layers (CHUNK)
    28      4     sequence number (CHUNK)
    32      4+4   first and last (exclusive) row: entries, positions or 0..1 (CHUNK)
    40      4     arena slot (CHUNK)
    44      4     reserved, 0
    48      8     length of the body in bytes (shared tier: of the rows in the slot)
    56      8     xxh3-64 of the header with this field zero, followed by the body

The body is a protobuf message of the kind, or for CHUNK raw rows in canonical order (layer, then
row). In the shared tier the rows lie in the arena slots, and a message is one frame of one or more
CHUNK headers laid end to end.
"""

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash
from google.protobuf.message import DecodeError, Message

from scission.common.errors import WireError
from scission.protos import transfer_pb2

MAGIC = b"SCIS"
VERSION = 1
HEADER = struct.Struct("<4sBBHQQHHIIIIIQQ")
HASH_AT = HEADER.size - 8
MAX_CONTROL_BYTES = (
    8 << 20
)  # the largest body is a MANIFEST: 8 bytes a chunk, and the first tokens' logprobs
_NO_HASH = bytes(8)
_HASH = struct.Struct("<Q")


class Kind(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    ARENA_PROOF = 4
    TIER_DECISION = 5
    RESERVE = 6
    GRANT = 7
    WAIT = 8
    CHUNK = 9
    CREDIT = 10
    MANIFEST = 11
    COMMIT = 12
    COMMIT_ACK = 13
    RESHIP = 14
    ABORT = 15
    ABORT_ACK = 16
    PING = 17  # of a transfer: what do you have of it? (the answer is CREDIT)
    PONG = 18


# kind -> the message in its body; those left out have none
BODIES: dict[Kind, type[Message]] = {
    Kind.HELLO: transfer_pb2.Hello,
    Kind.WELCOME: transfer_pb2.Welcome,
    Kind.REFUSE: transfer_pb2.Refuse,
    Kind.ARENA_PROOF: transfer_pb2.ArenaProof,
    Kind.TIER_DECISION: transfer_pb2.TierDecision,
    Kind.RESERVE: transfer_pb2.Reserve,
    Kind.GRANT: transfer_pb2.Grant,
    Kind.WAIT: transfer_pb2.Wait,
    Kind.CREDIT: transfer_pb2.Credit,
    Kind.MANIFEST: transfer_pb2.Manifest,
    Kind.RESHIP: transfer_pb2.Reship,
    Kind.ABORT: transfer_pb2.Abort,
}
_KINDS = {kind.value: kind for kind in Kind}

Frame = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Header:
    kind: Kind
    transfer_id: int
    epoch: int
    component: int = 0
    layers: tuple[int, int] = (0, 0)
    rows: tuple[int, int] = (0, 0)
    sequence: int = 0
    slot: int = 0
    length: int = 0
    hash: int = 0

    def pack(self) -> bytes:
        return HEADER.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.component,
            self.transfer_id,
            self.epoch,
            *self.layers,
            self.sequence,
            *self.rows,
            self.slot,
            0,
            self.length,
            self.hash,
        )

    @classmethod
    def unpack(cls, data: Frame) -> "Header":
        """Raises WireError for anything but 64 bytes of this protocol's version and a known
        kind.
        """
        if len(data) != HEADER.size:
            raise WireError(f"a header has {HEADER.size} bytes, got {len(data)}")
        (
            magic,
            version,
            kind,
            component,
            transfer_id,
            epoch,
            first_layer,
            last_layer,
            sequence,
            first_row,
            last_row,
            slot,
            reserved,
            length,
            digest,
        ) = HEADER.unpack(data)
        if magic != MAGIC or version != VERSION or reserved:
            raise WireError(f"not a message of protocol version {VERSION}")
        known = _KINDS.get(kind)
        if known is None:
            raise WireError(f"unknown message kind {kind}")
        return cls(
            known,
            transfer_id,
            epoch,
            component,
            (first_layer, last_layer),
            (first_row, last_row),
            sequence,
            slot,
            length,
            digest,
        )


def start_hash(packed: Frame) -> xxhash.xxh3_64:
    """A running hash that has taken in a packed header as if its hash field were zero."""
    hasher = xxhash.xxh3_64(packed[:HASH_AT])
    hasher.update(_NO_HASH)
    return hasher


def hash_message(packed: Frame, body: Frame) -> int:
    """What the hash field of a packed header should be."""
    hasher = start_hash(packed)
    hasher.update(body)
    return hasher.intdigest()


def seal(packed: bytes, digest: int) -> bytes:
    """A packed header with its hash filled in."""
    return packed[:HASH_AT] + _HASH.pack(digest)


def pack_control(
    kind: Kind, transfer_id: int, epoch: int, body: Message | None = None
) -> list[bytes]:
    """A control message as its two frames."""
    expected = BODIES.get(kind)
    assert (type(body) if body is not None else None) is expected, (kind, body)
    payload = body.SerializeToString() if body is not None else b""
    header = Header(kind, transfer_id, epoch, length=len(payload))
    packed = header.pack()
    return [seal(packed, hash_message(packed, payload)), payload]


def unpack_control(frames: Sequence[Frame]) -> tuple[Header, Message | None]:
    """The inverse of `pack_control`; raises WireError for whatever it did not make."""
    if len(frames) != 2:
        raise WireError(f"a control message has 2 frames, got {len(frames)}")
    header = Header.unpack(frames[0])
    payload = frames[1]
    if header.kind is Kind.CHUNK:
        raise WireError("a CHUNK came over the control socket")
    if header.length != len(payload):
        raise WireError(f"{header.kind.name}: {len(payload)} bytes of {header.length}")
    if header.hash != hash_message(frames[0], payload):
        raise WireError(f"{header.kind.name}: damaged")
    body_type = BODIES.get(header.kind)
    if body_type is None:
        if len(payload):
            raise WireError(f"{header.kind.name} has no body, got {len(payload)} bytes")
        return header, None
    try:
        return header, body_type.FromString(bytes(payload))
    except DecodeError as error:
        raise WireError(f"{header.kind.name}: {error}") from error
