"""The prefill's end of the transfer: reserves room, ships pieces as they become final, holds until
the commit.

The engine thread calls the public methods, none of which waits; everything else, gathering and
hashing included, runs on the endpoint's own I/O thread.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial

from google.protobuf.message import Message

from scission.common.cache.storage import CacheStorage, Mark
from scission.common.errors import TransferError
from scission.common.transfer.connection import Connection
from scission.common.transfer.events import (
    Closed,
    Committed,
    Destination,
    Failed,
    Granted,
    Refused,
    SenderEvent,
    StateSource,
    TransferHandle,
    Waiting,
    known_reason,
)
from scission.common.transfer.loop import IDLE_S, Loop
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.outgoing import Finish, Outgoing
from scission.common.transfer.plan import Piece, add_piece, check_slot_bytes
from scission.common.transfer.shipping import Shipper
from scission.common.transfer.sockets import Context
from scission.common.transfer.wire import VERSION, Header, Kind
from scission.protos import transfer_pb2

logger = logging.getLogger(__name__)

TICK_S = 0.02  # while transfers are open
BLOCKED_S = 0.001  # while a chunk waits for a socket, a staging buffer or the device


class Sender:
    """One per prefill process and rank; owns its I/O thread. Public methods are for the engine
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
        """
        Args:
            wake: called from the I/O thread when `poll` has something; must not block.
            context: a ZeroMQ context to share with a receiver of this process (needed for inproc
                addresses).
        """
        self._min_slot_bytes = check_slot_bytes(storage.layout, options.slot_bytes)
        self._storage = storage
        self._options = options
        self._wake = wake
        self._hello = transfer_pb2.Hello(
            epoch=epoch,
            worker_id=worker_id,
            layout_digest=layout_digest,
            protocol_version=VERSION,
            tiers=[transfer_pb2.TIER_MESSAGE]
            + ([transfer_pb2.TIER_SHARED] if options.arena_dir is not None else []),
        )
        self._last_transfer_id = 0
        self._events: deque[SenderEvent] = deque()
        self._stats: Counter[str] = Counter()
        # below: the I/O thread's
        self._transfers: dict[int, Outgoing] = {}
        self._connections: dict[Destination, Connection] = {}
        self._aborting: dict[
            int, tuple[Connection, str, float]
        ] = {}  # until ABORT_ACK: reason, sent at
        self._computing: set[Outgoing] = set()  # with pieces that a device is still writing
        self._watched_at = 0.0
        self._pinged_at = 0.0
        name = f"transfer-{worker_id}"
        self._shipper = Shipper(storage, options, name, self._transfers, self._stats, self._end)
        self._loop = Loop(name, context)
        self._loop.start(self._tick, self._close)

    # engine thread

    def reserve(
        self,
        request_id: str,
        attempt: int,
        destination: Destination,
        num_tokens: int,
        num_sequences: int,
        deadline: float,
        source: StateSource,
    ) -> TransferHandle:
        """Ask the destination for room for a request's state.

        Args:
            num_tokens: positions whose state will be shipped.
            deadline: time.monotonic() after which the transfer fails.
            source: must stay as it is until Closed; its block list may grow.
        """
        self._last_transfer_id += 1
        handle = TransferHandle(self._last_transfer_id, request_id, attempt, destination.worker_id)
        self._loop.call(
            partial(self._reserve, handle, destination, num_tokens, num_sequences, deadline, source)
        )
        return handle

    def piece_ready(
        self, handle: TransferHandle, layers: tuple[int, int], tokens: tuple[int, int]
    ) -> None:
        """The paged rows of these tokens in these model layers are final; they ship from now on.

        Pieces may come in any order and cut, but every token and layer in exactly one before
        `finish`.
        """
        mark = self._storage.mark()
        self._loop.call(partial(self._declare, handle, mark, Piece(layers, tokens)))

    def finish(
        self,
        handle: TransferHandle,
        sequences: list[transfer_pb2.Sequence],
        first_token_at: float,
    ) -> None:
        """Rings and tails are final too: ship them, then the manifest. `first_token_at` is
        time.monotonic().
        """
        finish = Finish(sequences, first_token_at, time.monotonic())
        self._loop.call(partial(self._declare, handle, self._storage.mark(), finish))

    def abort(self, handle: TransferHandle, reason: str) -> None:
        """End the transfer without an outcome event; Closed follows, also for one that has ended
        already.
        """
        self._loop.call(partial(self._abort, handle, reason))

    def poll(self) -> list[SenderEvent]:
        """What happened since the last call, in order."""
        events: list[SenderEvent] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def stats(self) -> dict[str, int]:
        """Running totals: chunks, bytes, reships, aborts, stalls, dropped messages, errors of our
        own.
        """
        return {**self._stats, "errors": self._loop.num_errors}

    def close(self) -> None:
        """Abort what is open and end the I/O thread."""
        self._loop.stop()
        self._shipper.close()

    # I/O thread: commands

    def _emit(self, event: SenderEvent) -> None:
        self._events.append(event)
        self._wake()

    def _reserve(
        self,
        handle: TransferHandle,
        destination: Destination,
        num_tokens: int,
        num_sequences: int,
        deadline: float,
        source: StateSource,
    ) -> None:
        connection = self._connections.get(destination)
        if connection is None:
            try:
                connection = Connection(
                    self._loop,
                    self._options,
                    self._hello,
                    destination,
                    self._min_slot_bytes,
                    self._storage.on_device is not None,
                    self._on_up,
                    self._on_message,
                    self._on_lost,
                )
            except TransferError as error:
                logger.warning("%s: %s", handle.request_id, error)
                self._emit(Failed(handle, "unreachable"))
                self._emit(Closed(handle))
                return
            self._connections[destination] = connection
        transfer = Outgoing(
            handle,
            connection,
            source,
            num_tokens,
            num_sequences,
            deadline,
            reserved_at=time.monotonic(),
        )
        self._transfers[handle.transfer_id] = transfer
        if connection.is_up:
            self._ask(transfer, transfer.reserved_at)

    def _ask(self, transfer: Outgoing, now: float) -> None:
        """Send RESERVE, again too: the receiver knows its number."""
        transfer.asked_at = now
        transfer.connection.send(
            Kind.RESERVE,
            transfer.handle.transfer_id,
            transfer_pb2.Reserve(
                request_id=transfer.handle.request_id,
                attempt=transfer.handle.attempt,
                remaining_ms=max(1, int((transfer.deadline - now) * 1000)),
                num_tokens=transfer.num_tokens,
                num_sequences=transfer.num_sequences,
            ),
        )

    def _declare(self, handle: TransferHandle, mark: Mark | None, what: Piece | Finish) -> None:
        transfer = self._transfers.get(handle.transfer_id)
        if transfer is not None:
            transfer.computing.append((mark, what))
            self._admit(transfer)

    def _admit(self, transfer: Outgoing) -> None:
        """Take what the device has finished writing; the rest is looked at again soon."""
        computing = transfer.computing
        while computing and (computing[0][0] is None or computing[0][0].query()):
            _, what = computing.popleft()
            if isinstance(what, Piece):
                add_piece(transfer.pieces, what)
            else:
                transfer.finish = what
            self._shipper.take_turn(transfer)
        if computing:
            self._computing.add(transfer)
        else:
            self._computing.discard(transfer)

    def _abort(self, handle: TransferHandle, reason: str) -> None:
        transfer = self._transfers.get(handle.transfer_id)
        if transfer is not None:
            self._stats["aborts"] += 1
            self._end(transfer, None, abort_reason=reason)

    # I/O thread: messages

    def _on_message(self, connection: Connection, header: Header, body: Message | None) -> None:
        if header.kind is Kind.REFUSE and header.transfer_id == 0:
            assert isinstance(body, transfer_pb2.Refuse)
            self._refused(connection, body)
            return
        transfer = self._transfers.get(header.transfer_id)
        if transfer is not None and transfer.connection is not connection:
            transfer = None
        match header.kind:
            case Kind.ABORT_ACK:
                aborting = self._aborting.get(header.transfer_id)
                if aborting is not None and aborting[0] is connection:
                    del self._aborting[header.transfer_id]
            case Kind.ABORT:
                assert isinstance(body, transfer_pb2.Abort)
                # gathering happens on this thread: by now nothing writes for that transfer any more
                if transfer is not None:
                    self._end(transfer, Failed(transfer.handle, known_reason(body.reason)))
                connection.send(Kind.ABORT_ACK, header.transfer_id)
            case Kind.COMMIT:
                if transfer is not None and transfer.manifest is not None:
                    self._committed(transfer)
                connection.send(Kind.COMMIT_ACK, header.transfer_id)
            case _ if transfer is not None:
                self._on_transfer(transfer, header.kind, body)

    def _on_transfer(self, transfer: Outgoing, kind: Kind, body: Message | None) -> None:
        now = time.monotonic()
        if isinstance(body, transfer_pb2.Grant):
            transfer.is_answered = True
            if transfer.granted_at is None:
                transfer.granted_at = transfer.progress_at = now
                self._credit(transfer, transfer_pb2.Credit(slots=body.slots), now)
                self._emit(Granted(transfer.handle, now - transfer.reserved_at))
                self._shipper.take_turn(transfer)
        elif isinstance(body, transfer_pb2.Wait):
            transfer.is_answered = True
            self._emit(Waiting(transfer.handle, body.position))
        elif isinstance(body, transfer_pb2.Refuse):
            refused = Refused(transfer.handle, known_reason(body.reason), body.field, body.detail)
            self._end(transfer, refused)
        elif isinstance(body, transfer_pb2.Credit) and transfer.granted_at is not None:
            self._credit(transfer, body, now)
        elif isinstance(body, transfer_pb2.Reship):
            known = [n for n in body.sequence_numbers if n < len(transfer.shipped)]
            transfer.reship.extend(n for n in known if n not in transfer.reship)
            self._shipper.take_turn(transfer)

    def _credit(self, transfer: Outgoing, credit: transfer_pb2.Credit, now: float) -> None:
        for sequence in credit.injected:
            if sequence < len(transfer.shipped) and not transfer.shipped[sequence].is_done:
                transfer.shipped[sequence].is_done = True
                transfer.num_undone -= 1
                transfer.progress_at = now
        for slot in credit.slots:
            # a slot is ours to fill once what we put there last is done with; said twice, it counts
            # once
            last = transfer.in_slot.get(slot)
            is_empty = last is None or transfer.shipped[last].is_done
            is_real = slot < transfer.connection.num_slots
            if is_real and is_empty and slot not in transfer.credits:
                transfer.credits.append(slot)
                transfer.progress_at = now
        self._shipper.take_turn(transfer)

    def _committed(self, transfer: Outgoing) -> None:
        now = time.monotonic()
        assert transfer.granted_at is not None and transfer.finish is not None
        self._end(
            transfer,
            Committed(
                transfer.handle,
                now - transfer.granted_at,
                now - transfer.finish.at,
                transfer.num_bytes,
                transfer.connection.tier,
            ),
        )

    def _refused(self, connection: Connection, refuse: transfer_pb2.Refuse) -> None:
        """The decode refuses the connection, and so every transfer over it."""
        connection.close()
        self._forget(connection)
        for transfer in self._over(connection):
            refused = Refused(
                transfer.handle, known_reason(refuse.reason), refuse.field, refuse.detail
            )
            self._end(transfer, refused)

    def _on_up(self, connection: Connection) -> None:
        now = time.monotonic()
        for transfer in self._over(connection):
            self._ask(transfer, now)

    def _on_lost(self, connection: Connection, reason: str) -> None:
        self._forget(connection)
        for transfer in self._over(connection):
            self._end(transfer, Failed(transfer.handle, reason))

    def _forget(self, connection: Connection) -> None:
        if self._connections.get(connection.destination) is connection:
            del self._connections[connection.destination]
        self._stats["dropped_messages"] += connection.num_dropped
        self._aborting = {k: v for k, v in self._aborting.items() if v[0] is not connection}

    def _over(self, connection: Connection) -> list[Outgoing]:
        return [t for t in self._transfers.values() if t.connection is connection]

    def _end(
        self, transfer: Outgoing, event: SenderEvent | None, abort_reason: str | None = None
    ) -> None:
        """Forget the transfer: from here on its source is not read. With a reason the peer is told
        until it acknowledges.
        """
        transfer_id = transfer.handle.transfer_id
        del self._transfers[transfer_id]
        self._computing.discard(transfer)
        if abort_reason is not None and transfer.asked_at and transfer.connection.is_up:
            self._send_abort(transfer_id, transfer.connection, abort_reason)
        if event is not None:
            self._emit(event)
        self._emit(Closed(transfer.handle))

    def _send_abort(self, transfer_id: int, connection: Connection, reason: str) -> None:
        self._aborting[transfer_id] = (connection, reason, time.monotonic())
        connection.send(Kind.ABORT, transfer_id, transfer_pb2.Abort(reason=reason))

    # I/O thread: time

    def _tick(self, now: float) -> float:
        for transfer in list(self._computing):
            self._admit(transfer)
        is_blocked = self._shipper.flush(self._connections.values())
        is_blocked |= self._shipper.ship()
        if now - self._watched_at >= TICK_S:
            self._watched_at = now
            self._watch_all(now)
        if is_blocked:
            return BLOCKED_S
        if self._shipper.has_turns:
            return 0.0
        if self._computing:
            return BLOCKED_S
        return TICK_S if self._transfers or self._aborting else IDLE_S

    def _watch_all(self, now: float) -> None:
        for connection in list(self._connections.values()):
            connection.tick(now)
        for transfer in list(self._transfers.values()):
            if transfer.handle.transfer_id in self._transfers:
                self._watch(transfer, now)
        self._repeat_aborts(now)
        self._ping(now)

    def _watch(self, transfer: Outgoing, now: float) -> None:
        handle, connection = transfer.handle, transfer.connection
        options = self._options
        if now >= transfer.deadline:
            self._end(transfer, Failed(handle, "deadline"), abort_reason="deadline")
            return
        if not connection.is_up:
            return  # the connection has a time limit of its own
        if not transfer.is_answered and now - transfer.asked_at > options.stall_s:
            self._ask(transfer, now)
        if now - max(connection.last_heard, transfer.reserved_at) > options.decide_s:
            self._stall(transfer)
            return
        if transfer.granted_at is None or not (transfer.num_undone or transfer.manifest):
            transfer.progress_at = now
            return
        stalled_s = now - transfer.progress_at
        if stalled_s > options.decide_s:
            self._stall(transfer)
        elif stalled_s > options.stall_s and now - transfer.queried_at > options.stall_s:
            transfer.queried_at = now
            self._stats["stalls"] += 1
            if transfer.manifest is not None:
                connection.send(Kind.MANIFEST, handle.transfer_id, transfer.manifest)
            connection.send(Kind.PING, handle.transfer_id)

    def _stall(self, transfer: Outgoing) -> None:
        logger.warning(
            "%s: no progress towards %s", transfer.handle.request_id, transfer.handle.peer
        )
        self._end(transfer, Failed(transfer.handle, "stalled"), abort_reason="stalled")

    def _repeat_aborts(self, now: float) -> None:
        for transfer_id, (connection, reason, sent_at) in list(self._aborting.items()):
            if now - sent_at > self._options.stall_s:
                self._send_abort(transfer_id, connection, reason)

    def _ping(self, now: float) -> None:
        """A sign of life on every connection that has something open, which also asks for one."""
        if now - self._pinged_at < self._options.stall_s / 2:
            return
        self._pinged_at = now
        busy = {id(t.connection): t.connection for t in self._transfers.values()}
        for connection in busy.values():
            if connection.is_up:
                connection.send(Kind.PING, 0)

    def _close(self) -> None:
        for transfer in list(self._transfers.values()):
            self._end(transfer, Failed(transfer.handle, "draining"), abort_reason="draining")
        for connection in self._connections.values():
            connection.close()
