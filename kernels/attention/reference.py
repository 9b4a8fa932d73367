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
    keys = window.index_select(0, window_rows.flatten()).view(num_tokens, -1, dim)
    if entries is not None and entry_rows is not None:
        picked = entries.index_select(0, entry_rows.flatten()).view(num_tokens, -1, dim)
        keys = torch.cat([keys, picked], dim=1)
    keys = keys.float()
    scores = torch.baddbmm(bias.unsqueeze(1), q.float(), keys.mT, alpha=scale)
    with_sink = torch.cat([scores, sink.view(1, -1, 1).expand(num_tokens, -1, -1)], dim=-1)
    # [num_tokens, num_heads, num_keys]
    weights = with_sink.softmax(-1)[..., :-1]
    return torch.bmm(weights, keys).to(q.dtype)
