"""The decode's end of the transfer: takes reservations, checks and injects chunks, commits.

The I/O thread receives, validates and keeps the clock (`reception.py`); the engine thread decides
grants and calls `inject`, which writes to host memory and hashes what it wrote (`injector.py`), or
lets a device write what threads of its own have hashed (`device_injector.py`). Policy (who gets
room) is the engine's.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from scission.common.cache.storage import CacheStorage
from scission.common.errors import WireError
from scission.common.transfer.arena import Arena, remove_stale
from scission.common.transfer.device_injector import DeviceInjector
from scission.common.transfer.events import Aborted, Failed, ReceiverEvent, TransferHandle
from scission.common.transfer.incoming import Incoming, Injected
from scission.common.transfer.injector import Injector
from scission.common.transfer.loop import Loop
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.peers import Endpoint
from scission.common.transfer.plan import check_slot_bytes
from scission.common.transfer.reception import Reception
from scission.common.transfer.sockets import (
    Authenticator,
    Context,
    Socket,
    bind,
    bulk_socket,
    control_socket,
    receive,
    with_host,
    with_port,
)
from scission.common.transfer.wire import HEADER, unpack_control
from scission.protos import transfer_pb2

logger = logging.getLogger(__name__)

MESSAGES_PER_ROUND = 64  # from one socket, between two looks at the others


class Receiver:
    """One per decode process and rank; owns its I/O thread. Public methods are for the engine
    thread.
    """

    def __init__(
        self,
        storage: CacheStorage,
        layout_digest: Mapping[str, str],
        worker_id: str,
        epoch: int,
        options: TransferOptions,
        wake: Callable[[], None],
        *,
        context: Context | None = None,
    ) -> None:
        """Binds before it returns. Raises ConfigError where it cannot.

        Args:
            wake: called from the I/O thread when `poll` or `inject` has something; must not block.
            context: a ZeroMQ context to share with a sender of this process (needed for inproc
                addresses).
        """
        check_slot_bytes(storage.layout, options.slot_bytes)
        self._options = options
        self._wake = wake
        self._events: deque[ReceiverEvent] = deque()
        self._stats: Counter[str] = Counter()
        self._bulk: list[Socket] = []
        self._ipc_path: Path | None = None
        self._loop = Loop(f"transfer-{worker_id}", context)
        bulk_addresses = self._open_sockets()
        self._arena = self._open_arena(epoch)
        endpoint = Endpoint(
            worker_id,
            epoch,
            dict(layout_digest),
            self.address,
            bulk_addresses,
            self._arena,
            options,
        )
        name = f"transfer-{worker_id}"
        self._injector: Injector | DeviceInjector = (
            Injector(storage, self._arena, options, name, self._report_injected)
            if storage.on_device is None
            else DeviceInjector(storage, self._arena, options, name, self._report_injected, wake)
        )
        self._reception = Reception(
            endpoint, self._control, storage, self._injector, self._stats, self._emit
        )
        self._loop.start(self._reception.tick, self._close)

    def _open_sockets(self) -> list[str]:
        """The control socket and those for rows, whose addresses are returned."""
        options, context = self._options, self._loop.context
        self._authenticator: Authenticator | None = None
        if options.curve is not None:
            self._authenticator = Authenticator(context, options.curve)
            self._loop.register(self._authenticator.socket, self._authenticator.answer)
        self._control = control_socket(context, options, None)
        bound = bind(self._control, options.bind)
        self._loop.register(self._control, self._receive_control)
        self.address = with_host(bound, options.advertise_host)
        addresses: list[str] = []
        for i in range(options.bulk_sockets):
            if bound.startswith("inproc://"):
                address = f"{bound}-bulk{i}"
            else:
                address = with_port(options.bind, "*")
            bulk = self._bind_bulk(address, is_shared=False)
            addresses.append(with_host(bulk, options.advertise_host))
        return addresses

    def _bind_bulk(self, address: str, *, is_shared: bool) -> str:
        socket = bulk_socket(self._loop.context, self._options, None)
        bound = bind(socket, address)
        self._bulk.append(socket)
        self._loop.register(socket, partial(self._receive_bulk, socket, is_shared))
        return bound

    def _open_arena(self, epoch: int) -> Arena | None:
        """The arena, and the socket over which its slots are told of."""
        arena = self._make_arena(epoch)
        if arena is not None:
            self._ipc_path = arena.path.with_suffix(".ipc")
            self._bind_bulk(f"ipc://{self._ipc_path}", is_shared=True)
            self._ipc_path.chmod(0o600)
        return arena

    def _make_arena(self, epoch: int) -> Arena | None:
        options = self._options
        if options.arena_dir is None:
            return None
        try:
            remove_stale(options.arena_dir)
            return Arena.create(options.arena_dir, epoch, options.slot_bytes, options.num_slots)
        except OSError as error:
            logger.warning(
                "no shared-memory arena of %d bytes in %s, rows will travel in messages: %s",
                options.arena_bytes,
                options.arena_dir,
                error,
            )
            return None

    # engine thread

    def poll(self) -> list[ReceiverEvent]:
        """What happened since the last call, in order. After Aborted or Failed nothing more is
        injected there.
        """
        events: list[ReceiverEvent] = []
        while self._events:
            event = self._events.popleft()
            if isinstance(event, Aborted | Failed):
                self._injector.drop(event.handle)
            events.append(event)
        return events

    def grant(self, handle: TransferHandle, block_ids: list[int], slot: int) -> None:
        """Give the transfer room: blocks for its tokens and a clean state slot, in no running
        sequence's table.
        """
        self._injector.grant(handle, block_ids, slot)
        self._decide(handle, self._reception.grant)

    def wait(self, handle: TransferHandle, position: int) -> None:
        """Tell the prefill that it stands in line; a grant, a refusal or an abort follows."""
        self._decide(handle, partial(self._reception.wait, position))

    def refuse(
        self, handle: TransferHandle, reason: str, field: str = "", detail: str = ""
    ) -> None:
        refuse = transfer_pb2.Refuse(reason=reason, field=field, detail=detail)
        self._decide(handle, partial(self._reception.refuse, refuse))

    def _decide(self, handle: TransferHandle, function: Callable[[Incoming], None]) -> None:
        self._loop.call(partial(self._reception.for_transfer, handle, function))

    def inject(self, budget_bytes: int) -> int:
        """Write waiting chunks into their blocks and slots, at least one, until the budget is
        spent; a device only begins to.

        Returns their bytes. Their arena slots go back to the senders once they are written.
        """
        return self._injector.inject(budget_bytes)

    @property
    def has_chunks(self) -> bool:
        """Whether `inject` has something to do."""
        return self._injector.has_chunks

    def commit(self, handle: TransferHandle) -> None:
        """Take the request over, after Ready: the prefill may forget it. Repeated until it
        acknowledges.
        """
        self._injector.drop(handle)
        self._decide(handle, self._reception.commit)

    def abort(self, handle: TransferHandle, reason: str) -> None:
        """Withdraw, at any time before the commit; nothing is written to the granted rows from here
        on.
        """
        self._injector.drop(handle)
        self._decide(handle, lambda transfer: self._reception.abort(transfer, reason))

    def counts(self) -> dict[str, int]:
        """Arena slots by state (free, granted, filled, quarantined) and their total, which
        is their sum.
        """
        return self._reception.slots.counts()

    def check(self) -> None:
        """Assert that every arena slot is in exactly one place; waits for the I/O thread."""
        self._loop.ask(self._reception.slots.check)

    def stats(self) -> dict[str, int]:
        """Running totals: injected chunks and bytes, damaged, re-shipped, dropped messages by
        cause, errors.
        """
        return {**self._stats, "errors": self._loop.num_errors}

    def close(self) -> None:
        """Abort what is open and end the I/O thread."""
        self._loop.stop()
        self._injector.close()

    def _report_injected(self, done: list[Injected]) -> None:
        self._loop.call(partial(self._reception.take_injected, done))

    # I/O thread

    def _emit(self, event: ReceiverEvent) -> None:
        self._events.append(event)
        self._wake()

    def _receive_control(self) -> None:
        for _ in range(MESSAGES_PER_ROUND):
            frames = receive(self._control, copy=True)
            if frames is None:
                return
            try:
                self._reception.on_control(frames[0], *unpack_control(frames[1:]))
            except WireError as error:
                self._stats["dropped_invalid"] += 1
                logger.debug("dropped a control message: %s", error)

    def _receive_bulk(self, socket: Socket, is_shared: bool) -> None:
        num_taken = 0
        for _ in range(MESSAGES_PER_ROUND):
            # rows stay where ZeroMQ received them until they are injected
            frames = receive(socket, copy=is_shared)
            if frames is None:
                break
            identity = frames[0] if is_shared else frames[0].bytes
            if is_shared and len(frames) == 2:
                packed = frames[1]
                headers = [packed[i : i + HEADER.size] for i in range(0, len(packed), HEADER.size)]
            elif not is_shared and len(frames) == 3:
                headers = [frames[1].bytes]
            else:
                self._stats["dropped_invalid"] += 1
                continue
            for packed in headers:
                try:
                    num_taken += self._reception.on_chunk(
                        identity, packed, None if is_shared else frames[2]
                    )
                except WireError as error:
                    self._stats["dropped_invalid"] += 1
                    logger.debug("dropped a chunk: %s", error)
        if num_taken:
            self._wake()

    def _close(self) -> None:
        self._reception.end_all()
        for socket in (self._control, *self._bulk):
            self._loop.unregister(socket)
            socket.close()
        if self._authenticator is not None:
            self._authenticator.socket.close()
        if self._arena is not None:
            self._arena.remove()
            self._arena.close()
        if self._ipc_path is not None:
            self._ipc_path.unlink(missing_ok=True)
