"""The lightning indexer in plain PyTorch: the definition."""

import functools
import itertools

import torch
from torch import Tensor

from scission.kernels.places import Places

# gathered key elements of one tile of tokens: 32 MiB in fp32
_TILE_ELEMENTS = 1 << 23


def hadamard(x: Tensor) -> Tensor:
    return (x.float() @ _hadamard_matrix(x.shape[-1], x.device)).to(x.dtype)


def score_entries(
    q: Tensor, weights: Tensor, keys: Tensor, rows: Tensor, sequences: Tensor, bias: Tensor
) -> Tensor:
    num_tokens, _, dim = q.shape
    num_seqs, max_entries = rows.shape
    q = q.float()
    # [num_seqs, max_entries, dim]
    gathered = keys.index_select(0, rows.flatten()).view(num_seqs, max_entries, dim).float()
    if num_seqs == 1:
        return _score(q, weights, gathered, bias)
    tile = max(_TILE_ELEMENTS // (max_entries * dim), 1)
    scores = torch.empty_like(bias)
    for first in range(0, num_tokens, tile):
        part = slice(first, first + tile)
        own = gathered.index_select(0, sequences[part])
        scores[part] = _score(q[part], weights[part], own, bias[part])
    return scores


def _score(q: Tensor, weights: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """keys: [num_tokens or 1, max_entries, dim]."""
    # [num_tokens, num_heads, max_entries]
    matches = torch.matmul(q, keys.mT).relu_()
    return torch.baddbmm(bias.unsqueeze(1), weights.unsqueeze(1), matches).squeeze(1)


def pick_rows(scores: Tensor, rows: Tensor, sequences: Tensor, top_k: int) -> Tensor:
    # a stable sort keeps the lower of two equal entries first, which topk does not promise
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :top_k]
    return rows[sequences.unsqueeze(1), order]


def top_k(scores: Tensor, lengths: Tensor, k: int) -> Tensor:
    num_columns = scores.shape[1]
    columns = torch.arange(max(num_columns, k), device=scores.device)
    scores = scores.masked_fill(columns[:num_columns] >= lengths.unsqueeze(1), float("-inf"))
    # of equal scores the lowest column stands first, and so do those within the row
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices
    best = torch.nn.functional.pad(best, (0, columns.shape[0] - num_columns))[:, :k]
    is_absent = columns[:k] >= lengths.unsqueeze(1)
    picks = best.masked_fill(is_absent, num_columns).sort(dim=1).values
    return picks.masked_fill(is_absent, -1).int()


def pick_entries(
    q: Tensor, weights: Tensor, keys: Tensor, k: int, ratio: int, places: Places
) -> Tensor:
    picks = torch.full((q.shape[0], k), -1, dtype=torch.int32, device=q.device)
    visible = (places.positions + 1) // ratio
    rows_per_block = places.block_size // ratio
    bounds = places.cu_seqlens.tolist()
    for sequence, (start, end) in enumerate(itertools.pairwise(bounds)):
        num_entries = int(visible[start:end].max()) if end > start else 0
        if not num_entries:
            continue
        entries = torch.arange(num_entries, device=q.device)
        blocks = places.block_tables[sequence, entries // rows_per_block]
        rows = blocks * rows_per_block + entries % rows_per_block
        own = keys.index_select(0, rows).float().unsqueeze(0)
        tile = max(_TILE_ELEMENTS // (num_entries * q.shape[1]), 1)
        for first in range(start, end, tile):
            part = slice(first, min(first + tile, end))
            bias = torch.zeros(part.stop - first, num_entries, device=q.device)
            scores = _score(q[part].float(), weights[part], own, bias)
            best = top_k(scores, visible[part], k)
            picks[part] = torch.where(best < 0, -1, rows[best.clamp_min(0)]).int()
    return picks


@functools.cache
def _hadamard_matrix(n: int, device: torch.device) -> Tensor:
    """[n, n] float32, symmetric and orthogonal."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    scale: float = n**-0.5
    return matrix * scale
