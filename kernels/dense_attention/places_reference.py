"""Attention where a batch's `Places` say, in plain PyTorch: the definition.

Bounds come from the host and lengths stay on the device: nothing waits for it, whatever its kind.
"""

import torch
from torch import Tensor

from scission.kernels.cache import write_paged_, write_ring_
from scission.kernels.dense_attention.heads import Heads, Turn
from scission.kernels.dense_attention.reference import attend_tile, is_seen, queries_of_tile
from scission.kernels.norm import rms_norm
from scission.kernels.places import Places
from scission.kernels.rope import rotate_halves_


def turn_heads(qkv: Tensor, heads: Heads, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [num_tokens, heads, head_dim]: normalised, turned, scaled.

    Where there is no norm, `qkv` is changed in place.
    """
    num_heads = heads.num_heads(qkv.shape[1])
    by_head = qkv.view(qkv.shape[0], -1, heads.head_dim)
    sizes = [num_heads, heads.num_kv_heads, heads.num_kv_heads]
    q, k, v = torch.split_with_sizes(by_head, sizes, dim=1)
    if heads.q_weight is not None:
        q = rms_norm(q, heads.q_weight, heads.eps)
    if heads.k_weight is not None:
        k = rms_norm(k, heads.k_weight, heads.eps)
    if heads.has_rope:
        q, k = rotate_halves_(q, turn.rotation), rotate_halves_(k, turn.rotation)
    if turn.query_scale is not None:
        q = (q.float() * turn.query_scale.view(-1, 1, 1)).to(q.dtype)
    return q, k, v


def attend_heads(
    qkv: Tensor, heads: Heads, turn: Turn, k_pool: Tensor, v_pool: Tensor, places: Places
) -> Tensor:
    q, k, v = turn_heads(qkv, heads, turn)
    # early queries of a chunk see what its late tokens overwrite in a ring
    is_kept_first = heads.window is None or places.is_single
    if is_kept_first:
        keep_(k, v, k_pool, v_pool, heads.window, places)
    out = attend_places(q, k, v, k_pool, v_pool, heads, places)
    if not is_kept_first:
        keep_(k, v, k_pool, v_pool, heads.window, places)
    return out


def keep_(
    k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, window: int | None, places: Places
) -> None:
    """Write a step's rows into their blocks or rings."""
    for pool, fresh in ((k_pool, k), (v_pool, v)):
        if window is None:
            write_paged_(pool.flatten(1), fresh.flatten(1), places)
        else:
            write_ring_(pool.flatten(1), fresh.flatten(1), window, places)


def attend_places(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    heads: Heads,
    places: Places,
) -> Tensor:
    """[num_tokens, num_heads, head_dim]: what pools hold of a chunk already is read from there."""
    num_tokens, num_heads, dim = q.shape
    # the last row takes what is computed for queries that are none
    out = q.new_zeros(num_tokens + 1, num_heads, dim)
    max_keys = places.max_context
    if heads.window is not None:
        max_keys = min(max_keys, heads.window - 1 + places.max_tokens)
    columns = torch.arange(max(max_keys, 1), device=q.device)
    shape = (heads.num_kv_heads, num_heads // heads.num_kv_heads)
    sink = heads.sink.view(*shape, 1, 1) if heads.sink is not None else None
    tile = queries_of_tile(len(columns), num_heads)
    for i in range(places.num_seqs):
        keys, values, positions = _keys_of(i, columns, k, v, k_pool, v_pool, heads, places)
        for start in range(0, places.max_tokens, tile):
            stop = min(start + tile, places.max_tokens)
            tokens = places.cu_seqlens[i] + torch.arange(start, stop, device=q.device)
            is_query = tokens < places.cu_seqlens[i + 1]
            picked = tokens.clamp(max=num_tokens - 1)
            at = torch.where(is_query, places.positions[picked], -1)
            # [kv_heads, group, queries, dim]
            queries = q[picked].view(-1, *shape, dim).permute(1, 2, 0, 3)
            seen = is_seen(at.unsqueeze(1), positions, heads.window)
            attended = attend_tile(queries, keys, values, seen, heads.scale, sink)
            rows = torch.where(is_query, tokens, num_tokens)
            out.index_copy_(0, rows, attended.permute(2, 0, 1, 3).reshape(-1, num_heads, dim))
    return out[:num_tokens]


def _keys_of(
    i: int,
    columns: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    heads: Heads,
    places: Places,
) -> tuple[Tensor, Tensor, Tensor]:
    """K and V [kv_heads, columns, dim] of one sequence, and their positions (no key: -1)."""
    context = places.context_lens[i].long()
    begin = places.cu_seqlens[i].long()
    start = context - (places.cu_seqlens[i + 1] - begin)
    first = (start - heads.window + 1).clamp(min=0) if heads.window is not None else 0
    positions = first + columns
    is_key = positions < context
    known = torch.where(is_key, positions, 0)
    if heads.window is None:
        blocks = places.block_tables[i, known // places.block_size]
        rows = blocks * places.block_size + known % places.block_size
    else:
        rows = places.slots[i] * heads.window + known % heads.window
    is_fresh = known >= start if heads.window is not None and not places.is_single else None
    both = []
    for pool, fresh in ((k_pool, k), (v_pool, v)):
        found = pool.index_select(0, rows)
        if is_fresh is not None:
            tokens = (begin + known - start).clamp(0, fresh.shape[0] - 1)
            found = torch.where(is_fresh.view(-1, 1, 1), fresh[tokens], found)
        # a mask takes weights out, not values that are no numbers
        both.append(found.masked_fill(~is_key.view(-1, 1, 1), 0.0).transpose(0, 1))
    return both[0], both[1], torch.where(is_key, positions, -1)
