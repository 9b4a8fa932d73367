"""Rows of a device's storage to and from host memory, beside the steps that run meanwhile.

Copies have streams of their own: steps wait for none of them. Host memory should be pinned
(`pinned_bytes`, `pin`): then a copy is the device's own work at the speed of its bus.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]

# moved as the widest of these that divides a row
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class DeviceRows:
    """Reads from any thread, each on a stream of its own; writes in order, on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()
        self._writing = _new_stream(device)

    def read(self, rows: Tensor, index: Tensor, out: Bytes) -> None:
        """Copy rows into host memory; complete on return.

        Args:
            rows: [layers, pool rows, row] on the device.
            index: [num_rows] int64 on the host, into dim 1.
            out: [layers * num_rows * row bytes] uint8, contiguous.
        """
        stream = self._own_stream()
        with torch.cuda.stream(stream):
            picked = torch.index_select(_as_words(rows), 1, self._send(index))
            torch.from_numpy(out).copy_(picked.view(-1).view(torch.uint8), non_blocking=True)
            done = _blocking_event()
            done.record(stream)
        # sleeps, so that other threads have the interpreter and the core
        done.synchronize()

    def write(self, rows: Tensor, index: Tensor, data: Bytes) -> Callable[[], None]:
        """Begin to copy host memory into rows.

        Args:
            rows, index: as in `read`; no step may be reading or writing these rows.
            data: [layers * num_rows * row bytes] uint8, contiguous; must stay as it is until then.

        Returns:
            What waits until the rows are written; for any thread.
        """
        words = _as_words(rows)
        with torch.cuda.stream(self._writing):
            moved = torch.from_numpy(data).to(self._device, non_blocking=True)
            moved = moved.view(words.dtype).view(words.shape[0], -1, words.shape[2])
            words.index_copy_(1, self._send(index), moved)
            done = _blocking_event()
            done.record(self._writing)
        return done.synchronize

    def write_after_steps(self) -> None:
        """Let writes that follow wait for what this thread has given the device so far."""
        self._writing.wait_stream(torch.cuda.current_stream(self._device))

    def step_after_writes(self) -> None:
        """Let what this thread gives the device from here on wait for the writes so far."""
        torch.cuda.current_stream(self._device).wait_stream(self._writing)

    def _own_stream(self) -> torch.cuda.Stream:
        """The calling thread's."""
        if not hasattr(self._own, "stream"):
            self._own.stream = _new_stream(self._device)
        stream: torch.cuda.Stream = self._own.stream
        return stream

    def _send(self, index: Tensor) -> Tensor:
        return index.pin_memory().to(self._device, non_blocking=True)


def pinned_bytes(count: int) -> Bytes:
    """Host memory that a device copies from and to by itself."""
    return torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()


def pin(memory: Bytes) -> None:
    """Make host memory that exists already, a mapped file of a tmpfs say, such memory.

    Raises:
        RuntimeError: the device's driver refuses, as it does files on disks.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
    if int(code) != 0:
        # the runtime hands the error to whoever launches next: take it here
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")
        raise RuntimeError(f"{memory.nbytes} bytes of host memory were not pinned: error {code}")


def unpin(memory: Bytes) -> None:
    """Before `pin`ned memory goes away."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(memory.ctypes.data)


def _as_words(rows: Tensor) -> Tensor:
    """The same memory, [.., row words]."""
    row_bytes = rows.shape[-1] * rows.element_size()
    dtype = next(dtype for size, dtype in _WORDS if row_bytes % size == 0)
    return rows.view(dtype)


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _blocking_event() -> torch.cuda.Event:
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
