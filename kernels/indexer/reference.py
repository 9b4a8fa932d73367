"""The lightning indexer in plain PyTorch: the definition."""

import functools

import torch
from torch import Tensor

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


@functools.cache
def _hadamard_matrix(n: int, device: torch.device) -> Tensor:
    """[n, n] float32, symmetric and orthogonal."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    scale: float = n**-0.5
    return matrix * scale
