"""A mixture of experts on a device: experts that stay codes in memory, without a host sync."""

import torch
from torch import Tensor

from scission.common.checkpoint.weights import Matrix
from scission.common.parallel.ranks import Axis
from scission.kernels.activation import clamped_silu_mul_rows
from scission.kernels.linear import QuantizedRows, linear_block_fp8, quantize_rows
from scission.kernels.moe import ExpertOutputs
from scission.kernels.moe.choose_experts import Routing
from scission.kernels.moe.coded import CodedExperts, SharedExpert
from scission.kernels.moe.fp4_layout import can_pack, pack_fp4_experts
from scission.kernels.moe.grouped_experts import Activation, Fp8Experts
from scission.kernels.quant import scale_values
from scission.kernels.target import target_of


def can_run_coded(routed: Matrix, shared: Matrix, dtype: torch.dtype) -> bool:
    """Whether there are kernels for FP4 experts beside an FP8 one; elsewhere they are decoded."""
    device = routed.codes.device
    fits = can_pack(routed.out_features, routed.in_features)
    kinds = (routed.kind, shared.kind) == ("fp4_group", "fp8_block")
    return fits and kinds and target_of(device) is not None and dtype == torch.bfloat16


class CodedMoE:
    """Routed experts in FP4 and one shared expert in FP8; deployed numerics in bfloat16."""

    def __init__(
        self,
        routing: Routing,
        routed: tuple[Matrix, Matrix, Matrix],
        shared: tuple[Matrix, Matrix, Matrix],
        limit: float,
        axis: Axis,
    ) -> None:
        """
        Args:
            routing: of all experts; those of this rank are `routed`.
            routed: w1, w2, w3, stacked matrices [experts, out, in]; `shared`: single ones.
            limit: of the activations.
        """
        w1, w2, w3 = (_fp4(matrix) for matrix in routed)
        target = target_of(routed[0].codes.device)
        assert target is not None
        self._axis = axis
        self._limit = limit
        self._shared13 = _fp8(shared[0], shared[2])
        self._shared2 = _fp8(shared[1])
        # what is summed over the ranks must not count it once a rank
        is_beside = axis.size == 1
        self._experts = CodedExperts(
            routing,
            pack_fp4_experts([w1, w3]),
            pack_fp4_experts([w2]),
            Activation(limit, clamps_first=True, scaling="ue8m0"),
            SharedExpert(self._shared13, self._shared2, limit) if is_beside else None,
            target,
        )

    def __call__(
        self, x: Tensor | QuantizedRows, token_ids: Tensor, positions: Tensor | None
    ) -> Tensor | ExpertOutputs:
        """[num_tokens, dim] of bfloat16; of few tokens the rows that are still to be summed."""
        rows = quantize_rows(x, "ue8m0") if isinstance(x, Tensor) else x
        is_few = self._experts.takes_few(rows.num_tokens)
        if is_few:
            outputs = self._experts.run_few(rows, token_ids, positions)
            if self._axis.size == 1:
                return outputs
        else:
            outputs = self._experts.run_many(rows, token_ids)
        if self._axis.size == 1:
            return outputs.sum(torch.bfloat16, plus=self._shared(rows))
        total = self._axis.all_reduce(outputs.sum(torch.float32))
        return total.add_(self._shared(rows)).to(torch.bfloat16)

    def _shared(self, rows: QuantizedRows) -> Tensor:
        w13, w2 = self._shared13, self._shared2
        gate_up = linear_block_fp8(rows, w13.codes[0], w13.scales[0])
        inner = clamped_silu_mul_rows(gate_up, self._limit)
        return linear_block_fp8(inner, w2.codes[0], w2.scales[0])


def _fp4(matrix: Matrix) -> tuple[Tensor, Tensor]:
    assert matrix.scales is not None
    return matrix.codes, matrix.scales.view(torch.uint8)


def _fp8(*matrices: Matrix) -> Fp8Experts:
    """The matrices one below the other, as one expert."""
    codes = torch.cat([matrix.codes for matrix in matrices])
    scales = [scale_values(matrix.scales) for matrix in matrices if matrix.scales is not None]
    return Fp8Experts(codes.unsqueeze(0), torch.cat(scales).unsqueeze(0).contiguous())
