"""Grouped-query attention in plain PyTorch: the definition.

Sequences of one query are computed as one padded batch, longer ones one by one, a tile of queries
at a time against the keys that the tile can see.
"""

import torch
from torch import Tensor

from scission.kernels.dense_attention.key_rows import KeyRows

# elements of one tile of scores (or gathered keys of a padded batch): 64 MiB in fp32
_TILE_ELEMENTS = 1 << 24
_ABSENT = float("-inf")


def attend_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: KeyRows,
    scale: float,
    window: int | None,
    sink: Tensor | None,
) -> Tensor:
    out = torch.empty_like(q)
    if not q.shape[1]:
        return out
    single = [i for i, (_, num_queries, _) in enumerate(keys.spans) if num_queries == 1]
    widest = max((keys.spans[i][2] for i in single), default=1)
    tile = max(_TILE_ELEMENTS // max(widest * k.shape[1] * k.shape[2], 1), 1)
    for first in range(0, len(single), tile):
        _attend_single(out, q, k, v, keys, single[first : first + tile], scale, window, sink)
    for i, (_, num_queries, _) in enumerate(keys.spans):
        if num_queries > 1:
            _attend_chunk(out, q, k, v, keys, i, scale, window, sink)
    return out


def _attend_single(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: KeyRows,
    sequences: list[int],
    scale: float,
    window: int | None,
    sink: Tensor | None,
) -> None:
    """Sequences of one query each, as one padded batch; written to `out`."""
    num_keys = max(max(keys.spans[i][2] for i in sequences), 1)
    picked = torch.tensor(sequences, device=q.device)
    tokens = torch.tensor([keys.spans[i][0] for i in sequences], device=q.device)
    rows = keys.rows[picked, :num_keys]
    positions = keys.firsts[picked].unsqueeze(1) + torch.arange(num_keys, device=q.device)
    seen = is_seen(keys.positions[tokens].unsqueeze(1), positions, window)
    # [seqs, kv_heads, num_keys, dim]
    k_rows, v_rows = (
        pool.index_select(0, rows.flatten()).view(*rows.shape, *pool.shape[1:]).transpose(1, 2)
        for pool in (k, v)
    )
    num_kv_heads, dim = k.shape[1:]
    group = q.shape[1] // num_kv_heads
    # [seqs, kv_heads, group, 1, dim]
    queries = q.index_select(0, tokens).view(len(sequences), num_kv_heads, group, 1, dim)
    sinks = sink.view(num_kv_heads, group, 1, 1) if sink is not None else None
    values = attend_tile(queries, k_rows, v_rows, seen.view(-1, 1, 1, 1, num_keys), scale, sinks)
    out.index_copy_(0, tokens, values.view(len(sequences), -1, dim))


def _attend_chunk(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: KeyRows,
    sequence: int,
    scale: float,
    window: int | None,
    sink: Tensor | None,
) -> None:
    """The queries of one sequence; written to `out`."""
    first, num_queries, num_keys = keys.spans[sequence]
    num_kv_heads, dim = k.shape[1:]
    group = q.shape[1] // num_kv_heads
    rows = keys.rows[sequence, :num_keys]
    # [kv_heads, num_keys, dim]
    k_rows, v_rows = (pool.index_select(0, rows).transpose(0, 1) for pool in (k, v))
    sinks = sink.view(num_kv_heads, group, 1, 1) if sink is not None else None
    columns = torch.arange(num_keys, device=q.device)
    positions = keys.firsts[sequence] + columns
    tile = queries_of_tile(num_keys, q.shape[1])
    tile = min(tile, max(window, 128)) if window is not None else tile
    for start in range(0, num_queries, tile):
        stop = min(start + tile, num_queries)
        # the tile's queries are the sequence's last keys but num_queries - start
        last = num_keys - num_queries + stop
        low = max(0, last - (stop - start) - window + 1) if window is not None else 0
        tokens = slice(first + start, first + stop)
        seen = is_seen(keys.positions[tokens].unsqueeze(1), positions[low:last], window)
        # [kv_heads, group, queries, dim]
        queries = q[tokens].view(stop - start, num_kv_heads, group, dim).permute(1, 2, 0, 3)
        values = attend_tile(
            queries,
            k_rows[:, low:last],
            v_rows[:, low:last],
            seen,
            scale,
            sinks,
        )
        out[tokens] = values.permute(2, 0, 1, 3).reshape(stop - start, -1, dim)


def attend_tile(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, sink: Tensor | None
) -> Tensor:
    """[.., group, queries, dim] by [.., keys, dim], all heads of a group by the same keys.

    `seen` and `sink` broadcast to [.., group, queries, keys].
    """
    queries = (q.float() * scale).flatten(-3, -2)
    # [.., group, queries, keys]
    scores = torch.unflatten(torch.matmul(queries, k.float().mT), -2, q.shape[-3:-1])
    scores = scores.masked_fill_(~seen, _ABSENT)
    if sink is not None:
        scores = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)
    if sink is not None:
        weights = weights[..., :-1]
    # where nothing is seen the softmax is 0 / 0
    weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    values = torch.matmul(weights.flatten(-3, -2), v.float())
    return torch.unflatten(values, -2, q.shape[-3:-1]).to(q.dtype)


def queries_of_tile(num_keys: int, num_heads: int) -> int:
    """How many queries' scores are held at once."""
    return max(_TILE_ELEMENTS // max(num_keys * num_heads, 1), 1)


def is_seen(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether a query at a position sees the key at another; the two broadcast."""
    seen = (keys <= queries) & (keys >= 0)
    return seen if window is None else seen & (keys > queries - window)
