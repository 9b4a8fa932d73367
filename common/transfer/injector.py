"""The decode's engine thread at work on the transfer, where state lies in host memory: arrived
chunks, checked and written to where their requests were given room.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from scission.common.cache.storage import CacheStorage, RowPlace
from scission.common.transfer.arena import Arena
from scission.common.transfer.copiers import Copiers
from scission.common.transfer.events import TransferHandle
from scission.common.transfer.incoming import Chunk, Injected
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.wire import start_hash

# credit is given back this often: each time wakes the I/O thread and costs a message
REPORT_BYTES = 4 << 20


@dataclass(slots=True)
class Budget:
    """Bytes that one call of `inject` may write, shared by the copying threads."""

    total: int
    taken: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Grant:
    block_ids: list[int]
    slot: int


class Injector:
    """The I/O thread adds chunks; everything else is the engine thread's."""

    def __init__(
        self,
        storage: CacheStorage,
        arena: Arena | None,
        options: TransferOptions,
        name: str,
        report: Callable[[list[Injected]], None],
    ) -> None:
        """`report` is called from any of the copying threads with what became of some chunks."""
        self._storage = storage
        self._arena = arena
        self._report = report
        self._chunks: deque[Chunk] = deque()
        self._grants: dict[TransferHandle, Grant] = {}
        self._copiers = Copiers(options.copy_threads, name)
        self._private = deque(
            np.empty(options.slot_bytes, np.uint8) for _ in range(options.copy_threads)
        )

    def add(self, chunk: Chunk) -> None:
        """From the I/O thread: a chunk has arrived."""
        self._chunks.append(chunk)

    def grant(self, handle: TransferHandle, block_ids: list[int], slot: int) -> None:
        """Where the transfer's rows go."""
        self._grants[handle] = Grant(list(block_ids), slot)

    def drop(self, handle: TransferHandle) -> None:
        """Nothing more is written there."""
        self._grants.pop(handle, None)

    @property
    def has_chunks(self) -> bool:
        """Whether `inject` has something to do."""
        return bool(self._chunks)

    def inject(self, budget_bytes: int) -> int:
        """Check and write waiting chunks into their blocks and slots, at least one, until the
        budget is spent.

        Returns the bytes written. Their arena slots go back to the senders at once.
        """
        budget = Budget(budget_bytes)

        def work() -> None:
            done: list[Injected] = []
            unreported = 0
            while (job := self._next_job(budget)) is not None:
                done.append(self._inject(*job))
                unreported += job[0].rows.num_bytes
                if unreported >= REPORT_BYTES:
                    self._report(done)
                    done, unreported = [], 0
            if done:
                self._report(done)

        self._copiers.run(work, min(len(self._chunks), budget_bytes // REPORT_BYTES))
        return budget.taken

    def _next_job(self, budget: Budget) -> tuple[Chunk, Grant] | None:
        """The next chunk and its place, while the budget lasts; on any of the copying threads."""
        with budget.lock:
            while self._chunks and (budget.taken < budget.total or budget.taken == 0):
                chunk = self._chunks.popleft()
                grant = self._grants.get(chunk.incoming.handle)
                if grant is not None:
                    budget.taken += chunk.rows.num_bytes
                    return chunk, grant
        return None

    def _inject(self, chunk: Chunk, grant: Grant) -> Injected:
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
        return Injected(chunk, is_sound, time.monotonic() - started)

    def close(self) -> None:
        self._copiers.close()
