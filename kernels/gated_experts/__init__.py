"""Experts chosen by sigmoid scores, whose activation is clamped after silu."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.kernels.gated_experts import reference

__all__ = ["ExpertProducts", "products_of", "route_sigmoid", "run_gated_experts"]

# (number of an expert, [n, in]) -> [n, out]: the product with that expert's matrix
ExpertProducts = Callable[[int, Tensor], Tensor]


def products_of(stack: Tensor) -> ExpertProducts:
    """Of plain matrices [num_experts, out, in]."""
    return lambda expert, x: F.linear(x, stack[expert])


def route_sigmoid(
    logits: Tensor, bias: Tensor | None, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """The top_k of sigmoid(logit) + bias; the bias takes part in the choice only.

    Args:
        logits: [num_tokens, num_experts] float32.
        bias: [num_experts] float32; None: no bias.

    Returns:
        Experts [num_tokens, top_k] int64 and their weights, float32: the scores without bias,
        normalised to the sum `scaling`.
    """
    if logits.dtype != torch.float32 or (bias is not None and bias.shape != logits.shape[1:]):
        raise ValueError(f"logits must be float32 and fit the bias, got {list(logits.shape)}")
    return reference.route_sigmoid(logits, bias, top_k, scaling)


def run_gated_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: ExpertProducts,
    down: ExpertProducts,
    num_experts: int,
    limit: float | None,
) -> Tensor:
    """sum_e weight_e * down_e(min(silu(gate_e x), limit) * clip(up_e x, -limit, limit)).

    Args:
        x: [num_tokens, dim].
        experts: [num_tokens, k] int64, numbers in the stack; -1: not in it, adds nothing.
        weights: [num_tokens, k] float32.
        gate_up: to [n, 2 * inner], gate then up, of x's dtype; `down`: back to [n, dim].
        num_experts: in the stack.
        limit: None: no clamp.

    Returns:
        [num_tokens, dim] float32, summed in fp32.
    """
    if experts.shape != weights.shape or weights.dtype != torch.float32:
        raise ValueError(
            f"experts {list(experts.shape)} and float32 weights must be alike, "
            f"got {weights.dtype} {list(weights.shape)}"
        )
    return reference.run_gated_experts(x, experts, weights, gate_up, down, num_experts, limit)
