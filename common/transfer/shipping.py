"""The prefill's I/O thread at work: whose chunk goes out next, gathering, hashing, sending."""

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import zmq

from scission.common.cache.device_rows import pinned_bytes
from scission.common.cache.storage import Bytes, CacheStorage, RowPlace
from scission.common.transfer.connection import Connection
from scission.common.transfer.copiers import Copiers
from scission.common.transfer.events import Failed, SenderEvent
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.outgoing import Outgoing, Shipped
from scission.common.transfer.plan import ChunkRows, final_chunks, piece_chunks
from scission.common.transfer.wire import Header, Kind, seal, start_hash
from scission.protos import transfer_pb2

logger = logging.getLogger(__name__)

CHUNKS_PER_ROUND = 2  # at least, between two looks at the sockets


class End(Protocol):
    """Ends a transfer: see `Sender`."""

    def __call__(
        self, transfer: Outgoing, event: SenderEvent | None, abort_reason: str | None = None
    ) -> None: ...


@dataclass(slots=True)
class Job:
    """A chunk to gather now, and where to."""

    transfer: Outgoing
    shipped: Shipped
    place: RowPlace
    packed: bytes  # the header, its hash to be filled in
    rows: Bytes  # what is gathered to: in the arena, or in the buffer
    buffer: Bytes | None
    fault: Exception | None = None


class Shipper:
    """Lives on the sender's I/O thread, whose transfers it is shown."""

    def __init__(
        self,
        storage: CacheStorage,
        options: TransferOptions,
        name: str,
        transfers: Mapping[int, Outgoing],
        stats: Counter[str],
        end: End,
    ) -> None:
        self._storage = storage
        self._layout = storage.layout
        self._options = options
        self._transfers = transfers
        self._stats = stats
        self._end = end
        self._turns: deque[int] = deque()  # transfers that may have something to ship
        self._staging = Staging(
            options.slot_bytes, options.window_slots, is_pinned=storage.on_device is not None
        )
        self._copiers = Copiers(options.copy_threads, name)
        self._chunks_per_round = max(CHUNKS_PER_ROUND, options.copy_threads)

    @property
    def has_turns(self) -> bool:
        """Whether some transfer may have something to ship."""
        return bool(self._turns)

    def take_turn(self, transfer: Outgoing) -> None:
        if transfer.granted_at is not None and transfer.handle.transfer_id not in self._turns:
            self._turns.append(transfer.handle.transfer_id)

    def flush(self, connections: Iterable[Connection]) -> bool:
        """Send what sockets had no room for. Returns whether some still have none."""
        blocked = [c for c in connections if c.is_blocked]
        for connection in blocked:
            connection.flush()
        return any(connection.is_blocked for connection in blocked)

    def ship(self) -> bool:
        """Ship a few chunks, turn by turn over the transfers. Returns whether all that could ship
        wait for buffers or sockets.
        """
        num_blocked = 0
        jobs: list[Job] = []
        while len(jobs) < self._chunks_per_round and num_blocked < len(self._turns):
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

    def _next_chunk(self, transfer: Outgoing) -> tuple[int, ChunkRows, int] | None:
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

    def _plan(self, transfer: Outgoing) -> None:
        max_bytes = min(transfer.connection.slot_bytes, self._options.slot_bytes)
        while transfer.pieces and not transfer.chunks:
            transfer.chunks.extend(piece_chunks(self._layout, transfer.pieces.pop(0), max_bytes))
        if not transfer.chunks and transfer.finish is not None and not transfer.is_final_planned:
            transfer.is_final_planned = True
            transfer.chunks.extend(final_chunks(self._layout, transfer.num_tokens, max_bytes))

    def _begin_chunk(
        self, transfer: Outgoing, sequence: int, chunk: ChunkRows, slot: int
    ) -> Job | None:
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
        return Job(transfer, shipped, place, header.pack(), rows, buffer)

    def _record(self, transfer: Outgoing, sequence: int, chunk: ChunkRows, slot: int) -> Shipped:
        self._stats["chunks"] += 1
        self._stats["bytes"] += chunk.num_bytes
        if transfer.reship and transfer.reship[0] == sequence:
            transfer.reship.popleft()
            self._stats["reships"] += 1
            return transfer.shipped[sequence]
        shipped = Shipped(chunk, slot)
        transfer.progress_at = time.monotonic()
        transfer.credits.pop()
        transfer.chunks.popleft()
        transfer.shipped.append(shipped)
        transfer.in_slot[slot] = sequence
        transfer.num_undone += 1
        transfer.num_bytes += chunk.num_bytes
        return shipped

    def _ship_jobs(self, jobs: list[Job]) -> None:
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

    def _gather(self, job: Job) -> None:
        hasher = start_hash(job.packed)
        try:
            self._storage.read_rows(job.place, job.rows, hasher.update)
        except Exception as error:
            job.fault = error
        else:
            job.shipped.hash = hasher.intdigest()

    def _fault(self, transfer: Outgoing, fault: Exception) -> None:
        """This request's own fault (a source that is too short): the others go on."""
        if transfer.handle.transfer_id in self._transfers:
            logger.error("%s: cannot read the state", transfer.handle.request_id, exc_info=fault)
            self._end(transfer, Failed(transfer.handle, "internal"), abort_reason="internal")

    def _send_manifest(self, transfer: Outgoing) -> None:
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

    def close(self) -> None:
        self._copiers.close()


class Staging:
    """Buffers for rows in message frames; one is free again once ZeroMQ has let go of it."""

    def __init__(self, size: int, count: int, *, is_pinned: bool) -> None:
        self._size = size
        self._is_pinned = is_pinned
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
            return pinned_bytes(self._size) if self._is_pinned else np.empty(self._size, np.uint8)
        return None

    def give_back(self, buffer: Bytes) -> None:
        """Nothing was sent from it."""
        self._free.append(buffer)

    def lend(self, buffer: Bytes, tracker: zmq.MessageTracker) -> None:
        """The buffer is free once the tracker of the frame over it is done."""
        self._lent.append((buffer, tracker))
