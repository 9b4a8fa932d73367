"""Mixture of experts in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.kernels.quant import round_trip_fp8

# weights of (token, expert) pairs that are gathered rather than looped over: 4 MiB in fp32
_GATHERED_ELEMENTS = 1 << 20


def route(logits: Tensor, bias: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
    scores = F.softplus(logits).sqrt_()
    experts = (scores + bias).topk(top_k, dim=-1, sorted=False).indices
    return experts, _normalise(scores.gather(1, experts), scaling)


def gate(logits: Tensor, experts: Tensor, scaling: float) -> Tensor:
    return _normalise(F.softplus(logits.gather(1, experts)).sqrt_(), scaling)


def run_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    limit: float,
    round_block: int | None,
) -> Tensor:
    num_tokens, k = experts.shape
    if experts.numel() * (w13[0].numel() + w2[0].numel()) <= _GATHERED_ELEMENTS:
        chosen = experts.flatten()
        # [num_tokens * k, ..., 1]
        inputs = x.repeat_interleave(k, dim=0).unsqueeze(-1)
        inner = torch.bmm(w13.index_select(0, chosen), inputs).squeeze(-1)
        inner = _activate(inner, weights.view(-1, 1), limit, round_block)
        outputs = torch.bmm(w2.index_select(0, chosen), inner.unsqueeze(-1))
        return outputs.view(num_tokens, k, -1).float().sum(1)

    # pairs in order of expert: each active expert takes its tokens at once
    order = experts.flatten().argsort(stable=True)
    tokens = order // k
    counts = torch.bincount(experts.flatten(), minlength=w13.shape[0]).tolist()
    pair_weights = weights.flatten()[order].unsqueeze(1)
    inputs = x.index_select(0, tokens)
    out = torch.zeros(num_tokens, x.shape[1], dtype=torch.float32, device=x.device)
    first = 0
    for expert, count in enumerate(counts):
        if count:
            part = slice(first, first + count)
            inner = F.linear(inputs[part], w13[expert])
            inner = _activate(inner, pair_weights[part], limit, round_block)
            out.index_add_(0, tokens[part], F.linear(inner, w2[expert]).float())
            first += count
    return out


def _activate(inner: Tensor, weights: Tensor, limit: float, round_block: int | None) -> Tensor:
    """inner: [pairs, 2 * width] -> [pairs, width], fp32 inside."""
    a, b = inner.float().chunk(2, dim=-1)
    # the gate is clipped from above only
    product = F.silu(a.clamp(max=limit)).mul_(b.clamp(-limit, limit)).mul_(weights)
    product = product.to(inner.dtype)
    return product if round_block is None else round_trip_fp8(product, round_block)


def _normalise(scores: Tensor, scaling: float) -> Tensor:
    return scores.div_(scores.sum(-1, keepdim=True)).mul_(scaling)
