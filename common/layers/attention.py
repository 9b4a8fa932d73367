"""What attention layers share around the attention itself: the grouped output projection."""

import torch
from torch import Tensor

from scission.common.checkpoint.weights import Weights
from scission.common.layers.linear import ColumnParallelLinear, RowParallelLinear
from scission.common.layers.numerics import Numerics
from scission.common.parallel.ranks import Axis


class GroupedOutput:
    """The heads' outputs, group by group through a low rank (wo_a), then together through wo_b."""

    def __init__(
        self,
        w: Weights,
        dim: int,
        heads_dim: int,
        num_groups: int,
        rank: int,
        axis: Axis,
        numerics: Numerics,
    ) -> None:
        """
        Args:
            dim: of the model.
            heads_dim: all heads side by side.
            rank: of one group.
        """
        group_dim = heads_dim // num_groups
        # wo_a is multiplied without rounding its input, whatever it is stored as
        wo_a = ColumnParallelLinear(
            w, "wo_a", num_groups * rank, group_dim, axis, numerics, align=rank, rounds_input=False
        )
        self._wo_a = wo_a
        self._wo_b = RowParallelLinear(
            w, "wo_b", dim, num_groups * rank, axis, numerics, align=rank
        )
        self._rank = rank
        self._group_dim = group_dim

    def __call__(self, heads: Tensor) -> Tensor:
        """[num_tokens, num_heads, head_dim] -> [num_tokens, dim]."""
        num_tokens = heads.shape[0]
        # [groups, group_dim, rank]
        wo_a = self._wo_a.weight.view(-1, self._rank, self._group_dim).mT
        grouped = heads.reshape(num_tokens, -1, self._group_dim).transpose(0, 1)
        return self._wo_b(torch.bmm(grouped, wo_a).transpose(0, 1).flatten(1))
