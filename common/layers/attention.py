"""What attention layers share around the attention itself: projections to and from it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.common.checkpoint.matrix import Matrix
from scission.common.checkpoint.weights import Weights
from scission.common.layers.linear import ColumnParallelLinear, RowParallelLinear
from scission.common.layers.numerics import Numerics
from scission.common.parallel.ranks import Axis
from scission.kernels.linear import (
    QuantizedRows,
    Rows,
    linear_bf16,
    linear_grouped,
    linear_grouped_parts,
    quantize_rows,
)


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
        return self._wo_b(self._by_group(heads.reshape(heads.shape[0], -1, self._group_dim)))

    def _by_group(self, x: Tensor) -> Rows:
        """[num_tokens, groups, group_dim] -> [num_tokens, groups * rank]."""
        scaling, static_scale = self._wo_b.scaling, self._wo_b.static_scale
        if self._wo_a.fp8 is None:
            # [groups, group_dim, rank]
            wo_a = self._wo_a.weight.view(-1, self._rank, self._group_dim).mT
            return torch.bmm(x.transpose(0, 1), wo_a).transpose(0, 1).flatten(1)
        if scaling is None:
            return linear_grouped(x, *self._wo_a.fp8).flatten(1)
        # the parts of split sums are added up while they are quantised
        return quantize_rows(linear_grouped_parts(x, *self._wo_a.fp8), scaling, static_scale)


class Float32Linear:
    """y = x Wᵀ in float32, for several unquantised matrices over one input side by side.

    The inputs are values of the activations' dtype: where that is bfloat16 and the weights stay in
    it, products are exact in fp32, which is what they are summed in.
    """

    def __init__(self, matrices: Sequence[Matrix], dtype: torch.dtype) -> None:
        """`dtype`: of the activations."""
        weight = torch.cat([matrix.dequantize(torch.float32) for matrix in matrices])
        is_narrow = dtype == torch.bfloat16 and weight.device.type != "cpu"
        self._weight = weight.to(torch.bfloat16) if is_narrow else weight

    def __call__(self, x: Rows) -> Tensor:
        """[num_tokens, in] -> [num_tokens, out] float32."""
        values = x.values if isinstance(x, QuantizedRows) else x
        assert values is not None
        if self._weight.dtype == torch.bfloat16:
            return linear_bf16(values, self._weight, torch.float32)
        return F.linear(values.float(), self._weight)
