"""The prefill's end of the transfer: reserves room, ships pieces as they become final, holds until
the commit.

The engine thread calls the public methods, none of which waits; everything else, gathering and
hashing included, runs on the endpoint's own I/O thread.
"""

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import zmq
from google.protobuf.message import Message

from scission.common.cache.storage import Bytes, CacheStorage, Mark, RowPlace
from scission.common.errors import TransferError
from scission.common.transfer.connection import Connection
from scission.common.transfer.copiers import Copiers
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
from scission.common.transfer.plan import (
    ChunkRows,
    Piece,
    add_piece,
    check_slot_bytes,
    final_chunks,
    piece_chunks,
)
from scission.common.transfer.sockets import Context
from scission.common.transfer.wire import VERSION, Header, Kind, seal, start_hash
from scission.protos import transfer_pb2

logger = logging.getLogger(__name__)

TICK_S = 0.02  # while transfers are open
BLOCKED_S = 0.001  # while a chunk waits for a socket, a staging buffer or the device
CHUNKS_PER_ROUND = 2  # between two looks at the sockets


@dataclass(frozen=True, slots=True)
class _Finish:
    sequences: list[transfer_pb2.Sequence]
    first_token_at: float
    at: float


@dataclass(slots=True)
class _Shipped:
    """A chunk that went out, as it would go out again."""

    chunk: ChunkRows
    slot: int
    hash: int = 0
    is_done: bool = False  # injected, said the receiver


@dataclass(slots=True)
class _Job:
    """A chunk to gather now, and where to."""

    transfer: "_Outgoing"
    shipped: _Shipped
    place: RowPlace
    packed: bytes  # the header, its hash to be filled in
    rows: Bytes  # what is gathered to: in the arena, or in the buffer
    buffer: Bytes | None
    fault: Exception | None = None


@dataclass(slots=True, eq=False)
class _Outgoing:
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
    computing: deque[tuple[Mark | None, Piece | _Finish]] = field(default_factory=deque)
    pieces: list[Piece] = field(default_factory=list)
    chunks: deque[ChunkRows] = field(default_factory=deque)
    credits: list[int] = field(default_factory=list)
    shipped: list[_Shipped] = field(default_factory=list)  # by sequence number
    in_slot: dict[int, int] = field(
        default_factory=dict
    )  # slot -> sequence number it was last filled with
    reship: deque[int] = field(default_factory=deque)
    num_undone: int = 0  # chunks shipped and not known to be injected
    num_bytes: int = 0
    finish: _Finish | None = None
    is_final_planned: bool = False
    manifest: transfer_pb2.Manifest | None = None  # set: sent
    progress_at: float = 0.0
    queried_at: float = 0.0


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
        self._layout = storage.layout
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
        self._transfers: dict[int, _Outgoing] = {}
        self._connections: dict[Destination, Connection] = {}
        self._aborting: dict[
            int, tuple[Connection, str, float]
        ] = {}  # until ABORT_ACK: reason, sent at
        self._computing: set[_Outgoing] = set()  # with pieces that a device is still writing
        self._turns: deque[int] = deque()  # transfers that may have something to ship
        self._staging = _Staging(options.slot_bytes, options.window_slots)
        self._watched_at = 0.0
        self._pinged_at = 0.0
        num_copiers = options.copy_threads if storage.device.type == "cpu" else 1
        self._copiers = Copiers(num_copiers, f"transfer-{worker_id}")
        self._loop = Loop(f"transfer-{worker_id}", context)
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
        finish = _Finish(sequences, first_token_at, time.monotonic())
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
        self._copiers.close()

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
        transfer = _Outgoing(
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

    def _ask(self, transfer: _Outgoing, now: float) -> None:
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

    def _declare(self, handle: TransferHandle, mark: Mark | None, what: Piece | _Finish) -> None:
        transfer = self._transfers.get(handle.transfer_id)
        if transfer is not None:
            transfer.computing.append((mark, what))
            self._admit(transfer)

    def _admit(self, transfer: _Outgoing) -> None:
        """Take what the device has finished writing; the rest is looked at again soon."""
        computing = transfer.computing
        while computing and (computing[0][0] is None or computing[0][0].query()):
            _, what = computing.popleft()
            if isinstance(what, Piece):
                add_piece(transfer.pieces, what)
            else:
                transfer.finish = what
            self._take_turn(transfer)
        if computing:
            self._computing.add(transfer)
        else:
            self._computing.discard(transfer)

    def _abort(self, handle: TransferHandle, reason: str) -> None:
        transfer = self._transfers.get(handle.transfer_id)
        if transfer is not None:
            self._stats["aborts"] += 1
            self._end(transfer, None, abort_reason=reason)

    def _take_turn(self, transfer: _Outgoing) -> None:
        if transfer.granted_at is not None and transfer.handle.transfer_id not in self._turns:
            self._turns.append(transfer.handle.transfer_id)

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

    def _on_transfer(self, transfer: _Outgoing, kind: Kind, body: Message | None) -> None:
        now = time.monotonic()
        if isinstance(body, transfer_pb2.Grant):
            transfer.is_answered = True
            if transfer.granted_at is None:
                transfer.granted_at = transfer.progress_at = now
                self._credit(transfer, transfer_pb2.Credit(slots=body.slots), now)
                self._emit(Granted(transfer.handle, now - transfer.reserved_at))
                self._take_turn(transfer)
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
            self._take_turn(transfer)

    def _credit(self, transfer: _Outgoing, credit: transfer_pb2.Credit, now: float) -> None:
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
        self._take_turn(transfer)

    def _committed(self, transfer: _Outgoing) -> None:
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

    def _over(self, connection: Connection) -> list[_Outgoing]:
        return [t for t in self._transfers.values() if t.connection is connection]

    def _end(
        self, transfer: _Outgoing, event: SenderEvent | None, abort_reason: str | None = None
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

    # I/O thread: shipping

    def _flush(self) -> bool:
        """Send what sockets had no room for. Returns whether some still have none."""
        blocked = [c for c in self._connections.values() if c.is_blocked]
        for connection in blocked:
            connection.flush()
        return any(connection.is_blocked for connection in blocked)

    def _ship(self) -> bool:
        """Ship a few chunks, turn by turn over the transfers. Returns whether all that could ship
        wait for buffers or sockets.
        """
        num_blocked = 0
        jobs: list[_Job] = []
        while len(jobs) < CHUNKS_PER_ROUND and num_blocked < len(self._turns):
            transfer = self._transfers.get(self._turns[0])
            if transfer is None:
                self._turns.popleft()
                continue
            step = self._next_chunk(transfer)
            if step is None:
                self._turns.popleft()
                if not any(job.transfer is transfer for job in jobs):
                    self._send_manifest(transfer)
                continue
            self._turns.rotate(-1)
            job = self._begin_chunk(transfer, *step)
            if job is None:
                num_blocked += 1
            else:
                jobs.append(job)
        self._ship_jobs(jobs)
        return 0 < len(self._turns) <= num_blocked

    def _next_chunk(self, transfer: _Outgoing) -> tuple[int, ChunkRows, int] | None:
        """(sequence number, rows, slot) of what goes out next; None when nothing can."""
        if transfer.reship:
            sequence = transfer.reship[0]
            shipped = transfer.shipped[sequence]
            return sequence, shipped.chunk, shipped.slot
        if not transfer.chunks:
            self._plan(transfer)
        if not transfer.chunks or not transfer.credits:
            return None
        # the slot that came back last is the warmest in the caches
        return len(transfer.shipped), transfer.chunks[0], transfer.credits[-1]

    def _plan(self, transfer: _Outgoing) -> None:
        max_bytes = min(transfer.connection.slot_bytes, self._options.slot_bytes)
        while transfer.pieces and not transfer.chunks:
            transfer.chunks.extend(piece_chunks(self._layout, transfer.pieces.pop(0), max_bytes))
        if not transfer.chunks and transfer.finish is not None and not transfer.is_final_planned:
            transfer.is_final_planned = True
            transfer.chunks.extend(final_chunks(self._layout, transfer.num_tokens, max_bytes))

    def _begin_chunk(
        self, transfer: _Outgoing, sequence: int, chunk: ChunkRows, slot: int
    ) -> _Job | None:
        """Count the chunk as shipped; None when there is no room for it."""
        connection, source = transfer.connection, transfer.source
        connection.flush()
        if connection.is_blocked:
            return None
        buffer = None
        if connection.arena is not None:
            rows = connection.arena.slot(slot, chunk.num_bytes)
        else:
            buffer = self._staging.take()
            if buffer is None:
                return None
            rows = buffer[: chunk.num_bytes]
        header = Header(
            Kind.CHUNK,
            transfer.handle.transfer_id,
            connection.destination.epoch,
            chunk.component,
            chunk.layers,
            chunk.rows,
            sequence,
            slot,
            chunk.num_bytes,
        )
        place = RowPlace(chunk.component, chunk.layers, chunk.rows, source.block_ids, source.slot)
        shipped = self._record(transfer, sequence, chunk, slot)
        return _Job(transfer, shipped, place, header.pack(), rows, buffer)

    def _record(self, transfer: _Outgoing, sequence: int, chunk: ChunkRows, slot: int) -> _Shipped:
        self._stats["chunks"] += 1
        self._stats["bytes"] += chunk.num_bytes
        if transfer.reship and transfer.reship[0] == sequence:
            transfer.reship.popleft()
            self._stats["reships"] += 1
            return transfer.shipped[sequence]
        shipped = _Shipped(chunk, slot)
        transfer.progress_at = time.monotonic()
        transfer.credits.pop()
        transfer.chunks.popleft()
        transfer.shipped.append(shipped)
        transfer.in_slot[slot] = sequence
        transfer.num_undone += 1
        transfer.num_bytes += chunk.num_bytes
        return shipped

    def _ship_jobs(self, jobs: list[_Job]) -> None:
        """Gather and hash, on all copiers, then send."""
        waiting = deque(jobs)

        def work() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    self._gather(waiting.popleft())

        self._copiers.run(work, len(jobs))
        touched: dict[int, Connection] = {}
        for job in jobs:
            transfer, fault = job.transfer, job.fault
            if fault is not None or transfer.handle.transfer_id not in self._transfers:
                if job.buffer is not None:
                    self._staging.give_back(job.buffer)
                if fault is not None:
                    self._fault(transfer, fault)
                continue
            connection = transfer.connection
            frame = None
            if job.buffer is not None:
                frame = zmq.Frame(job.rows, track=True, copy=False)
                self._staging.lend(job.buffer, frame.tracker)
            connection.send_chunk(seal(job.packed, job.shipped.hash), frame)
            touched[id(connection)] = connection
        for connection in touched.values():
            connection.flush()
        for transfer in {id(job.transfer): job.transfer for job in jobs}.values():
            if transfer.handle.transfer_id in self._transfers:
                self._send_manifest(transfer)

    def _gather(self, job: _Job) -> None:
        hasher = start_hash(job.packed)
        try:
            self._storage.read_rows(job.place, job.rows, hasher.update)
        except Exception as error:
            job.fault = error
        else:
            job.shipped.hash = hasher.intdigest()

    def _fault(self, transfer: _Outgoing, fault: Exception) -> None:
        """This request's own fault (a source that is too short): the others go on."""
        if transfer.handle.transfer_id in self._transfers:
            logger.error("%s: cannot read the state", transfer.handle.request_id, exc_info=fault)
            self._end(transfer, Failed(transfer.handle, "internal"), abort_reason="internal")

    def _send_manifest(self, transfer: _Outgoing) -> None:
        """Once everything has gone out: say what everything was."""
        finish = transfer.finish
        if finish is None or transfer.manifest is not None or not transfer.is_final_planned:
            return
        if transfer.pieces or transfer.chunks or transfer.reship:
            return
        expected = self._layout.shipped_bytes(transfer.num_tokens)
        if transfer.num_bytes != expected:
            logger.error(
                "%s: %d bytes of state were declared ready, the layout has %d",
                transfer.handle.request_id,
                transfer.num_bytes,
                expected,
            )
            self._end(transfer, Failed(transfer.handle, "incomplete"), abort_reason="incomplete")
            return
        now = time.monotonic()
        transfer.manifest = transfer_pb2.Manifest(
            num_chunks=len(transfer.shipped),
            num_bytes=transfer.num_bytes,
            chunk_hashes=[shipped.hash for shipped in transfer.shipped],
            sequences=finish.sequences,
            num_tokens=transfer.num_tokens,
            first_token_age_s=now - finish.first_token_at,
        )
        transfer.progress_at = now
        transfer.connection.send(Kind.MANIFEST, transfer.handle.transfer_id, transfer.manifest)

    # I/O thread: time

    def _tick(self, now: float) -> float:
        for transfer in list(self._computing):
            self._admit(transfer)
        is_blocked = self._flush()
        is_blocked |= self._ship()
        if now - self._watched_at >= TICK_S:
            self._watched_at = now
            self._watch_all(now)
        if is_blocked:
            return BLOCKED_S
        if self._turns:
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

    def _watch(self, transfer: _Outgoing, now: float) -> None:
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

    def _stall(self, transfer: _Outgoing) -> None:
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


class _Staging:
    """Buffers for rows in message frames; one is free again once ZeroMQ has let go of it."""

    def __init__(self, size: int, count: int) -> None:
        self._size = size
        self._room = count  # buffers still to be made
        self._free: list[Bytes] = []
        self._lent: deque[tuple[Bytes, zmq.MessageTracker]] = deque()

    def take(self) -> Bytes | None:
        while self._lent and self._lent[0][1].done:
            self._free.append(self._lent.popleft()[0])
        if self._free:
            return self._free.pop()
        if self._room:
            self._room -= 1
            return np.empty(self._size, np.uint8)
        return None

    def give_back(self, buffer: Bytes) -> None:
        """Nothing was sent from it."""
        self._free.append(buffer)

    def lend(self, buffer: Bytes, tracker: zmq.MessageTracker) -> None:
        """The buffer is free once the tracker of the frame over it is done."""
        self._lent.append((buffer, tracker))
