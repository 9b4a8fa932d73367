"""Mixture of experts stored flat (one tensor for all experts), routed by sigmoid scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.common.checkpoint.weights import Matrix, Weights
from scission.common.layers.linear import axis_shard, input_scaling
from scission.common.layers.mlp import GatedMLP
from scission.common.layers.numerics import LINEAR_BLOCK, Numerics
from scission.common.layers.row_input import RowInput
from scission.common.parallel.ranks import Axis, Ranks
from scission.kernels.gated_experts import (
    ExpertProducts,
    products_of,
    route_sigmoid,
    run_gated_experts,
)
from scission.kernels.linear import (
    QuantizedRows,
    Scaling,
    can_run,
    linear_block_fp8,
    quantize_rows,
    round_trip_rows,
)
from scission.kernels.quant import FP8_BLOCK, scale_values
from scission.kernels.target import target_of

if TYPE_CHECKING:
    from scission.kernels.moe.coded import CodedExperts


class SigmoidRouter:
    """The top_k experts by score plus bias; fp32, whatever the gate is stored in."""

    def __init__(
        self,
        w: Weights,
        dim: int,
        num_experts: int,
        top_k: int,
        scaling: float,
        *,
        has_bias: bool,
    ) -> None:
        shape = (num_experts, dim)
        # as it is stored
        self.gate = w.tensor("gate.weight", shape, torch.bfloat16, or_dtype=torch.float32)
        self._gate = self.gate.float()
        self.bias = w.tensor("router_bias", (num_experts,), torch.float32) if has_bias else None
        self.top_k = top_k
        self.scaling = scaling

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[num_tokens, dim] -> experts [num_tokens, top_k] int64 and weights float32."""
        logits = F.linear(x.float(), self._gate)
        return route_sigmoid(logits, self.bias, self.top_k, self.scaling)


class FlatExperts:
    """`gate_proj`, `up_proj` and `down_proj` [experts, out, in].

    Expert parallel by contiguous ranges of whole experts, or (with one expert rank) tensor parallel
    by whole scale blocks of the inner dimension: an even split would cut blocks, and rows would be
    read with a neighbour's scale.
    """

    def __init__(
        self,
        w: Weights,
        num_experts: int,
        dim: int,
        inner: int,
        ranks: Ranks,
        numerics: Numerics,
        limit: float | None,
    ) -> None:
        """
        Args:
            limit: of the activation; None: no clamp.
        """
        whole = axis_shard(ranks.ep, 0)
        outputs = whole or axis_shard(ranks.tp, 1, LINEAR_BLOCK)
        inputs = whole or axis_shard(ranks.tp, 2, LINEAR_BLOCK)
        gate, up = (
            w.flat_experts(name, num_experts, inner, dim, outputs)
            for name in ("gate_proj", "up_proj")
        )
        down = w.flat_experts("down_proj", num_experts, dim, inner, inputs)
        self.first, last = whole.bounds(num_experts) if whole else (0, num_experts)
        self.num_local = last - self.first
        self.limit = limit
        self._gate_up, self.gate_up_codes = _products([gate, up], numerics)
        self._down, self.down_codes = _products([down], numerics)

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """This rank's share of the sum, [num_tokens, dim] float32.

        Args:
            experts: [num_tokens, k] int64, of all ranks; `weights`: float32.
        """
        local = experts - self.first
        is_mine = (local >= 0) & (local < self.num_local)
        local = torch.where(is_mine, local, -1)
        return run_gated_experts(
            x, local, weights, self._gate_up, self._down, self.num_local, self.limit
        )


@dataclass(frozen=True, slots=True)
class StackCodes:
    """FP8 codes [experts, out, in] and scales of 128 x 128 blocks, as kernels multiply them."""

    codes: Tensor
    scales: Tensor
    scaling: Scaling | None  # of the inputs


def _products(
    parts: Sequence[Matrix], numerics: Numerics
) -> tuple[ExpertProducts, StackCodes | None]:
    """Of the stacks one below the other: values on the CPU, codes where there is a kernel.

    Each rounds its input as `Linear` does.
    """
    scaling, static_scale = input_scaling(parts) if numerics.rounds else (None, None)
    if _has_kernel(parts, numerics.dtype):
        blocks = [part.by_block() for part in parts]
        codes = torch.cat([block.codes for block in blocks], dim=1)
        scales = torch.cat([scale_values(b.scales) for b in blocks if b.scales is not None], dim=1)

        def multiply_codes(expert: int, x: Tensor) -> Tensor:
            rows = x if scaling is None else quantize_rows(x, scaling, static_scale)
            return linear_block_fp8(rows, codes[expert], scales[expert])

        return multiply_codes, StackCodes(codes, scales.contiguous(), scaling)
    multiply = _decoded_products(parts, numerics.dtype)
    if scaling is None:
        return multiply, None
    return lambda expert, x: multiply(expert, round_trip_rows(x, scaling, static_scale)), None


def _decoded_products(parts: Sequence[Matrix], dtype: torch.dtype) -> ExpertProducts:
    """Of unrounded inputs; decoded once on the CPU, elsewhere when used."""
    if parts[0].codes.device.type == "cpu":
        return products_of(torch.cat([part.dequantize(dtype) for part in parts], dim=1))
    return lambda expert, x: F.linear(
        x, torch.cat([part.expert(expert).dequantize(dtype) for part in parts])
    )


def _has_kernel(parts: Sequence[Matrix], dtype: torch.dtype) -> bool:
    """FP8 that no cut left inside a block, each part but the last of whole blocks."""
    return can_run(parts[0].codes.device, dtype, parts[0].in_features) and all(
        part.kind in ("fp8_block", "fp8_tensor")
        and part.offset == (0, 0)
        and (part is parts[-1] or part.out_features % FP8_BLOCK == 0)
        for part in parts
    )


class FlatMoE:
    """Router, routed experts and a shared expert beside them, added once and reduced once.

    Where kernels multiply the experts' codes nothing asks the host; elsewhere the experts are gone
    through one by one.
    """

    def __init__(
        self, router: SigmoidRouter, experts: FlatExperts, shared: GatedMLP, ranks: Ranks
    ) -> None:
        """
        Args:
            shared: over `shared_axis(ranks)`.
        """
        self._router = router
        self._experts = experts
        self._shared = shared
        self._ranks = ranks
        self._is_alone = ranks.ep.size == ranks.tp.size == 1
        self._has_shared = False
        self._coded = self._build_coded()

    @property
    def captures(self) -> bool:
        """Whether nothing asks the host."""
        return self._coded is not None

    @property
    def input(self) -> RowInput:
        """How the rows are taken: the router reads them unrounded."""
        return RowInput() if self._coded is None else RowInput("dynamic", keeps_values=True)

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """[num_tokens, dim] -> [num_tokens, dim]."""
        if self._coded is not None:
            return self._by_codes(x, self._coded)
        assert isinstance(x, Tensor)
        routed = self._experts(x, *self._router(x))
        shared = self._shared.partial(x).float()
        return self._summed(routed, shared, x.dtype)

    def _by_codes(self, x: Tensor | QuantizedRows, coded: "CodedExperts") -> Tensor:
        rows = quantize_rows(x, "dynamic") if isinstance(x, Tensor) else x
        is_few = coded.takes_few(rows.num_tokens)
        if is_few:
            outputs = coded.run_few(rows, None, None)
        else:
            outputs = coded.run_many(rows, None)
        if is_few and self._has_shared:
            return outputs.sum(torch.bfloat16)
        shared = self._shared.partial(rows)
        if self._is_alone:
            return outputs.sum(torch.bfloat16, plus=shared)
        return self._summed(outputs.sum(torch.float32), shared.float(), torch.bfloat16)

    def _summed(self, routed: Tensor, shared: Tensor, dtype: torch.dtype) -> Tensor:
        if self._ranks.ep.size > 1:
            # every rank has the whole shared expert: it counts once
            return (self._ranks.ep.all_reduce(routed) + shared).to(dtype)
        return self._ranks.tp.reduce(routed + shared).to(dtype)

    def _build_coded(self) -> "CodedExperts | None":
        """None: there is no kernel for the experts as they are stored."""
        router, experts = self._router, self._experts
        target = target_of(router.gate.device)
        gate_up, down = experts.gate_up_codes, experts.down_codes
        if target is None or gate_up is None or down is None:
            return None
        is_whole = all(size % FP8_BLOCK == 0 for size in down.codes.shape[1:])
        if not is_whole or (gate_up.scaling, down.scaling) != ("dynamic", "dynamic"):
            return None
        # only where a kernel is launched is Triton needed
        from scission.kernels.moe.choose_experts import Routing
        from scission.kernels.moe.coded import CodedExperts, SharedExpert
        from scission.kernels.moe.grouped_experts import Activation, Fp8Experts

        shared: SharedExpert | None = None
        both = self._shared.fp8
        if self._is_alone and both is not None and both[1][0].shape == down.codes.shape[1:]:
            w13, w2 = (
                Fp8Experts(codes.unsqueeze(0), scales.unsqueeze(0)) for codes, scales in both
            )
            shared = SharedExpert(w13, w2, self._shared.limit)
        self._has_shared = shared is not None
        return CodedExperts(
            Routing(
                router.gate,
                router.bias,
                None,
                router.top_k,
                router.scaling,
                "sigmoid",
                experts.first,
                experts.num_local,
            ),
            Fp8Experts(gate_up.codes, gate_up.scales),
            Fp8Experts(down.codes, down.scales),
            Activation(experts.limit, clamps_first=False, scaling="dynamic"),
            shared,
            target,
        )


def shared_axis(ranks: Ranks) -> Axis:
    """Over which ranks the shared expert is divided: not over those that hold whole experts."""
    return Axis() if ranks.ep.size > 1 else ranks.tp
