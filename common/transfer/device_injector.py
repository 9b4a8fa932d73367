"""The decode's end of the transfer where state lies on a device: chunks are checked on threads of
their own and written beside the steps, on a stream of their own.

A chunk is copied into pinned memory that no sender can reach, hashed there, and stays there until
the device has read it. The engine thread only begins copies, between two steps; it waits for none.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from scission.common.cache.device_rows import pinned_bytes
from scission.common.cache.storage import PART_BYTES, Bytes, CacheStorage, RowPlace
from scission.common.transfer.arena import Arena
from scission.common.transfer.events import TransferHandle
from scission.common.transfer.incoming import Chunk, Injected
from scission.common.transfer.injector import Grant
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.wire import start_hash

logger = logging.getLogger(__name__)

BUFFERS_UNDER_WAY = 4  # to the device, besides those that are filled and wait


@dataclass(frozen=True, slots=True)
class _Checked:
    """A sound chunk in a private buffer."""

    chunk: Chunk
    buffer: Bytes
    seconds: float  # that copying and hashing took


class DeviceInjector:
    """`add` is the I/O thread's; everything else the engine thread's."""

    def __init__(
        self,
        storage: CacheStorage,
        arena: Arena | None,
        options: TransferOptions,
        name: str,
        report: Callable[[list[Injected]], None],
        wake: Callable[[], None],
    ) -> None:
        """
        Args:
            report: called from threads of the injector with what became of some chunks.
            wake: likewise, when `inject` has something to do.
        """
        assert storage.on_device is not None
        self._storage = storage
        self._on_device = storage.on_device
        self._arena = arena
        self._report = report
        self._wake = wake
        self._grants: dict[TransferHandle, Grant] = {}
        # of each grant the last write: set once it is over
        self._last_writes: dict[TransferHandle, threading.Event] = {}
        self._checked: deque[_Checked] = deque()
        self._buffers = _Buffers(options.slot_bytes, 2 * options.copy_threads + BUFFERS_UNDER_WAY)
        self._checkers = ThreadPoolExecutor(options.copy_threads, f"{name}-check")
        # ends are waited for in the order in which the device comes to them
        self._ends = ThreadPoolExecutor(1, f"{name}-end")

    def add(self, chunk: Chunk) -> None:
        """A chunk has arrived."""
        self._checkers.submit(self._check, chunk)

    def grant(self, handle: TransferHandle, block_ids: list[int], slot: int) -> None:
        """Where the transfer's rows go; what the device still does there is waited for."""
        self._on_device.write_after_steps()
        self._grants[handle] = Grant(list(block_ids), slot)

    def drop(self, handle: TransferHandle) -> None:
        """Nothing more is written there; what the device is asked from now on finds it so."""
        self._grants.pop(handle, None)
        last = self._last_writes.pop(handle, None)
        # at a commit all is written: steps do not wait for what comes for others
        if last is not None and not last.is_set():
            self._on_device.step_after_writes()

    @property
    def has_chunks(self) -> bool:
        """Whether `inject` has something to do."""
        return bool(self._checked)

    def inject(self, budget_bytes: int) -> int:
        """Begin to write checked chunks into their blocks and slots, at least one, until the
        budget is spent.

        Returns the bytes begun. Their arena slots go back to the senders once they are written.
        """
        taken = 0
        while self._checked and (taken < budget_bytes or taken == 0):
            checked = self._checked.popleft()
            chunk = checked.chunk
            grant = self._grants.get(chunk.incoming.handle)
            if grant is None:
                self._buffers.give_back(checked.buffer)
                continue
            rows = chunk.rows
            place = RowPlace(rows.component, rows.layers, rows.rows, grant.block_ids, grant.slot)
            wait = self._storage.begin_write(place, checked.buffer[: rows.num_bytes])
            self._last_writes[chunk.incoming.handle] = is_over = threading.Event()
            self._ends.submit(self._end, checked, wait, is_over)
            taken += rows.num_bytes
        return taken

    def close(self) -> None:
        self._buffers.close()
        self._checkers.shutdown(cancel_futures=True)
        self._ends.shutdown()

    # threads of the injector: what they meet is reported, or the chunk would be waited for

    def _check(self, chunk: Chunk) -> None:
        buffer = self._buffers.take()
        if buffer is None:
            return
        started = time.monotonic()
        is_sound = False
        try:
            is_sound = self._copy(chunk, buffer) == chunk.header.hash
        except Exception:
            logger.exception("%s: a chunk was not checked", chunk.incoming.handle.request_id)
        seconds = time.monotonic() - started
        if not is_sound:
            self._buffers.give_back(buffer)
            self._report([Injected(chunk, False, seconds)])
            return
        self._checked.append(_Checked(chunk, buffer, seconds))
        self._wake()

    def _copy(self, chunk: Chunk, buffer: Bytes) -> int:
        """Copy the chunk's rows out of the sender's reach; the hash of the copy."""
        num_bytes = chunk.rows.num_bytes
        data = (
            np.frombuffer(chunk.frame.buffer, np.uint8)
            if chunk.frame is not None
            else self._slot(chunk)
        )
        hasher = start_hash(chunk.packed)
        for first in range(0, num_bytes, PART_BYTES):
            part = buffer[first : min(first + PART_BYTES, num_bytes)]
            np.copyto(part, data[first : first + len(part)])
            hasher.update(part.data)
        return hasher.intdigest()

    def _slot(self, chunk: Chunk) -> Bytes:
        assert self._arena is not None
        return self._arena.slot(chunk.header.slot, chunk.rows.num_bytes)

    def _end(self, checked: _Checked, wait: Callable[[], None], is_over: threading.Event) -> None:
        started = time.monotonic()
        is_written = True
        try:
            wait()
        except Exception:
            is_written = False
            logger.exception("%s: rows were not written", checked.chunk.incoming.handle.request_id)
        is_over.set()
        self._buffers.give_back(checked.buffer)
        seconds = checked.seconds + time.monotonic() - started
        self._report([Injected(checked.chunk, is_written, seconds)])


class _Buffers:
    """A fixed number of pinned buffers; who finds none waits for one."""

    def __init__(self, size: int, count: int) -> None:
        self._free = [pinned_bytes(size) for _ in range(count)]
        self._changed = threading.Condition()
        self._is_closed = False

    def take(self) -> Bytes | None:
        """None: closed."""
        with self._changed:
            while not self._free and not self._is_closed:
                self._changed.wait()
            return None if self._is_closed else self._free.pop()

    def give_back(self, buffer: Bytes) -> None:
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
