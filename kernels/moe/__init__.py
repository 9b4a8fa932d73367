"""Mixture of experts: the router's choice and weights, and the experts themselves."""

import torch
from torch import Tensor

from scission.kernels.moe import reference
from scission.kernels.moe.outputs import ExpertOutputs

__all__ = ["ExpertOutputs", "ExpertWeights", "gate", "route", "run_experts"]


class ExpertWeights:
    """Experts of one shape in the layout that `run_experts` reads, and only it."""

    def __init__(self, w1: Tensor, w3: Tensor, w2: Tensor) -> None:
        """
        Args:
            w1, w3: [num_experts, inner, dim], gate and up.
            w2: [num_experts, dim, inner].
        """
        num_experts, inner, dim = w1.shape
        if w3.shape != w1.shape or w2.shape != (num_experts, dim, inner):
            raise ValueError(
                f"w1 {list(w1.shape)}, w3 {list(w3.shape)} and w2 {list(w2.shape)} do not fit"
            )
        self.num_experts = num_experts
        self.dim = dim
        # inputs first: of few rows, a CPU's product with [in, out] is 15 to 25 % faster, and a list
        # spares a view a call
        self.w13 = list(torch.cat([w1, w3], dim=1).mT.contiguous().unbind(0))
        self.w2 = list(w2.mT.contiguous().unbind(0))


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
    weights_of: ExpertWeights,
    limit: float,
    round_block: int | None,
    num_shared: int = 0,
) -> Tensor:
    """sum_e weight_e * w2_e (silu(min(w1_e x, limit)) * clip(w3_e x, -limit, limit)).

    The weight multiplies before w2, in fp32, and before the inner value is rounded.

    Args:
        x: [num_tokens, dim].
        experts: [num_tokens, k] int64; `weights`: [num_tokens, k] float32.
        weights_of: the experts, of x's dtype.
        limit: of the activation.
        round_block: block of the e4m3 round trip of what w2 takes; None: no rounding.
        num_shared: the last experts, which every token takes besides, with weight 1.

    Returns:
        [num_tokens, dim] float32, summed in fp32.
    """
    if x.shape[1] != weights_of.dim:
        raise ValueError(f"x {list(x.shape)} does not fit experts of dim {weights_of.dim}")
    if experts.shape != weights.shape or weights.dtype != torch.float32:
        raise ValueError(
            f"experts {list(experts.shape)} and float32 weights must be alike, "
            f"got {weights.dtype} {list(weights.shape)}"
        )
    return reference.run_experts(
        x, experts, weights, weights_of.w13, weights_of.w2, limit, round_block, num_shared
    )
