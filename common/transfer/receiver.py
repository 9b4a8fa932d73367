"""The decode's end of the transfer: takes reservations, checks and injects chunks, commits.

The I/O thread receives, validates and keeps the clock; the engine thread decides grants and calls
`inject`, which hashes what it writes. Policy (who gets room) is the engine's.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import zmq
from google.protobuf.message import Message

from scission.common.cache.layout import first_mismatch
from scission.common.cache.storage import CacheStorage, RowPlace
from scission.common.errors import WireError
from scission.common.transfer.arena import (
    PREFIX,
    Arena,
    SlotState,
    SlotTable,
    is_locked,
    remove_stale,
)
from scission.common.transfer.copiers import Copiers
from scission.common.transfer.events import (
    Aborted,
    Failed,
    Ready,
    ReceiverEvent,
    ReserveRequested,
    TransferHandle,
    known_reason,
)
from scission.common.transfer.loop import IDLE_S, Loop
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.plan import ChunkRows, Coverage, check_slot_bytes
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
from scission.common.transfer.wire import (
    HEADER,
    VERSION,
    Header,
    Kind,
    pack_control,
    start_hash,
    unpack_control,
)
from scission.protos import transfer_pb2

logger = logging.getLogger(__name__)

TICK_S = 0.02  # while transfers are open
FIRST_SLOTS = 2  # that a transfer gets with its grant; more as it uses them
MAX_SESSIONS = 1024
MAX_ENDED = 1024  # transfers a session remembers after their end
MAX_OUTBOX = 1000  # control messages that wait for room in the socket
MESSAGES_PER_ROUND = 64  # from one socket, between two looks at the others
# `inject` gives credit back this often: each time wakes the I/O thread and costs a message
REPORT_BYTES = 4 << 20


@dataclass(slots=True, eq=False)
class _Session:
    """One connection of one prefill."""

    number: int
    identity: bytes
    worker_id: str
    epoch: int
    tier: transfer_pb2.Tier | None  # None until the proof came
    lease: Path | None = None
    last_heard: float = 0.0
    is_lost: bool = False  # the connection is gone; the process perhaps not
    transfers: dict[int, "_Incoming"] = field(default_factory=dict)
    ended: OrderedDict[int, None] = field(default_factory=OrderedDict)
    aborting: dict[int, "_Incoming"] = field(
        default_factory=dict
    )  # slots in quarantine until ABORT_ACK
    outbox: deque[list[bytes]] = field(default_factory=deque)

    def remember(self, transfer_id: int) -> None:
        """This transfer has ended: what still comes of it is late."""
        self.ended[transfer_id] = None
        if len(self.ended) > MAX_ENDED:
            self.ended.popitem(last=False)


@dataclass(slots=True, eq=False)
class _Incoming:
    """One transfer, on the I/O thread; also the owner of its slots."""

    handle: TransferHandle
    session: _Session
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
    inject_s: float = 0.0  # that the engine thread spent on its chunks
    is_ready: bool = False
    is_committed: bool = False
    is_acknowledged: bool = False
    progress_at: float = 0.0
    told_at: float = 0.0  # last COMMIT, ABORT or RESHIP for missing chunks
    end_reason: str = ""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """An arrived chunk on its way to the engine thread."""

    incoming: _Incoming
    packed: bytes  # the header as it came
    header: Header
    rows: ChunkRows
    frame: zmq.Frame | None  # None: the rows lie in the arena slot


@dataclass(frozen=True, slots=True)
class _Injected:
    """What became of a chunk on the engine thread."""

    chunk: _Chunk
    is_sound: bool
    seconds: float


@dataclass(slots=True)
class _Budget:
    """Bytes that one call of `inject` may write, shared by the copying threads."""

    total: int
    taken: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class _Grant:
    block_ids: list[int]
    slot: int


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
        self._storage = storage
        self._layout = storage.layout
        self._digest = dict(layout_digest)
        self._worker_id = worker_id
        self._epoch = epoch
        self._options = options
        self._wake = wake
        self._events: deque[ReceiverEvent] = deque()
        self._chunks: deque[_Chunk] = deque()
        self._grants: dict[TransferHandle, _Grant] = {}
        # on a device the copies are its own, in the order of this thread's work
        num_copiers = options.copy_threads if storage.device.type == "cpu" else 1
        self._copiers = Copiers(num_copiers, f"transfer-{worker_id}")
        self._private = deque(np.empty(options.slot_bytes, np.uint8) for _ in range(num_copiers))
        self._stats: Counter[str] = Counter()
        # below: the I/O thread's
        self._slots = SlotTable(options.num_slots)
        self._sessions: dict[bytes, _Session] = {}
        self._by_request: dict[str, _Incoming] = {}
        self._hungry: OrderedDict[_Incoming, None] = OrderedDict()  # granted, without a slot
        self._owed: set[_Incoming] = set()  # credit to announce
        self._num_sessions = 0
        self._watched_at = 0.0
        self._pinged_at = 0.0
        self._loop = Loop(f"transfer-{worker_id}", context)
        self._open_sockets()
        self._loop.start(self._tick, self._close)

    def _open_sockets(self) -> None:
        options, context = self._options, self._loop.context
        self._authenticator: Authenticator | None = None
        if options.curve is not None:
            self._authenticator = Authenticator(context, options.curve)
            self._loop.register(self._authenticator.socket, self._authenticator.answer)
        self._control = control_socket(context, options, None)
        bound = bind(self._control, options.bind)
        self._loop.register(self._control, self._receive_control)
        self.address = with_host(bound, options.advertise_host)
        self._bulk_addresses: list[str] = []
        self._bulk: list[Socket] = []
        for i in range(options.bulk_sockets):
            if bound.startswith("inproc://"):
                address = f"{bound}-bulk{i}"
            else:
                address = with_port(options.bind, "*")
            self._bulk_addresses.append(
                with_host(self._bind_bulk(address, is_shared=False), options.advertise_host)
            )
        self._arena = self._make_arena()
        self._ipc_path: Path | None = None
        if self._arena is not None:
            self._ipc_path = self._arena.path.with_suffix(".ipc")
            self._bind_bulk(f"ipc://{self._ipc_path}", is_shared=True)
            self._ipc_path.chmod(0o600)

    def _bind_bulk(self, address: str, *, is_shared: bool) -> str:
        socket = bulk_socket(self._loop.context, self._options, None)
        bound = bind(socket, address)
        self._bulk.append(socket)
        self._loop.register(socket, partial(self._receive_bulk, socket, is_shared))
        return bound

    def _make_arena(self) -> Arena | None:
        options = self._options
        if options.arena_dir is None:
            return None
        try:
            remove_stale(options.arena_dir)
            return Arena.create(
                options.arena_dir, self._epoch, options.slot_bytes, options.num_slots
            )
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
                self._grants.pop(event.handle, None)
            events.append(event)
        return events

    def grant(self, handle: TransferHandle, block_ids: list[int], slot: int) -> None:
        """Give the transfer room: blocks for its tokens and a clean state slot, in no running
        sequence's table.
        """
        self._grants[handle] = _Grant(list(block_ids), slot)
        self._loop.call(partial(self._for_transfer, handle, self._grant))

    def wait(self, handle: TransferHandle, position: int) -> None:
        """Tell the prefill that it stands in line; a grant, a refusal or an abort follows."""
        self._loop.call(partial(self._for_transfer, handle, partial(self._wait, position)))

    def refuse(
        self, handle: TransferHandle, reason: str, field: str = "", detail: str = ""
    ) -> None:
        refuse = transfer_pb2.Refuse(reason=reason, field=field, detail=detail)
        self._loop.call(partial(self._for_transfer, handle, partial(self._refuse, refuse)))

    def inject(self, budget_bytes: int) -> int:
        """Check and write waiting chunks into their blocks and slots, at least one, until the
        budget is spent.

        Returns the bytes written. Their arena slots go back to the senders at once.
        """
        budget = _Budget(budget_bytes)

        def work() -> None:
            done: list[_Injected] = []
            unreported = 0
            while (job := self._next_job(budget)) is not None:
                done.append(self._inject(*job))
                unreported += job[0].rows.num_bytes
                if unreported >= REPORT_BYTES:
                    self._loop.call(partial(self._take_injected, done))
                    done, unreported = [], 0
            if done:
                self._loop.call(partial(self._take_injected, done))

        self._copiers.run(work, min(len(self._chunks), budget_bytes // REPORT_BYTES))
        return budget.taken

    def _next_job(self, budget: _Budget) -> tuple[_Chunk, _Grant] | None:
        """The next chunk and its place, while the budget lasts; on any of the copying threads."""
        with budget.lock:
            while self._chunks and (budget.taken < budget.total or budget.taken == 0):
                chunk = self._chunks.popleft()
                grant = self._grants.get(chunk.incoming.handle)
                if grant is not None:
                    budget.taken += chunk.rows.num_bytes
                    return chunk, grant
        return None

    @property
    def has_chunks(self) -> bool:
        """Whether `inject` has something to do."""
        return bool(self._chunks)

    def commit(self, handle: TransferHandle) -> None:
        """Take the request over, after Ready: the prefill may forget it. Repeated until it
        acknowledges.
        """
        self._grants.pop(handle, None)
        self._loop.call(partial(self._for_transfer, handle, self._commit))

    def abort(self, handle: TransferHandle, reason: str) -> None:
        """Withdraw, at any time before the commit; nothing is written to the granted rows from here
        on.
        """
        self._grants.pop(handle, None)
        self._loop.call(
            partial(self._for_transfer, handle, lambda t: self._end(t, None, abort_reason=reason))
        )

    def counts(self) -> dict[str, int]:
        """Arena slots by state (free, granted, filled, quarantined) and their total, which
        is their sum.
        """
        return self._slots.counts()

    def check(self) -> None:
        """Assert that every arena slot is in exactly one place; waits for the I/O thread."""
        self._loop.ask(self._slots.check)

    def stats(self) -> dict[str, int]:
        """Running totals: injected chunks and bytes, damaged, re-shipped, dropped messages by
        cause, errors.
        """
        return {**self._stats, "errors": self._loop.num_errors}

    def close(self) -> None:
        """Abort what is open and end the I/O thread."""
        self._loop.stop()
        self._copiers.close()

    def _inject(self, chunk: _Chunk, grant: _Grant) -> _Injected:
        """Write the chunk's rows; sound when what was written has the hash it should.

        Damaged rows may be written too: nothing reads a request's rows before all are sound, and no
        other chunk can claim them meanwhile.
        """
        started = time.monotonic()
        rows, header = chunk.rows, chunk.header
        place = RowPlace(rows.component, rows.layers, rows.rows, grant.block_ids, grant.slot)
        hasher = start_hash(chunk.packed)
        if chunk.frame is not None:
            data = np.frombuffer(chunk.frame.buffer, np.uint8)
            self._storage.write_rows(place, data, hasher.update)
        else:
            assert self._arena is not None
            data = self._arena.slot(header.slot, rows.num_bytes)
            # the sender can still write to the slot: what is hashed must be out of its reach
            private = self._private.pop()
            self._storage.write_rows(place, data, hasher.update, private[: rows.num_bytes])
            self._private.append(private)
        is_sound = hasher.intdigest() == header.hash
        return _Injected(chunk, is_sound, time.monotonic() - started)

    # I/O thread: commands

    def _emit(self, event: ReceiverEvent) -> None:
        self._events.append(event)
        self._wake()

    def _for_transfer(self, handle: TransferHandle, function: Callable[[_Incoming], None]) -> None:
        """Run the engine's decision on an open transfer; one that has ended meanwhile needs
        none.
        """
        for session in self._sessions.values():
            if session.number == handle.connection:
                transfer = session.transfers.get(handle.transfer_id)
                if transfer is not None:
                    function(transfer)
                return

    def _grant(self, transfer: _Incoming) -> None:
        if transfer.coverage is not None:
            return
        now = time.monotonic()
        transfer.coverage = Coverage(self._layout, transfer.num_tokens)
        transfer.granted_at = transfer.progress_at = now
        slots = self._take_slots(transfer, FIRST_SLOTS)
        if not slots:
            self._hungry[transfer] = None
        self._send_grant(transfer, slots)

    def _send_grant(self, transfer: _Incoming, slots: list[int]) -> None:
        grant = transfer_pb2.Grant(slots=slots, num_ranks=1)
        self._send(transfer.session, Kind.GRANT, transfer.handle.transfer_id, grant)

    def _wait(self, position: int, transfer: _Incoming) -> None:
        transfer.wait = position
        wait = transfer_pb2.Wait(position=position)
        self._send(transfer.session, Kind.WAIT, transfer.handle.transfer_id, wait)

    def _refuse(self, refuse: transfer_pb2.Refuse, transfer: _Incoming) -> None:
        self._forget(transfer)
        self._send(transfer.session, Kind.REFUSE, transfer.handle.transfer_id, refuse)

    def _commit(self, transfer: _Incoming) -> None:
        assert transfer.is_ready, "commit() before Ready"
        transfer.is_committed = True
        self._send_commit(transfer, time.monotonic())

    def _send_commit(self, transfer: _Incoming, now: float) -> None:
        transfer.told_at = now
        self._send(transfer.session, Kind.COMMIT, transfer.handle.transfer_id)

    def _take_injected(self, done: list[_Injected]) -> None:
        """The engine thread is done with these chunks."""
        for injected in done:
            self._injected(injected.chunk, injected.is_sound, injected.seconds)

    def _injected(self, chunk: _Chunk, is_sound: bool, seconds: float) -> None:
        transfer, sequence, slot = chunk.incoming, chunk.header.sequence, chunk.header.slot
        coverage = transfer.coverage
        if transfer.end_reason or coverage is None:
            return
        transfer.arrived.discard(sequence)
        transfer.inject_s += seconds
        if not is_sound:
            self._stats["damaged"] += 1
            coverage.release(chunk.rows)
            self._slots.mark(transfer, slot, SlotState.GRANTED)
            self._ask_again(transfer, [sequence])
            return
        self._stats["injected_chunks"] += 1
        self._stats["injected_bytes"] += chunk.rows.num_bytes
        transfer.progress_at = time.monotonic()
        transfer.injected[sequence] = chunk.header.hash
        transfer.credit_injected.append(sequence)
        self._owed.add(transfer)
        self._recycle(transfer, slot)
        self._check_ready(transfer)

    def _recycle(self, transfer: _Incoming, slot: int) -> None:
        """Decide where an emptied slot goes: back to its transfer, or to one that has none."""
        coverage = transfer.coverage
        assert coverage is not None
        # a chunk that was asked for again may be written to its slot again: such slots stay with
        # the transfer
        is_movable = not transfer.num_reships
        if is_movable and (coverage.is_complete or self._hungry):
            self._slots.free(transfer, [slot])
            if not coverage.is_complete and not self._slots.num_held(transfer):
                self._hungry[transfer] = None
            self._feed()
            return
        self._slots.mark(transfer, slot, SlotState.GRANTED)
        transfer.credit.append(slot)
        if not coverage.is_complete:
            transfer.credit += self._take_slots(transfer, 1)

    def _take_slots(self, transfer: _Incoming, count: int) -> list[int]:
        """Up to `count` free slots, within the window of a transfer."""
        slots: list[int] = []
        while len(slots) < count and self._slots.num_held(transfer) < self._options.window_slots:
            slot = self._slots.take(transfer)
            if slot is None:
                break
            slots.append(slot)
        return slots

    def _feed(self) -> None:
        """Give free slots to transfers that have none, first come first served."""
        while self._hungry and self._slots.num_free:
            transfer, _ = self._hungry.popitem(last=False)
            transfer.credit += self._take_slots(transfer, 1)
            self._owed.add(transfer)

    def _check_ready(self, transfer: _Incoming) -> None:
        manifest, coverage = transfer.manifest, transfer.coverage
        if manifest is None or coverage is None or transfer.is_ready or transfer.arrived:
            return
        if len(transfer.injected) < manifest.num_chunks:
            return
        sequences = range(manifest.num_chunks)
        if not coverage.is_complete or len(transfer.injected) != manifest.num_chunks:
            self._fail(transfer, "incomplete")
        elif any(transfer.injected.get(n) != manifest.chunk_hashes[n] for n in sequences):
            self._fail(transfer, "corrupt")
        else:
            transfer.is_ready = True
            if not transfer.num_reships:
                self._slots.free(transfer, self._slots.granted(transfer))
                self._feed()
            now = time.monotonic()
            seconds = now - transfer.granted_at
            exposed_s = now - transfer.manifest_at + max(0.0, manifest.first_token_age_s)
            self._emit(
                Ready(
                    transfer.handle,
                    manifest,
                    coverage.total_bytes,
                    seconds=seconds,
                    exposed_s=min(seconds, exposed_s),
                    inject_s=transfer.inject_s,
                    tier=self._tier(transfer.session),
                )
            )

    def _tier(self, session: _Session) -> str:
        if session.tier == transfer_pb2.TIER_SHARED:
            return "shared"
        return self.address.split(":", 1)[0]

    def _ask_again(self, transfer: _Incoming, sequences: list[int]) -> None:
        """RESHIP, or the end of a transfer whose chunks will not come whole."""
        transfer.num_reships.update(sequences)
        if max(transfer.num_reships[n] for n in sequences) > self._options.max_reships:
            self._fail(transfer, "corrupt")
            return
        self._stats["reships"] += len(sequences)
        reship = transfer_pb2.Reship(sequence_numbers=sequences)
        self._send(transfer.session, Kind.RESHIP, transfer.handle.transfer_id, reship)

    def _fail(self, transfer: _Incoming, reason: str) -> None:
        logger.warning(
            "%s: transfer from %s failed: %s",
            transfer.handle.request_id,
            transfer.handle.peer,
            reason,
        )
        self._end(transfer, Failed(transfer.handle, reason), abort_reason=reason)

    def _end(
        self, transfer: _Incoming, event: ReceiverEvent | None, abort_reason: str | None = None
    ) -> None:
        """Forget the transfer. With a reason the peer is told until it acknowledges, and the slots
        wait for that; without one it has stopped writing already.
        """
        if transfer.is_committed:
            return
        self._forget(transfer, keep_slots=abort_reason is not None)
        if abort_reason is not None:
            self._stats["aborts"] += 1
            transfer.end_reason = abort_reason
            self._slots.quarantine(transfer)
            transfer.session.aborting[transfer.handle.transfer_id] = transfer
        if event is not None:
            self._emit(event)
        if abort_reason is not None:
            self._send_abort(transfer, time.monotonic())

    def _send_abort(self, transfer: _Incoming, now: float) -> None:
        transfer.told_at = now
        abort = transfer_pb2.Abort(reason=transfer.end_reason)
        self._send(transfer.session, Kind.ABORT, transfer.handle.transfer_id, abort)

    def _forget(self, transfer: _Incoming, *, keep_slots: bool = False) -> None:
        session, handle = transfer.session, transfer.handle
        if session.transfers.pop(handle.transfer_id, None) is None:
            return
        transfer.end_reason = transfer.end_reason or "ended"
        session.remember(handle.transfer_id)
        if self._by_request.get(handle.request_id) is transfer:
            del self._by_request[handle.request_id]
        self._hungry.pop(transfer, None)
        self._owed.discard(transfer)
        if not keep_slots:
            self._slots.free_all(transfer)
            self._feed()

    # I/O thread: messages

    def _send(
        self, session: _Session, kind: Kind, transfer_id: int, body: Message | None = None
    ) -> None:
        """A ROUTER that must deliver says when it cannot: full (wait) or gone (the session is
        over).
        """
        if session.is_lost:
            return
        session.outbox.append(
            [session.identity, *pack_control(kind, transfer_id, self._epoch, body)]
        )
        self._flush(session)
        if len(session.outbox) > MAX_OUTBOX:
            self._lose(session)

    def _flush(self, session: _Session) -> None:
        while session.outbox and not session.is_lost:
            try:
                self._control.send_multipart(session.outbox[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self._lose(session)
                return
            session.outbox.popleft()

    def _lose(self, session: _Session) -> None:
        """The connection is gone: its transfers have failed, and what it may still write stays in
        quarantine.
        """
        if session.is_lost:
            return
        session.is_lost = True
        session.outbox.clear()
        logger.info("%s: connection lost", session.worker_id)
        for transfer in list(session.transfers.values()):
            if transfer.is_committed:
                self._forget(transfer)
            else:
                failed = Failed(transfer.handle, "peer_lost")
                self._end(transfer, failed, abort_reason="peer_lost")
        self._bury(session)

    def _bury(self, session: _Session) -> None:
        """Free a lost session's quarantine once its process cannot write any more."""
        is_shared = session.tier != transfer_pb2.TIER_MESSAGE
        if is_shared and session.lease is not None and is_locked(session.lease):
            return
        for transfer in session.aborting.values():
            self._slots.free_all(transfer)
        session.aborting.clear()
        if session.lease is not None:
            session.lease.unlink(missing_ok=True)
        self._sessions.pop(session.identity, None)
        self._feed()

    def _receive_control(self) -> None:
        for _ in range(MESSAGES_PER_ROUND):
            frames = receive(self._control, copy=True)
            if frames is None:
                return
            try:
                self._on_control(frames[0], *unpack_control(frames[1:]))
            except WireError as error:
                self._stats["dropped_invalid"] += 1
                logger.debug("dropped a control message: %s", error)

    def _on_control(self, identity: bytes, header: Header, body: Message | None) -> None:
        if isinstance(body, transfer_pb2.Hello):
            self._hello(identity, header, body)
            return
        session = self._sessions.get(identity)
        if header.epoch != self._epoch:
            self._stats["dropped_old_epoch"] += 1
            return
        if session is None or session.is_lost:
            self._stats["dropped_unknown"] += 1
            return
        session.last_heard = time.monotonic()
        if isinstance(body, transfer_pb2.ArenaProof):
            self._prove(session, body)
        elif isinstance(body, transfer_pb2.Reserve):
            self._reserve(session, header.transfer_id, body)
        elif isinstance(body, transfer_pb2.Manifest):
            self._on_manifest(session, header.transfer_id, body)
        elif isinstance(body, transfer_pb2.Abort):
            self._on_abort(session, header.transfer_id, body)
        else:
            self._on_signal(session, header)

    def _on_signal(self, session: _Session, header: Header) -> None:
        transfer = session.transfers.get(header.transfer_id)
        match header.kind:
            case Kind.PING if transfer is not None:
                self._report(transfer)
            case Kind.PING:
                self._send(session, Kind.PONG, 0)
            case Kind.COMMIT_ACK:
                if transfer is not None and transfer.is_committed:
                    self._forget(transfer)
            case Kind.ABORT_ACK:
                ended = session.aborting.pop(header.transfer_id, None)
                if ended is not None:
                    self._slots.free_all(ended)
                    self._feed()
            case Kind.PONG:
                pass
            case _:
                self._stats["dropped_invalid"] += 1

    def _hello(self, identity: bytes, header: Header, hello: transfer_pb2.Hello) -> None:
        if identity in self._sessions:
            return  # said twice
        refuse: transfer_pb2.Refuse | None = None
        field = first_mismatch(self._digest, dict(hello.layout_digest))
        if header.epoch != self._epoch:
            refuse = transfer_pb2.Refuse(reason="old_epoch")
        elif hello.protocol_version != VERSION:
            detail = f"version {VERSION} is spoken here, got {hello.protocol_version}"
            refuse = transfer_pb2.Refuse(reason="protocol_version", detail=detail)
        elif field is not None:
            ours, theirs = self._digest.get(field), hello.layout_digest.get(field)
            detail = f"{field} is {ours} here and {theirs} there"
            refuse = transfer_pb2.Refuse(reason="layout_mismatch", field=field, detail=detail)
        elif len(self._sessions) >= MAX_SESSIONS:
            refuse = transfer_pb2.Refuse(reason="full", detail=f"{MAX_SESSIONS} connections")
        self._num_sessions += 1
        session = _Session(
            self._num_sessions,
            identity,
            hello.worker_id,
            hello.epoch,
            transfer_pb2.TIER_MESSAGE,
            last_heard=time.monotonic(),
        )
        if refuse is not None:
            # answered under the epoch that was asked for: the asker drops any other
            self._stats["refused_hellos"] += 1
            frames = pack_control(Kind.REFUSE, 0, header.epoch, refuse)
            session.outbox.append([identity, *frames])
            self._flush(session)
            return
        self._supersede(session)
        welcome = transfer_pb2.Welcome(
            epoch=self._epoch,
            worker_id=self._worker_id,
            slot_bytes=self._options.slot_bytes,
            num_slots=self._options.num_slots,
            bulk_addresses=self._bulk_addresses,
        )
        if self._arena is not None and transfer_pb2.TIER_SHARED in hello.tiers:
            assert self._ipc_path is not None
            session.tier = None
            session.lease = self._arena.path.with_name(
                f"{PREFIX}{self._epoch:016x}-{session.number}.lease"
            )
            welcome.arena_name = self._arena.path.name
            welcome.ipc_name = self._ipc_path.name
            welcome.lease_name = session.lease.name
        self._sessions[identity] = session
        self._send(session, Kind.WELCOME, 0, welcome)

    def _supersede(self, session: _Session) -> None:
        """A worker connects anew: what it had open over an older connection is over."""
        for known in list(self._sessions.values()):
            if known.worker_id != session.worker_id:
                continue
            if known.epoch != session.epoch:
                known.lease = None  # another life of the worker: the old one cannot write any more
            self._lose(known)

    def _prove(self, session: _Session, proof: transfer_pb2.ArenaProof) -> None:
        if session.tier is None:
            assert self._arena is not None and session.lease is not None
            is_shared = proof.nonce == self._arena.nonce and is_locked(session.lease)
            session.tier = transfer_pb2.TIER_SHARED if is_shared else transfer_pb2.TIER_MESSAGE
        decision = transfer_pb2.TierDecision(tier=session.tier)
        self._send(session, Kind.TIER_DECISION, 0, decision)

    def _reserve(self, session: _Session, transfer_id: int, reserve: transfer_pb2.Reserve) -> None:
        now = time.monotonic()
        known = session.transfers.get(transfer_id)
        if known is not None:
            # the answer was lost
            if known.coverage is not None:
                self._send_grant(known, self._slots.granted(known))
            elif known.wait is not None:
                self._wait(known.wait, known)
            return
        if transfer_id in session.ended or session.tier is None or reserve.remaining_ms == 0:
            self._stats["dropped_late"] += 1
            return
        refuse = self._objection(reserve)
        rival = self._by_request.get(reserve.request_id)
        if rival is not None and rival.handle.attempt > reserve.attempt:
            refuse = transfer_pb2.Refuse(reason="superseded")
        if refuse is not None:
            self._send(session, Kind.REFUSE, transfer_id, refuse)
            return
        if rival is not None and not rival.is_committed:
            aborted = Aborted(rival.handle, "superseded")
            self._end(rival, aborted, abort_reason="superseded")
        handle = TransferHandle(
            transfer_id, reserve.request_id, reserve.attempt, session.worker_id, session.number
        )
        deadline = now + reserve.remaining_ms / 1000
        transfer = _Incoming(handle, session, reserve.num_tokens, deadline, opened_at=now)
        session.transfers[transfer_id] = transfer
        self._by_request[reserve.request_id] = transfer
        self._emit(ReserveRequested(handle, reserve.num_tokens, reserve.num_sequences, deadline))

    def _objection(self, reserve: transfer_pb2.Reserve) -> transfer_pb2.Refuse | None:
        """Why this reservation cannot even be asked of the engine."""
        num_open = sum(len(session.transfers) for session in self._sessions.values())
        if num_open >= self._options.max_transfers:
            return transfer_pb2.Refuse(reason="full", detail=f"{num_open} transfers are open")
        # block 0 is scratch
        max_tokens = (self._storage.num_blocks - 1) * self._layout.block_size
        if not 0 < reserve.num_tokens <= max_tokens or not reserve.num_sequences:
            detail = f"{reserve.num_tokens} tokens of at most {max_tokens}"
            return transfer_pb2.Refuse(reason="too_large", detail=detail)
        return None

    def _on_manifest(
        self, session: _Session, transfer_id: int, manifest: transfer_pb2.Manifest
    ) -> None:
        transfer = session.transfers.get(transfer_id)
        if transfer is None or transfer.coverage is None:
            self._stats["dropped_late"] += 1
            return
        if transfer.manifest is not None:
            return  # said twice
        if (
            manifest.num_chunks != len(manifest.chunk_hashes)
            or manifest.num_tokens != transfer.num_tokens
            or manifest.num_bytes != transfer.coverage.total_bytes
        ):
            self._fail(transfer, "protocol")
            return
        transfer.manifest = manifest
        transfer.manifest_at = transfer.progress_at = time.monotonic()
        self._check_ready(transfer)

    def _on_abort(self, session: _Session, transfer_id: int, abort: transfer_pb2.Abort) -> None:
        transfer = session.transfers.get(transfer_id)
        if transfer is not None:
            self._stats["peer_aborts"] += 1
            if transfer.is_committed:
                self._forget(transfer)
            else:
                self._end(transfer, Aborted(transfer.handle, known_reason(abort.reason)))
        session.remember(transfer_id)  # also one whose RESERVE is still to come
        self._send(session, Kind.ABORT_ACK, transfer_id)

    def _report(self, transfer: _Incoming) -> None:
        """Answer a sender that hears nothing: all that is its to fill, all that was injected."""
        self._send(
            transfer.session,
            Kind.CREDIT,
            transfer.handle.transfer_id,
            transfer_pb2.Credit(
                slots=self._slots.granted(transfer), injected=sorted(transfer.injected)
            ),
        )

    # I/O thread: chunks

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
                    num_taken += self._on_chunk(identity, packed, None if is_shared else frames[2])
                except WireError as error:
                    self._stats["dropped_invalid"] += 1
                    logger.debug("dropped a chunk: %s", error)
        if num_taken:
            self._wake()

    def _on_chunk(self, identity: bytes, packed: bytes, frame: zmq.Frame | None) -> bool:
        """Validate a chunk in every field and queue it; False for one that comes late or again.

        Raises WireError where it is not in order.
        """
        header = Header.unpack(packed)
        is_shared = frame is None
        if header.kind is not Kind.CHUNK:
            raise WireError(f"{header.kind.name} came over a bulk socket")
        if header.epoch != self._epoch:
            self._stats["dropped_old_epoch"] += 1
            return False
        session = self._sessions.get(identity[:-1])
        transfer = session.transfers.get(header.transfer_id) if session is not None else None
        if session is None or transfer is None or transfer.coverage is None or transfer.is_ready:
            self._stats["dropped_late"] += 1
            return False
        if (session.tier == transfer_pb2.TIER_SHARED) != is_shared:
            raise WireError("a chunk of the other tier")
        sequence = header.sequence
        if sequence in transfer.injected or sequence in transfer.arrived:
            self._stats["dropped_duplicate"] += 1
            return False
        if header.length > self._options.slot_bytes:
            raise WireError(f"{header.length} bytes in a slot of {self._options.slot_bytes}")
        if frame is not None and len(frame.buffer) != header.length:
            raise WireError(f"{len(frame.buffer)} bytes of {header.length}")
        if self._slots.state(transfer, header.slot) is not SlotState.GRANTED:
            raise WireError(f"slot {header.slot} is not granted")
        rows = ChunkRows(header.component, header.layers, header.rows, header.length)
        transfer.coverage.claim(rows)
        now = time.monotonic()
        session.last_heard = transfer.progress_at = now
        transfer.arrived.add(sequence)
        self._slots.mark(transfer, header.slot, SlotState.FILLED)
        self._chunks.append(_Chunk(transfer, packed, header, rows, frame))
        return True

    # I/O thread: time

    def _tick(self, now: float) -> float:
        self._announce()
        if now - self._watched_at >= TICK_S:
            self._watched_at = now
            self._watch_all(now)
        is_busy = any(s.transfers or s.aborting for s in self._sessions.values())
        return TICK_S if is_busy else IDLE_S

    def _announce(self) -> None:
        """Send the credit that this round gave: one message a transfer."""
        owed, self._owed = self._owed, set()
        for transfer in owed:
            credit = transfer_pb2.Credit(slots=transfer.credit, injected=transfer.credit_injected)
            transfer.credit, transfer.credit_injected = [], []
            self._send(transfer.session, Kind.CREDIT, transfer.handle.transfer_id, credit)

    def _watch_all(self, now: float) -> None:
        is_ping_due = now - self._pinged_at > self._options.stall_s / 2
        if is_ping_due:
            self._pinged_at = now
        for session in list(self._sessions.values()):
            if session.is_lost:
                if is_ping_due:
                    self._bury(session)
                continue
            self._flush(session)
            for transfer in list(session.transfers.values()):
                if transfer.handle.transfer_id in session.transfers:
                    self._watch(transfer, now)
            for transfer in list(session.aborting.values()):
                if now - transfer.told_at > self._options.stall_s:
                    self._send_abort(transfer, now)
            if is_ping_due:
                # also tells whether the connection still stands
                self._send(session, Kind.PING, 0)

    def _watch(self, transfer: _Incoming, now: float) -> None:
        options, session = self._options, transfer.session
        if transfer.is_committed:
            if now - transfer.told_at > options.stall_s / 4:
                self._send_commit(transfer, now)
            return
        if now >= transfer.deadline:
            self._fail(transfer, "deadline")
            return
        if now - max(session.last_heard, transfer.opened_at) > options.decide_s:
            self._fail(transfer, "stalled")
            return
        # a prefill that lives may compute as long as it likes; once it said that all is shipped,
        # all must come
        if transfer.manifest is None or transfer.is_ready or transfer.arrived:
            return
        stalled_s = now - transfer.progress_at
        if stalled_s > options.decide_s:
            self._fail(transfer, "stalled")
        elif stalled_s > options.stall_s and now - transfer.told_at > options.stall_s:
            transfer.told_at = now
            missing = [n for n in range(transfer.manifest.num_chunks) if n not in transfer.injected]
            if missing:
                self._ask_again(transfer, missing)

    def _close(self) -> None:
        for session in list(self._sessions.values()):
            for transfer in list(session.transfers.values()):
                self._end(transfer, Failed(transfer.handle, "draining"), abort_reason="draining")
        for socket in (self._control, *self._bulk):
            self._loop.unregister(socket)
            socket.close()
        if self._authenticator is not None:
            self._authenticator.socket.close()
        for session in self._sessions.values():
            if session.lease is not None:
                session.lease.unlink(missing_ok=True)
        if self._arena is not None:
            self._arena.remove()
            self._arena.close()
        if self._ipc_path is not None:
            self._ipc_path.unlink(missing_ok=True)
