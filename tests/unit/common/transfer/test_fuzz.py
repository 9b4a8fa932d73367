"""No byte sequence may crash, hang or corrupt an endpoint."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zmq
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scission.common.errors import WireError
from scission.common.transfer.events import (
    Closed,
    Committed,
    Destination,
    ReserveRequested,
    StateSource,
)
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.plan import ChunkRows, Coverage, Piece, add_piece, piece_chunks
from scission.common.transfer.sender import Sender
from scission.common.transfer.wire import (
    BODIES,
    HEADER,
    VERSION,
    Header,
    Kind,
    hash_message,
    pack_control,
    seal,
    unpack_control,
)
from scission.protos import transfer_pb2
from tests.unit.common.transfer.endpoints import (
    DIGEST,
    LAYOUT,
    SLOT_BYTES,
    Pair,
    Room,
    fill_poison,
    make_pair,
)

torch.set_num_threads(1)

OPTIONS = TransferOptions(
    slot_bytes=SLOT_BYTES, arena_bytes=8 * SLOT_BYTES, stall_s=0.1, decide_s=0.6, max_reships=1
)
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

small = st.integers(0, 50)
u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
headers = st.builds(
    Header,
    kind=st.sampled_from(list(Kind)),
    transfer_id=u64,
    epoch=u64,
    component=u16,
    layers=st.tuples(u16, u16),
    rows=st.tuples(u32, u32),
    sequence=u32,
    slot=u32,
    length=u64,
    hash=u64,
)
chunk_headers = st.builds(
    Header,
    kind=st.just(Kind.CHUNK),
    transfer_id=st.integers(0, 3),
    epoch=st.just(0),  # filled in with the receiver's
    component=st.integers(0, 6),
    layers=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    rows=st.tuples(st.one_of(small, u32), st.one_of(small, u32)),
    sequence=st.one_of(small, u32),
    slot=st.one_of(st.integers(0, 9), u32),
    length=st.one_of(st.integers(0, 2 * SLOT_BYTES), u64),
)


def bodies(kind: Kind) -> st.SearchStrategy[Message]:
    numbers = st.lists(st.one_of(small, u32), max_size=5)
    match kind:
        case Kind.GRANT:
            return st.builds(transfer_pb2.Grant, slots=numbers)
        case Kind.CREDIT:
            return st.builds(transfer_pb2.Credit, slots=numbers, injected=numbers)
        case Kind.RESHIP:
            return st.builds(transfer_pb2.Reship, sequence_numbers=numbers)
        case Kind.WELCOME:
            return st.builds(
                transfer_pb2.Welcome,
                slot_bytes=st.one_of(st.sampled_from([0, 1, SLOT_BYTES]), u32),
                num_slots=u32,
                arena_name=st.sampled_from(["", "scission-x.arena", "../../etc/passwd"]),
                lease_name=st.sampled_from(["", "scission-x.lease", "/tmp/lease"]),
                ipc_name=st.sampled_from(["", "scission-x.ipc"]),
                bulk_addresses=st.lists(
                    st.sampled_from(["tcp://127.0.0.1:9", "nonsense", "tcp://:"]), max_size=3
                ),
            )
        case Kind.RESERVE:
            return st.builds(
                transfer_pb2.Reserve,
                request_id=st.text(max_size=5),
                attempt=small,
                remaining_ms=st.integers(0, 500),
                num_tokens=st.one_of(small, u32),
                num_sequences=small,
            )
        case Kind.MANIFEST:
            return st.builds(
                transfer_pb2.Manifest,
                num_chunks=st.one_of(small, u32),
                num_bytes=st.one_of(small, u64),
                chunk_hashes=st.lists(u64, max_size=5),
                num_tokens=st.one_of(small, u32),
                first_token_age_s=st.floats(),
            )
        case _:
            return st.builds(BODIES[kind])


@st.composite
def control_messages(draw: st.DrawFn, kinds: Sequence[Kind], epoch: int) -> list[bytes]:
    """Mostly well-formed messages in a senseless order; some of them damaged."""
    kind = draw(st.sampled_from(kinds))
    body = draw(bodies(kind)) if kind in BODIES else None
    frames = pack_control(kind, draw(st.integers(0, 3)), epoch, body)
    if draw(st.integers(0, 4)) == 0:
        which = draw(st.integers(0, 1))
        data = bytearray(frames[which] + b"\0")
        data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
        frames[which] = bytes(data[: draw(st.integers(0, len(data)))])
    return frames


@given(data=st.binary(max_size=200))
@FUZZ
def test_bytes_are_a_message_or_a_wire_error(data: bytes) -> None:
    for frames in ([data], [data, b""], [data[:64], data[64:]], [data, data, data]):
        try:
            unpack_control(frames)
        except WireError:
            continue


@given(header=headers)
@FUZZ
def test_header_survives_the_wire(header: Header) -> None:
    assert len(header.pack()) == HEADER.size
    assert Header.unpack(header.pack()) == header


@given(header=headers, at=st.integers(0, 55), bit=st.integers(0, 7), rows=st.binary(max_size=64))
@FUZZ
def test_hash_covers_every_header_byte(header: Header, at: int, bit: int, rows: bytes) -> None:
    damaged = bytearray(header.pack())
    damaged[at] ^= 1 << bit
    try:
        changed = Header.unpack(bytes(damaged))
    except WireError:
        return
    assert hash_message(changed.pack(), rows) != hash_message(header.pack(), rows)


@given(
    num_tokens=st.integers(1, 60),
    cut=st.integers(0, 60),
    layer=st.integers(0, 4),
    max_bytes=st.integers(64, 3000),
)
@FUZZ
def test_chunks_of_all_pieces_cover_every_row_once(
    num_tokens: int, cut: int, layer: int, max_bytes: int
) -> None:
    coverage = Coverage(LAYOUT, num_tokens)
    cut = min(cut, num_tokens)
    pieces: list[Piece] = []
    for layers in ((0, layer), (layer, 4)):
        for tokens in ((cut, num_tokens), (0, cut)):
            add_piece(pieces, Piece(layers, tokens))
    for piece in pieces:
        for chunk in piece_chunks(LAYOUT, piece, max_bytes):
            assert chunk.num_bytes <= max_bytes
            coverage.claim(chunk)
    paged = sum((c.shipped_rows(num_tokens)[1]) * c.row_bytes * len(c.layers) for c in LAYOUT.paged)
    assert coverage.claimed_bytes == paged


@given(header=chunk_headers, num_tokens=st.integers(1, 60))
@FUZZ
def test_claimed_rows_always_lie_within_the_request(header: Header, num_tokens: int) -> None:
    coverage = Coverage(LAYOUT, num_tokens)
    chunk = ChunkRows(header.component, header.layers, header.rows, header.length)
    try:
        coverage.claim(chunk)
    except WireError:
        assert coverage.claimed_bytes == 0
        return
    component = LAYOUT.components[header.component]
    first, last = component.shipped_rows(num_tokens)
    assert first <= header.rows[0] < header.rows[1] <= last
    assert header.layers[1] <= len(component.layers)
    with pytest.raises(WireError):
        coverage.claim(chunk)
    coverage.release(chunk)
    assert coverage.claimed_bytes == 0


class Hostile:
    """A peer that speaks the handshake and then sends whatever it is told."""

    def __init__(self, pair: Pair, name: str) -> None:
        self.epoch = pair.receiver_epoch
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        identity = b"hostile-" + name.encode()
        self.control = self._connect(pair.receiver.address, identity)
        hello = transfer_pb2.Hello(
            epoch=5, worker_id=name, layout_digest=DIGEST, protocol_version=VERSION
        )
        self.control.send_multipart(pack_control(Kind.HELLO, 0, self.epoch, hello))
        _, welcome = unpack_control(self.answer(Kind.WELCOME))
        assert isinstance(welcome, transfer_pb2.Welcome)
        self.bulk = self._connect(welcome.bulk_addresses[0], identity + b"\0")

    def _connect(self, address: str, identity: bytes) -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.DEALER)
        socket.set(zmq.IDENTITY, identity)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVTIMEO, 5000)
        socket.connect(address)
        return socket

    def answer(self, kind: Kind) -> list[bytes]:
        while True:
            frames = self.control.recv_multipart()
            if Header.unpack(frames[0]).kind is kind:
                return frames

    def reserve(self, transfer_id: int, num_tokens: int) -> None:
        reserve = transfer_pb2.Reserve(
            request_id="hostile", remaining_ms=60_000, num_tokens=num_tokens, num_sequences=1
        )
        self.control.send_multipart(pack_control(Kind.RESERVE, transfer_id, self.epoch, reserve))

    def barrier(self) -> None:
        """Everything sent over the control socket so far has been taken in."""
        self.control.send_multipart(pack_control(Kind.PING, 0, self.epoch))
        self.answer(Kind.PONG)

    def close(self) -> None:
        self.context.destroy(linger=0)


@contextmanager
def hostile_pair(directory: Path) -> Iterator[tuple[Pair, Hostile]]:
    with make_pair("tcp", directory, options=OPTIONS) as pair:
        hostile = Hostile(pair, "h")
        try:
            yield pair, hostile
        finally:
            hostile.close()


def assert_still_serves(pair: Pair) -> None:
    """A well-behaved sender's request goes through."""
    pair.sent.clear()
    fill_poison(pair.target)
    source, target = Room([3, 1, 7], 2), Room([5, 6, 2], 1)
    pair.ship(21, source, target)
    pair.expect_sender(Closed)
    assert pair.sender_event(Committed) is not None, pair.sent
    pair.assert_arrived(21, source, target)
    assert pair.receiver.stats()["errors"] == 0
    pair.receiver.check()


def test_receiver_survives_random_bytes_on_every_socket(tmp_path: Path) -> None:
    with hostile_pair(tmp_path) as (pair, hostile):

        @given(messages=st.lists(st.lists(st.binary(max_size=90), min_size=1, max_size=6)))
        @FUZZ
        def fuzz(messages: list[list[bytes]]) -> None:
            for frames in messages:
                hostile.control.send_multipart(frames)
                hostile.bulk.send_multipart(frames)
            hostile.barrier()

        fuzz()
        assert_still_serves(pair)


def test_receiver_survives_messages_in_any_order(tmp_path: Path) -> None:
    with hostile_pair(tmp_path) as (pair, hostile):
        messages = control_messages(
            [kind for kind in Kind if kind not in (Kind.CHUNK, Kind.HELLO)], hostile.epoch
        )
        pair.is_committing = False

        @given(batch=st.lists(messages, max_size=8))
        @FUZZ
        def fuzz(batch: list[list[bytes]]) -> None:
            for frames in batch:
                hostile.control.send_multipart(frames)
            hostile.barrier()
            pair.step()

        pair.grant_into(Room([5, 6, 2, 8, 9, 10, 11, 3], 1))
        fuzz()
        hostile.close()
        pair.settle()
        pair.is_committing = True
        assert_still_serves(pair)


def test_mutated_chunks_touch_no_row_but_the_granted(tmp_path: Path) -> None:
    with hostile_pair(tmp_path) as (pair, hostile):
        pair.is_committing = False
        granted = Room([5, 6, 2], 1)
        pair.grant_into(granted)
        hostile.reserve(1, 21)
        pair.run_until(lambda: bool(pair.rooms))
        hostile.answer(Kind.GRANT)

        @given(
            batch=st.lists(
                st.tuples(chunk_headers, st.integers(0, SLOT_BYTES), st.booleans(), st.booleans()),
                max_size=8,
            )
        )
        @settings(FUZZ, max_examples=150)
        def fuzz(batch: list[tuple[Header, int, bool, bool]]) -> None:
            for header, size, is_fitting, is_hashed in batch:
                length = header.length
                if is_fitting and header.component < len(LAYOUT.components):
                    rows = (header.layers[1] - header.layers[0]) * (header.rows[1] - header.rows[0])
                    length = rows * LAYOUT.components[header.component].row_bytes
                    length = size = min(max(length, 0), 2 * SLOT_BYTES)
                header = replace(header, epoch=hostile.epoch, length=length)
                payload = random.Random(size).randbytes(size)
                packed = header.pack()
                if is_hashed:
                    packed = seal(packed, hash_message(packed, payload))
                hostile.bulk.send_multipart([packed, payload])
            hostile.barrier()
            pair.step()

        fuzz()
        until = time.monotonic() + 0.2
        pair.run_until(lambda: time.monotonic() > until)
        for component in LAYOUT.components:
            first, last = component.shipped_rows(21)
            allowed = pair.target.row_index(
                component, (first, last), granted.block_ids, granted.slot
            )
            rows_of = pair.target.rows(component).view(torch.uint8)
            untouched = torch.ones(rows_of.shape[1], dtype=torch.bool)
            untouched[allowed] = False
            assert (rows_of[:, untouched] == 0xFF).all(), component.name
        hostile.close()
        pair.settle()
        pair.is_committing = True
        assert_still_serves(pair)


def test_sender_survives_any_receiver(tmp_path: Path) -> None:
    """Messages in any order from a decode that may be anything; every transfer ends."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    options = replace(OPTIONS, arena_dir=tmp_path, connect_timeout_s=0.05, decide_s=0.2)
    with make_pair("tcp", tmp_path) as pair:
        sender = Sender(pair.source, DIGEST, "prefill-2", 8, options, lambda: None)
        kinds = [kind for kind in Kind if kind not in (Kind.CHUNK, Kind.HELLO)]

        @given(batch=st.lists(control_messages(kinds, 99), max_size=12), is_welcomed=st.booleans())
        @settings(FUZZ, max_examples=40)
        def fuzz(batch: list[list[bytes]], is_welcomed: bool) -> None:
            destination = Destination("decode-9", 99, f"tcp://127.0.0.1:{port}")
            deadline = time.monotonic() + 0.3
            handle = sender.reserve("r", 0, destination, 21, 1, deadline, StateSource([1, 2, 3], 1))
            sender.piece_ready(handle, (0, 4), (0, 21))
            sender.finish(handle, [], 0.0)
            # a busy machine may be too slow for this HELLO: then nobody answers, and it ends too
            identity = router.recv_multipart()[0] if router.poll(200) else b"nobody"
            if is_welcomed:
                welcome = transfer_pb2.Welcome(
                    slot_bytes=SLOT_BYTES, num_slots=8, bulk_addresses=["tcp://127.0.0.1:9"]
                )
                router.send_multipart([identity, *pack_control(Kind.WELCOME, 0, 99, welcome)])
                grant = transfer_pb2.Grant(slots=[0, 1])
                frames = pack_control(Kind.GRANT, handle.transfer_id, 99, grant)
                router.send_multipart([identity, *frames])
            for frames in batch:
                router.send_multipart([identity, *frames])
            give_up = time.monotonic() + 5
            while not any(isinstance(e, Closed) and e.handle == handle for e in sender.poll()):
                assert time.monotonic() < give_up
                time.sleep(0.001)
            # the next example meets a new connection
            while router.poll(0):
                router.recv_multipart()

        try:
            fuzz()
            assert sender.stats()["errors"] == 0
        finally:
            sender.close()
            context.destroy(linger=0)


def test_engine_sees_only_sound_reservations(tmp_path: Path) -> None:
    with hostile_pair(tmp_path) as (pair, hostile):
        for transfer_id, num_tokens in enumerate((0, 10_000, 2**32 - 1), start=1):
            hostile.reserve(transfer_id, num_tokens)
        hostile.barrier()
        pair.step()
        assert not [e for e in pair.received if isinstance(e, ReserveRequested)]
