"""Sparse attention with a sink in plain PyTorch: the definition."""

import torch
from torch import Tensor

from scission.kernels.places import Places
from scission.kernels.rope.reference import rotate_

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


def attend_sparse(
    q: Tensor,
    kv: Tensor,
    ring: Tensor,
    window: int,
    entries: Tensor | None,
    picks: Tensor | None,
    ratio: int,
    sink: Tensor,
    scale: float,
    inverse: Tensor,
    places: Places,
) -> Tensor:
    num_tokens, _, dim = q.shape
    max_entries = places.max_context // ratio if ratio and picks is None else 0
    num_keys = window + (picks.shape[1] if picks is not None else max_entries)
    tile = max(_TILE_ELEMENTS // (num_keys * dim), 1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, num_tokens, tile):
        tokens = torch.arange(first, min(first + tile, num_tokens), device=q.device)
        keys = [_window_keys(tokens, kv, ring, window, places)]
        if entries is not None:
            keys.append(_entry_keys(tokens, entries, picks, ratio, max_entries, places))
        gathered = torch.cat([values for values, _ in keys], dim=1).float()
        is_absent = torch.cat([absent for _, absent in keys], dim=1)
        part = slice(first, first + tile)
        scores = torch.einsum("thd,tnd->thn", q[part].float(), gathered) * scale
        scores = scores.masked_fill(is_absent.unsqueeze(1), float("-inf"))
        sinks = sink.view(1, -1, 1).expand(scores.shape[0], -1, -1)
        # [tokens, num_heads, num_keys + 1]
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)
        values = torch.einsum("thn,tnd->thd", weights[..., :-1], gathered)
        out[part] = rotate_(values, inverse[part])
    return out


def _window_keys(
    tokens: Tensor, kv: Tensor, ring: Tensor, window: int, places: Places
) -> tuple[Tensor, Tensor]:
    """[tokens, window, dim], zeros where absent, and which are; the query's own position first."""
    back = torch.arange(window, device=tokens.device)
    sequences = places.sequences[tokens]
    positions = places.positions[tokens].unsqueeze(1) - back
    fresh = tokens.unsqueeze(1) - back
    is_fresh = fresh >= places.cu_seqlens[sequences].unsqueeze(1)
    rows = places.slots[sequences].unsqueeze(1) * window + positions % window
    keys = torch.where(is_fresh.unsqueeze(-1), kv[fresh.clamp_min(0)], ring[rows])
    is_absent = positions < 0
    return keys.masked_fill_(is_absent.unsqueeze(-1), 0), is_absent


def _entry_keys(
    tokens: Tensor,
    entries: Tensor,
    picks: Tensor | None,
    ratio: int,
    max_entries: int,
    places: Places,
) -> tuple[Tensor, Tensor]:
    """[tokens, max_entries or picks, dim], zeros where absent, and which are."""
    if picks is not None:
        rows = picks[tokens].long()
        is_absent = rows < 0
    else:
        numbers = torch.arange(max_entries, device=tokens.device)
        is_absent = numbers >= ((places.positions[tokens] + 1) // ratio).unsqueeze(1)
        rows_per_block = places.block_size // ratio
        blocks = places.block_tables[:, numbers // rows_per_block]
        rows = (blocks * rows_per_block + numbers % rows_per_block)[places.sequences[tokens]]
    keys = entries[rows.masked_fill(is_absent, 0)]
    return keys.masked_fill_(is_absent.unsqueeze(-1), 0), is_absent
