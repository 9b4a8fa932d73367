"""A rank's coordinates, and the collective operations that the layers call.

Size 1 is the trivial case: no process group, and every collective returns what it was given.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from scission.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of the ranks: this rank's coordinate, the size, and the group it talks in."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"rank {self.rank} lies outside 0 .. {self.size - 1}")

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the axis, in x."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over the axis, added up in fp32, of x's dtype."""
        return x if self.size == 1 else self.all_reduce(x.float()).to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x side by side along the last dim; all have the same shape."""
        if self.group is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands: tensor parallel, expert parallel, data parallel attention."""

    tp: Axis = Axis()
    ep: Axis = Axis()
    dp: Axis = Axis()


def single_rank(tp_size: int = 1, ep_size: int = 1, dp_size: int = 1) -> Ranks:
    """The ranks of a worker with one process.

    Raises:
        ConfigError: any size beyond 1.
    """
    for name, size in (("tp_size", tp_size), ("ep_size", ep_size), ("dp_size", dp_size)):
        if size != 1:
            raise ConfigError(f"{name} is {size}; a worker of this version has one rank: give 1")
    return Ranks()
