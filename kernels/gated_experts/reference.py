"""Experts by sigmoid scores in plain PyTorch: the definition."""

from collections.abc import Callable

import torch
from torch import Tensor

from scission.kernels.activation import silu_mul


def route_sigmoid(
    logits: Tensor, bias: Tensor | None, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    choice = scores if bias is None else scores + bias
    # a stable sort puts the lower index first where scores tie, which topk leaves open
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = scores.gather(1, experts)
    return experts, chosen.div_(chosen.sum(-1, keepdim=True)).mul_(scaling)


def run_gated_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Callable[[int, Tensor], Tensor],
    down: Callable[[int, Tensor], Tensor],
    num_experts: int,
    limit: float | None,
) -> Tensor:
    out = x.new_zeros(x.shape, dtype=torch.float32)
    flat = experts.flatten()
    # (token, expert) pairs by expert, those without one first
    order = flat.argsort(stable=True)
    counts = (flat + 1).bincount(minlength=num_experts + 1).tolist()
    groups = torch.split_with_sizes(order, counts)
    for expert, pairs in enumerate(groups[1:]):
        if not len(pairs):
            continue
        tokens = pairs // experts.shape[1]
        inner = silu_mul(gate_up(expert, x.index_select(0, tokens)), limit)
        y = down(expert, inner).float()
        out.index_add_(0, tokens, y * weights.flatten()[pairs].unsqueeze(1))
    return out
