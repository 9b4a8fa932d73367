"""Mixture of experts: the router's choice and weights, and the experts themselves."""

import torch
from torch import Tensor

from scission.kernels.moe import reference

__all__ = ["gate", "route", "run_experts"]


def route(logits: Tensor, bias: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Score routing: the top_k of score + bias; the bias takes part in the choice only.

    Args:
        logits: [num_tokens, num_experts] float32.
        bias: [num_experts] float32.

    Returns:
        Experts [num_tokens, top_k] int64 and their weights, float32: score = sqrt(softplus(logit)),
        normalised to the sum `scaling`.
    """
    if logits.dtype != torch.float32 or bias.shape != logits.shape[1:]:
        raise ValueError(
            f"logits must be float32 and fit the bias, got {logits.dtype} {list(logits.shape)}, "
            f"{list(bias.shape)}"
        )
    return reference.route(logits, bias, top_k, scaling)


def gate(logits: Tensor, experts: Tensor, scaling: float) -> Tensor:
    """The weights of experts that are chosen already (hash routing): as in `route`.

    Args:
        logits: [num_tokens, num_experts] float32.
        experts: [num_tokens, top_k] int64.

    Returns:
        [num_tokens, top_k] float32.
    """
    if logits.dtype != torch.float32 or experts.shape[0] != logits.shape[0]:
        raise ValueError(
            f"logits must be float32, a row a token; got {logits.dtype} {list(logits.shape)}, "
            f"experts {list(experts.shape)}"
        )
    return reference.gate(logits, experts, scaling)


def run_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    limit: float,
    round_block: int | None,
    num_shared: int = 0,
) -> Tensor:
    """sum_e weight_e * w2_e (silu(min(a, limit)) * clip(b, -limit, limit)), (a | b) = w13_e x.

    The weight multiplies before w2, in fp32, and before the inner value is rounded.

    Args:
        x: [num_tokens, dim].
        experts: [num_tokens, k] int64; `weights`: [num_tokens, k] float32.
        w13: [num_experts, 2 * inner, dim], gate then up, of x's dtype.
        w2: [num_experts, dim, inner].
        limit: of the activation.
        round_block: block of the e4m3 round trip of what w2 takes; None: no rounding.
        num_shared: the last experts, which every token takes besides, with weight 1.

    Returns:
        [num_tokens, dim] float32, summed in fp32.
    """
    if w13.shape != (w2.shape[0], 2 * w2.shape[2], x.shape[1]) or w2.shape[1] != x.shape[1]:
        raise ValueError(
            f"x {list(x.shape)}, w13 {list(w13.shape)} and w2 {list(w2.shape)} do not fit"
        )
    if experts.shape != weights.shape or weights.dtype != torch.float32:
        raise ValueError(
            f"experts {list(experts.shape)} and float32 weights must be alike, "
            f"got {weights.dtype} {list(weights.shape)}"
        )
    return reference.run_experts(x, experts, weights, w13, w2, limit, round_block, num_shared)
