"""Mixture of experts stored flat (one tensor for all experts), routed by sigmoid scores."""

from collections.abc import Sequence

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
    can_run,
    linear_block_fp8,
    quantize_rows,
    round_trip_rows,
)
from scission.kernels.quant import FP8_BLOCK, scale_values


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
        gate = w.tensor("gate.weight", shape, torch.bfloat16, or_dtype=torch.float32)
        self._gate = gate.float()
        self._bias = w.tensor("router_bias", (num_experts,), torch.float32) if has_bias else None
        self._top_k = top_k
        self._scaling = scaling

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[num_tokens, dim] -> experts [num_tokens, top_k] int64 and weights float32."""
        logits = F.linear(x.float(), self._gate)
        return route_sigmoid(logits, self._bias, self._top_k, self._scaling)


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
        self._first, last = whole.bounds(num_experts) if whole else (0, num_experts)
        self._num_local = last - self._first
        self._limit = limit
        self._gate_up = _products([gate, up], numerics)
        self._down = _products([down], numerics)

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """This rank's share of the sum, [num_tokens, dim] float32.

        Args:
            experts: [num_tokens, k] int64, of all ranks; `weights`: float32.
        """
        local = experts - self._first
        is_mine = (local >= 0) & (local < self._num_local)
        local = torch.where(is_mine, local, -1)
        return run_gated_experts(
            x, local, weights, self._gate_up, self._down, self._num_local, self._limit
        )


def _products(parts: Sequence[Matrix], numerics: Numerics) -> ExpertProducts:
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

        return multiply_codes
    multiply = _decoded_products(parts, numerics.dtype)
    if scaling is None:
        return multiply
    return lambda expert, x: multiply(expert, round_trip_rows(x, scaling, static_scale))


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
    """Router, routed experts and a shared expert beside them, added once and reduced once."""

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

    @property
    def input(self) -> RowInput:
        """How the rows are taken: the router reads them unrounded."""
        return RowInput()

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """[num_tokens, dim] -> [num_tokens, dim]."""
        assert isinstance(x, Tensor)
        routed = self._experts(x, *self._router(x))
        shared = self._shared.partial(x).float()
        if self._ranks.ep.size > 1:
            # every rank has the whole shared expert: it counts once
            return (self._ranks.ep.all_reduce(routed) + shared).to(x.dtype)
        return self._ranks.tp.reduce(routed + shared).to(x.dtype)


def shared_axis(ranks: Ranks) -> Axis:
    """Over which ranks the shared expert is divided: not over those that hold whole experts."""
    return Axis() if ranks.ep.size > 1 else ranks.tp
