"""Sparse attention with a sink in plain PyTorch: the definition."""

import torch
from torch import Tensor

# gathered key elements of one tile of tokens: 32 MiB in fp32
_TILE_ELEMENTS = 1 << 23


def attend(
    q: Tensor,
    window: Tensor,
    window_rows: Tensor,
    entries: Tensor | None,
    entry_rows: Tensor | None,
    bias: Tensor,
    sink: Tensor,
    scale: float,
) -> Tensor:
    num_tokens, _, dim = q.shape
    tile = max(_TILE_ELEMENTS // (bias.shape[1] * dim), 1)
    if num_tokens <= tile:
        return _attend_tile(q, window, window_rows, entries, entry_rows, bias, sink, scale)
    out = torch.empty_like(q)
    for first in range(0, num_tokens, tile):
        part = slice(first, first + tile)
        rows = entry_rows[part] if entry_rows is not None else None
        out[part] = _attend_tile(
            q[part], window, window_rows[part], entries, rows, bias[part], sink, scale
        )
    return out


def _attend_tile(
    q: Tensor,
    window: Tensor,
    window_rows: Tensor,
    entries: Tensor | None,
    entry_rows: Tensor | None,
    bias: Tensor,
    sink: Tensor,
    scale: float,
) -> Tensor:
    num_tokens, _, dim = q.shape
    queries = q.float()
    # products apart, scores together: the gathered keys are the large part, and are not copied
    pools = [(window, window_rows)]
    if entries is not None and entry_rows is not None:
        pools.append((entries, entry_rows))
    keys = [
        pool.index_select(0, rows.flatten()).view(num_tokens, -1, dim).float()
        for pool, rows in pools
    ]
    widths = [part.shape[1] for part in keys]
    biases = torch.split_with_sizes(bias.unsqueeze(1), widths, dim=2)
    scores = [
        torch.baddbmm(part_bias, queries, part.mT, alpha=scale)
        for part_bias, part in zip(biases, keys, strict=True)
    ]
    scores.append(sink.view(1, -1, 1).expand(num_tokens, -1, -1))
    # [num_tokens, num_heads, num_keys + 1]
    weights = torch.cat(scores, dim=-1).softmax(-1)
    out = torch.bmm(weights[..., : widths[0]], keys[0])
    if len(keys) > 1:
        out.baddbmm_(weights[..., widths[0] : -1], keys[1])
    return out.to(q.dtype)
