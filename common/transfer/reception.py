"""The life of transfers at the decode's end, RESERVE to commit: messages, arrivals, clocks.

Lives on the I/O thread. What it decides itself is protocol only; grants are the engine's.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable

import zmq
from google.protobuf.message import Message

from scission.common.cache.storage import CacheStorage
from scission.common.errors import WireError
from scission.common.transfer.arena import SlotState, SlotTable
from scission.common.transfer.device_injector import DeviceInjector
from scission.common.transfer.events import (
    Aborted,
    Failed,
    Ready,
    ReceiverEvent,
    ReserveRequested,
    TransferHandle,
    known_reason,
)
from scission.common.transfer.incoming import Chunk, Incoming, Injected, Session
from scission.common.transfer.injector import Injector
from scission.common.transfer.loop import IDLE_S
from scission.common.transfer.peers import Endpoint, Peers
from scission.common.transfer.plan import ChunkRows, Coverage
from scission.common.transfer.slot_credit import SlotCredit
from scission.common.transfer.sockets import Socket
from scission.common.transfer.wire import Header, Kind
from scission.protos import transfer_pb2

logger = logging.getLogger(__name__)

TICK_S = 0.02  # while transfers are open


class Reception:
    """Every open transfer, and which message, chunk or lapse of time moves it on."""

    def __init__(
        self,
        endpoint: Endpoint,
        control: Socket,
        storage: CacheStorage,
        injector: Injector | DeviceInjector,
        stats: Counter[str],
        emit: Callable[[ReceiverEvent], None],
    ) -> None:
        self._endpoint = endpoint
        self._layout = storage.layout
        # block 0 is scratch
        self._max_tokens = (storage.num_blocks - 1) * storage.layout.block_size
        self._injector = injector
        self._stats = stats
        self._emit = emit
        self.slots = SlotTable(endpoint.options.num_slots)
        self._credit = SlotCredit(self.slots, endpoint.options.window_slots, self._send_credit)
        self._peers = Peers(endpoint, control, stats, self._lose_all, self._credit.free_all)
        self._by_request: dict[str, Incoming] = {}
        self._watched_at = 0.0
        self._pinged_at = 0.0

    # what the engine decided

    def for_transfer(self, handle: TransferHandle, function: Callable[[Incoming], None]) -> None:
        """Run the engine's decision on an open transfer; one that has ended meanwhile needs
        none.
        """
        session = self._peers.numbered(handle.connection)
        transfer = session.transfers.get(handle.transfer_id) if session is not None else None
        if transfer is not None:
            function(transfer)

    def grant(self, transfer: Incoming) -> None:
        if transfer.coverage is not None:
            return
        now = time.monotonic()
        transfer.coverage = Coverage(self._layout, transfer.num_tokens)
        transfer.granted_at = transfer.progress_at = now
        self._send_grant(transfer, self._credit.begin(transfer))

    def _send_grant(self, transfer: Incoming, slots: list[int]) -> None:
        grant = transfer_pb2.Grant(slots=slots, num_ranks=1)
        self._peers.send(transfer.session, Kind.GRANT, transfer.handle.transfer_id, grant)

    def wait(self, position: int, transfer: Incoming) -> None:
        transfer.wait = position
        wait = transfer_pb2.Wait(position=position)
        self._peers.send(transfer.session, Kind.WAIT, transfer.handle.transfer_id, wait)

    def refuse(self, refuse: transfer_pb2.Refuse, transfer: Incoming) -> None:
        self._forget(transfer)
        self._peers.send(transfer.session, Kind.REFUSE, transfer.handle.transfer_id, refuse)

    def commit(self, transfer: Incoming) -> None:
        assert transfer.is_ready, "commit() before Ready"
        transfer.is_committed = True
        self._send_commit(transfer, time.monotonic())

    def _send_commit(self, transfer: Incoming, now: float) -> None:
        transfer.told_at = now
        self._peers.send(transfer.session, Kind.COMMIT, transfer.handle.transfer_id)

    def abort(self, transfer: Incoming, reason: str) -> None:
        """Withdraw, before the commit."""
        self._end(transfer, None, abort_reason=reason)

    def take_injected(self, done: list[Injected]) -> None:
        """These chunks are written, or must come again."""
        for injected in done:
            self._injected(injected.chunk, injected.is_sound, injected.seconds)

    def _injected(self, chunk: Chunk, is_sound: bool, seconds: float) -> None:
        transfer, sequence, slot = chunk.incoming, chunk.header.sequence, chunk.header.slot
        coverage = transfer.coverage
        if transfer.end_reason or coverage is None:
            return
        transfer.arrived.discard(sequence)
        transfer.inject_s += seconds
        if not is_sound:
            self._stats["damaged"] += 1
            coverage.release(chunk.rows)
            self.slots.mark(transfer, slot, SlotState.GRANTED)
            self._ask_again(transfer, [sequence])
            return
        self._stats["injected_chunks"] += 1
        self._stats["injected_bytes"] += chunk.rows.num_bytes
        transfer.progress_at = time.monotonic()
        transfer.injected[sequence] = chunk.header.hash
        self._credit.injected(transfer, sequence, slot)
        self._check_ready(transfer)

    def _check_ready(self, transfer: Incoming) -> None:
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
                self._credit.free_granted(transfer)
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

    def _tier(self, session: Session) -> str:
        if session.tier == transfer_pb2.TIER_SHARED:
            return "shared"
        return self._endpoint.address.split(":", 1)[0]

    def _ask_again(self, transfer: Incoming, sequences: list[int]) -> None:
        """RESHIP, or the end of a transfer whose chunks will not come whole."""
        transfer.num_reships.update(sequences)
        if max(transfer.num_reships[n] for n in sequences) > self._endpoint.options.max_reships:
            self._fail(transfer, "corrupt")
            return
        self._stats["reships"] += len(sequences)
        reship = transfer_pb2.Reship(sequence_numbers=sequences)
        self._peers.send(transfer.session, Kind.RESHIP, transfer.handle.transfer_id, reship)

    # how transfers end

    def _fail(self, transfer: Incoming, reason: str) -> None:
        logger.warning(
            "%s: transfer from %s failed: %s",
            transfer.handle.request_id,
            transfer.handle.peer,
            reason,
        )
        self._end(transfer, Failed(transfer.handle, reason), abort_reason=reason)

    def _end(
        self, transfer: Incoming, event: ReceiverEvent | None, abort_reason: str | None = None
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
            self.slots.quarantine(transfer)
            transfer.session.aborting[transfer.handle.transfer_id] = transfer
        if event is not None:
            self._emit(event)
        if abort_reason is not None:
            self._send_abort(transfer, time.monotonic())

    def _lose_all(self, session: Session) -> None:
        """The session's connection is gone: what has not been committed has failed."""
        for transfer in list(session.transfers.values()):
            if transfer.is_committed:
                self._forget(transfer)
            else:
                failed = Failed(transfer.handle, "peer_lost")
                self._end(transfer, failed, abort_reason="peer_lost")

    def _send_abort(self, transfer: Incoming, now: float) -> None:
        transfer.told_at = now
        abort = transfer_pb2.Abort(reason=transfer.end_reason)
        self._peers.send(transfer.session, Kind.ABORT, transfer.handle.transfer_id, abort)

    def _forget(self, transfer: Incoming, *, keep_slots: bool = False) -> None:
        session, handle = transfer.session, transfer.handle
        if session.transfers.pop(handle.transfer_id, None) is None:
            return
        transfer.end_reason = transfer.end_reason or "ended"
        session.remember(handle.transfer_id)
        if self._by_request.get(handle.request_id) is transfer:
            del self._by_request[handle.request_id]
        self._credit.forget(transfer)
        if not keep_slots:
            self._credit.free_all(transfer)

    def end_all(self) -> None:
        """This receiver closes."""
        for session in list(self._peers.sessions.values()):
            for transfer in list(session.transfers.values()):
                self._end(transfer, Failed(transfer.handle, "draining"), abort_reason="draining")
        for session in self._peers.sessions.values():
            if session.lease is not None:
                session.lease.unlink(missing_ok=True)

    # messages

    def on_control(self, identity: bytes, header: Header, body: Message | None) -> None:
        if isinstance(body, transfer_pb2.Hello):
            self._peers.hello(identity, header, body)
            return
        session = self._peers.sessions.get(identity)
        if header.epoch != self._endpoint.epoch:
            self._stats["dropped_old_epoch"] += 1
            return
        if session is None or session.is_lost:
            self._stats["dropped_unknown"] += 1
            return
        session.last_heard = time.monotonic()
        if isinstance(body, transfer_pb2.ArenaProof):
            self._peers.prove(session, body)
        elif isinstance(body, transfer_pb2.Reserve):
            self._reserve(session, header.transfer_id, body)
        elif isinstance(body, transfer_pb2.Manifest):
            self._on_manifest(session, header.transfer_id, body)
        elif isinstance(body, transfer_pb2.Abort):
            self._on_abort(session, header.transfer_id, body)
        else:
            self._on_signal(session, header)

    def _on_signal(self, session: Session, header: Header) -> None:
        transfer = session.transfers.get(header.transfer_id)
        match header.kind:
            case Kind.PING if transfer is not None:
                self._report(transfer)
            case Kind.PING:
                self._peers.send(session, Kind.PONG, 0)
            case Kind.COMMIT_ACK:
                if transfer is not None and transfer.is_committed:
                    self._forget(transfer)
            case Kind.ABORT_ACK:
                ended = session.aborting.pop(header.transfer_id, None)
                if ended is not None:
                    self._credit.free_all(ended)
            case Kind.PONG:
                pass
            case _:
                self._stats["dropped_invalid"] += 1

    def _reserve(self, session: Session, transfer_id: int, reserve: transfer_pb2.Reserve) -> None:
        now = time.monotonic()
        known = session.transfers.get(transfer_id)
        if known is not None:
            # the answer was lost
            if known.coverage is not None:
                self._send_grant(known, self.slots.granted(known))
            elif known.wait is not None:
                self.wait(known.wait, known)
            return
        if transfer_id in session.ended or session.tier is None or reserve.remaining_ms == 0:
            self._stats["dropped_late"] += 1
            return
        refuse = self._objection(reserve)
        rival = self._by_request.get(reserve.request_id)
        if rival is not None and rival.handle.attempt > reserve.attempt:
            refuse = transfer_pb2.Refuse(reason="superseded")
        if refuse is not None:
            self._peers.send(session, Kind.REFUSE, transfer_id, refuse)
            return
        if rival is not None and not rival.is_committed:
            aborted = Aborted(rival.handle, "superseded")
            self._end(rival, aborted, abort_reason="superseded")
        handle = TransferHandle(
            transfer_id, reserve.request_id, reserve.attempt, session.worker_id, session.number
        )
        deadline = now + reserve.remaining_ms / 1000
        transfer = Incoming(handle, session, reserve.num_tokens, deadline, opened_at=now)
        session.transfers[transfer_id] = transfer
        self._by_request[reserve.request_id] = transfer
        self._emit(ReserveRequested(handle, reserve.num_tokens, reserve.num_sequences, deadline))

    def _objection(self, reserve: transfer_pb2.Reserve) -> transfer_pb2.Refuse | None:
        """Why this reservation cannot even be asked of the engine."""
        num_open = sum(len(session.transfers) for session in self._peers.sessions.values())
        if num_open >= self._endpoint.options.max_transfers:
            return transfer_pb2.Refuse(reason="full", detail=f"{num_open} transfers are open")
        if not 0 < reserve.num_tokens <= self._max_tokens or not reserve.num_sequences:
            detail = f"{reserve.num_tokens} tokens of at most {self._max_tokens}"
            return transfer_pb2.Refuse(reason="too_large", detail=detail)
        return None

    def _on_manifest(
        self, session: Session, transfer_id: int, manifest: transfer_pb2.Manifest
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

    def _on_abort(self, session: Session, transfer_id: int, abort: transfer_pb2.Abort) -> None:
        transfer = session.transfers.get(transfer_id)
        if transfer is not None:
            self._stats["peer_aborts"] += 1
            if transfer.is_committed:
                self._forget(transfer)
            else:
                self._end(transfer, Aborted(transfer.handle, known_reason(abort.reason)))
        session.remember(transfer_id)  # also one whose RESERVE is still to come
        self._peers.send(session, Kind.ABORT_ACK, transfer_id)

    def _report(self, transfer: Incoming) -> None:
        """Answer a sender that hears nothing: all that is its to fill, all that was injected."""
        self._peers.send(
            transfer.session,
            Kind.CREDIT,
            transfer.handle.transfer_id,
            transfer_pb2.Credit(
                slots=self.slots.granted(transfer), injected=sorted(transfer.injected)
            ),
        )

    def _send_credit(self, transfer: Incoming, credit: transfer_pb2.Credit) -> None:
        self._peers.send(transfer.session, Kind.CREDIT, transfer.handle.transfer_id, credit)

    def on_chunk(self, identity: bytes, packed: bytes, frame: zmq.Frame | None) -> bool:
        """Validate a chunk in every field and queue it; False for one that comes late or again.

        Raises WireError where it is not in order.
        """
        header = Header.unpack(packed)
        is_shared = frame is None
        if header.kind is not Kind.CHUNK:
            raise WireError(f"{header.kind.name} came over a bulk socket")
        if header.epoch != self._endpoint.epoch:
            self._stats["dropped_old_epoch"] += 1
            return False
        session = self._peers.sessions.get(identity[:-1])
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
        if header.length > self._endpoint.options.slot_bytes:
            raise WireError(
                f"{header.length} bytes in a slot of {self._endpoint.options.slot_bytes}"
            )
        if frame is not None and len(frame.buffer) != header.length:
            raise WireError(f"{len(frame.buffer)} bytes of {header.length}")
        if self.slots.state(transfer, header.slot) is not SlotState.GRANTED:
            raise WireError(f"slot {header.slot} is not granted")
        rows = ChunkRows(header.component, header.layers, header.rows, header.length)
        transfer.coverage.claim(rows)
        now = time.monotonic()
        session.last_heard = transfer.progress_at = now
        transfer.arrived.add(sequence)
        self.slots.mark(transfer, header.slot, SlotState.FILLED)
        self._injector.add(Chunk(transfer, packed, header, rows, frame))
        return True

    # time

    def tick(self, now: float) -> float:
        self._credit.announce()
        if now - self._watched_at >= TICK_S:
            self._watched_at = now
            self._watch_all(now)
        is_busy = any(s.transfers or s.aborting for s in self._peers.sessions.values())
        return TICK_S if is_busy else IDLE_S

    def _watch_all(self, now: float) -> None:
        is_ping_due = now - self._pinged_at > self._endpoint.options.stall_s / 2
        if is_ping_due:
            self._pinged_at = now
        for session in list(self._peers.sessions.values()):
            if session.is_lost:
                if is_ping_due:
                    self._peers.bury(session)
                continue
            self._peers.flush(session)
            for transfer in list(session.transfers.values()):
                if transfer.handle.transfer_id in session.transfers:
                    self._watch(transfer, now)
            for transfer in list(session.aborting.values()):
                if now - transfer.told_at > self._endpoint.options.stall_s:
                    self._send_abort(transfer, now)
            if is_ping_due:
                # also tells whether the connection still stands
                self._peers.send(session, Kind.PING, 0)

    def _watch(self, transfer: Incoming, now: float) -> None:
        options, session = self._endpoint.options, transfer.session
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
