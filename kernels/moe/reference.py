"""Mixture of experts in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.kernels.quant import round_trip_fp8


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
    w13: list[Tensor],
    w2: list[Tensor],
    limit: float,
    round_block: int | None,
    num_shared: int,
) -> Tensor:
    """`w13` and `w2` are [in, out] an expert."""
    num_tokens, k = experts.shape
    shared = range(len(w13) - num_shared, len(w13))
    active, counts, order = _group(experts)
    if order is None:
        inputs = [x] * k
    else:
        inputs = list(torch.split_with_sizes(x.index_select(0, order // k), counts))
        weights = weights.flatten().index_select(0, order)
    active += shared
    inputs += [x] * num_shared
    counts += [num_tokens] * num_shared
    # a product an expert: a batched one of few rows is several times slower on a CPU
    inner = torch.cat([torch.mm(part, w13[e]) for e, part in zip(active, inputs, strict=True)])
    inner = _activate(inner, weights.view(-1, 1), limit, round_block)
    parts = torch.split_with_sizes(inner, counts)
    outputs = [torch.mm(part, w2[e]) for e, part in zip(active, parts, strict=True)]
    if order is None:
        return torch.cat(outputs).sum(0, keepdim=True, dtype=torch.float32)
    num_routed = len(outputs) - num_shared
    sorted_outputs = torch.cat(outputs[:num_routed])
    routed = torch.empty_like(sorted_outputs).index_copy_(0, order, sorted_outputs)
    total = routed.view(num_tokens, k, -1).sum(1, dtype=torch.float32)
    for output in outputs[num_routed:]:
        total += output
    return total


def _group(experts: Tensor) -> tuple[list[int], list[int], Tensor | None]:
    """The active experts, how many (token, expert) pairs each has, and the pairs' order by expert.

    None: in the order given. Waits for the device.
    """
    flat = experts.flatten()
    if experts.shape[0] == 1:
        return flat.tolist(), [1] * flat.shape[0], None
    counts = {expert: count for expert, count in enumerate(flat.bincount().tolist()) if count}
    return list(counts), list(counts.values()), flat.argsort(stable=True)


def _activate(inner: Tensor, weights: Tensor, limit: float, round_block: int | None) -> Tensor:
    """inner: [rows, 2 * width] -> [rows, width], fp32 inside; `weights` are of the first rows."""
    a, b = inner.float().chunk(2, dim=-1)
    # the gate is clipped from above only
    product = F.silu(a.clamp(max=limit)).mul_(b.clamp(-limit, limit))
    product[: weights.shape[0]] *= weights
    product = product.to(inner.dtype)
    return product if round_block is None else round_trip_fp8(product, round_block)


def _normalise(scores: Tensor, scaling: float) -> Tensor:
    return scores.div_(scores.sum(-1, keepdim=True)).mul_(scaling)
