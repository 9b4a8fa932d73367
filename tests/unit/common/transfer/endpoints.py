"""Two transfer endpoints in one process, each with an engine that does the plain thing; real
sockets.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import zmq

from scission.common.cache.device_rows import DeviceRows
from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage
from scission.common.transfer.events import (
    Destination,
    Ready,
    ReceiverEvent,
    ReserveRequested,
    SenderEvent,
    StateSource,
    TransferHandle,
)
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.receiver import Receiver
from scission.common.transfer.sender import Sender
from scission.protos import transfer_pb2

CPU = torch.device("cpu")
TIERS = ("inproc", "tcp", "shared")
DIGEST = {"block_size": "1", "weights": "2"}
SLOT_BYTES = 4096
_names = itertools.count(1)

LAYOUT = CacheLayout(
    (
        Component("paged_1", Kind.PAGED, (0, 1, 2, 3), (3, 5), "bfloat16"),
        Component("paged_4", Kind.PAGED, (1, 3), (33,), "uint8", tokens_per_row=4),
        Component("ring", Kind.RING, (0, 2), (7,), "float32", ring_size=8, live_lookback=7),
        Component(
            "scores",
            Kind.RING,
            (2,),
            (5,),
            "float32",
            ring_size=8,
            live_align=4,
            live_lookback=4,
            initial=float("-inf"),
        ),
        Component("tail", Kind.TAIL, (0, 3), (4,), "float32"),
    ),
    block_size=8,
)


def fill_noise(storage: CacheStorage, seed: int = 0) -> None:
    """Random bytes in every row."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*storage.paged.values(), *storage.slots.values()):
        view = tensor.view(torch.uint8)
        view.copy_(torch.randint(0, 256, view.shape, dtype=torch.uint8, generator=generator))


def fill_poison(storage: CacheStorage) -> None:
    """0xff in every byte: NaN in every float dtype."""
    for tensor in (*storage.paged.values(), *storage.slots.values()):
        tensor.view(torch.uint8).fill_(0xFF)


@dataclass
class Room:
    """What a request holds at one end."""

    block_ids: list[int]
    slot: int


@dataclass
class Pair:
    """Drive it with `ship`, `run_until` and the endpoints' own methods."""

    tier: str
    sender: Sender
    receiver: Receiver
    source: CacheStorage
    target: CacheStorage
    receiver_epoch: int
    changed: threading.Condition
    through: str | None = None  # address that the sender is told, in place of the receiver's
    sent: list[SenderEvent] = field(default_factory=list)
    received: list[ReceiverEvent] = field(default_factory=list)
    inject_budget: int = 1 << 20
    rooms: dict[TransferHandle, Room] = field(default_factory=dict)
    on_reserve: Callable[[ReserveRequested], None] | None = None
    is_committing: bool = True

    @property
    def destination(self) -> Destination:
        address = self.receiver.address if self.through is None else self.through
        return Destination("decode-1", self.receiver_epoch, address)

    def wake(self) -> None:
        with self.changed:
            self.changed.notify()

    def step(self) -> None:
        """One turn of both engines."""
        self.sent += self.sender.poll()
        for event in self.receiver.poll():
            self.received.append(event)
            if isinstance(event, ReserveRequested) and self.on_reserve is not None:
                self.on_reserve(event)
            elif isinstance(event, Ready) and self.is_committing:
                self.receiver.commit(event.handle)
        self.receiver.inject(self.inject_budget)

    def run_until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Turn both engines until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, (self.sent, self.received, self.stats())
            self.step()
            with self.changed:
                self.changed.wait(0.005)

    def stats(self) -> dict[str, dict[str, int]]:
        return {"sender": self.sender.stats(), "receiver": self.receiver.stats()}

    def sender_event(self, kind: type[SenderEvent]) -> SenderEvent | None:
        return next((event for event in self.sent if isinstance(event, kind)), None)

    def receiver_event(self, kind: type[ReceiverEvent]) -> ReceiverEvent | None:
        return next((event for event in self.received if isinstance(event, kind)), None)

    def expect_sender(self, kind: type[SenderEvent], timeout_s: float = 10.0) -> SenderEvent:
        self.run_until(lambda: self.sender_event(kind) is not None, timeout_s)
        event = self.sender_event(kind)
        assert event is not None
        return event

    def expect_receiver(self, kind: type[ReceiverEvent], timeout_s: float = 10.0) -> ReceiverEvent:
        self.run_until(lambda: self.receiver_event(kind) is not None, timeout_s)
        event = self.receiver_event(kind)
        assert event is not None
        return event

    def reserve(
        self,
        num_tokens: int,
        source: Room,
        *,
        request_id: str = "r1",
        attempt: int = 0,
        deadline_s: float = 30.0,
    ) -> TransferHandle:
        return self.sender.reserve(
            request_id,
            attempt,
            self.destination,
            num_tokens,
            1,
            time.monotonic() + deadline_s,
            StateSource(source.block_ids, source.slot),
        )

    def grant_into(self, room: Room) -> None:
        """Grant every reservation this room."""

        def grant(event: ReserveRequested) -> None:
            self.rooms[event.handle] = room
            self.receiver.grant(event.handle, room.block_ids, room.slot)

        self.on_reserve = grant

    def finish(self, handle: TransferHandle) -> None:
        self.sender.finish(handle, [transfer_pb2.Sequence(choice=0)], time.monotonic())

    def ship(self, num_tokens: int, source: Room, target: Room) -> TransferHandle:
        """A whole request, in one piece."""
        self.grant_into(target)
        handle = self.reserve(num_tokens, source)
        self.sender.piece_ready(handle, (0, 4), (0, num_tokens))
        self.finish(handle)
        return handle

    def settle(self) -> None:
        """Wait until every arena slot is free again."""
        total = self.receiver.counts()["total"]
        self.run_until(lambda: self.receiver.counts()["free"] == total)
        self.receiver.check()

    def assert_arrived(self, num_tokens: int, source: Room, target: Room) -> None:
        """Exactly the live rows: equal to the sender's, and poison everywhere else."""
        expected = CacheStorage(
            self.target.layout, self.target.num_blocks, self.target.num_slots, self.target.device
        )
        fill_poison(expected)
        for component in self.target.layout.components:
            rows = component.shipped_rows(num_tokens)
            at = self.source.row_index(component, rows, source.block_ids, source.slot)
            to = self.target.row_index(component, rows, target.block_ids, target.slot)
            given = self.source.rows(component).view(torch.uint8)[:, at]
            expected.rows(component).view(torch.uint8)[:, to] = given
        for component in self.target.layout.components:
            got = self.target.rows(component).view(torch.uint8)
            want = expected.rows(component).view(torch.uint8)
            assert torch.equal(got, want), component.name


@contextmanager
def make_pair(
    tier: str,
    directory: Path,
    *,
    layout: CacheLayout = LAYOUT,
    num_blocks: int = 12,
    num_slots: int = 4,
    options: TransferOptions | None = None,
    sender_digest: dict[str, str] | None = None,
    is_clean_end: bool = True,
    device: torch.device = CPU,
    target_rows: DeviceRows | None = None,
) -> Iterator[Pair]:
    """Both endpoints over one tier; at the end no slot may be lost and no thread may have met a
    surprise. With `target_rows` the receiver's state is written as a device's is, by these.
    """
    if options is None:
        options = TransferOptions(slot_bytes=SLOT_BYTES, arena_bytes=8 * SLOT_BYTES)
    options = replace(
        options,
        bind=f"inproc://transfer-{next(_names)}" if tier == "inproc" else "tcp://127.0.0.1:*",
        arena_dir=directory if tier == "shared" else None,
    )
    context: zmq.Context[zmq.Socket[bytes]] | None = zmq.Context() if tier == "inproc" else None
    changed = threading.Condition()

    def wake() -> None:
        with changed:
            changed.notify()

    source = CacheStorage(layout, num_blocks, num_slots, device)
    target = CacheStorage(layout, num_blocks, num_slots, device)
    fill_noise(source)
    fill_poison(target)
    if target_rows is not None:
        target.on_device = target_rows
    epoch = 1000 + next(_names)
    receiver = Receiver(target, DIGEST, "decode-1", epoch, options, wake, context=context)
    sender = Sender(source, sender_digest or DIGEST, "prefill-1", 7, options, wake, context=context)
    pair = Pair(tier, sender, receiver, source, target, epoch, changed)
    try:
        yield pair
        if is_clean_end:
            pair.settle()
    finally:
        pair.sender.close()
        pair.receiver.close()
        if context is not None:
            context.destroy(linger=0)
    assert pair.sender.stats()["errors"] == 0
    assert pair.receiver.stats()["errors"] == 0
    if tier == "shared":
        assert list(directory.iterdir()) == []
