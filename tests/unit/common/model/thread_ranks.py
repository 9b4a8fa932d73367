"""All ranks of a model in one process: a thread each, collectives by a barrier."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from scission.common.parallel.ranks import Axis

Result = TypeVar("Result")
_TIMEOUT_S = 60.0


class _Meeting:
    """Where the ranks of one axis exchange tensors."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=_TIMEOUT_S)
        self._parts: list[Tensor | None] = [None] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self._parts[rank] = x.clone()
        self._barrier.wait()
        parts = [part for part in self._parts if part is not None]
        self._barrier.wait()
        return parts


@dataclass(frozen=True)
class ThreadAxis(Axis):
    meeting: _Meeting = field(default_factory=lambda: _Meeting(1))

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.exchange(self.rank, x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.meeting.exchange(self.rank, x), dim=-1)


def on_every_rank(size: int, run: Callable[[Axis], Result]) -> list[Result]:
    """What `run` returns for each rank of an axis, all of them at once."""
    meeting = _Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, ThreadAxis(r, size, None, meeting)) for r in range(size)]
        return [future.result(timeout=_TIMEOUT_S) for future in futures]
