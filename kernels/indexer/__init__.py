"""The lightning indexer: scores every entry for every query and picks the best."""

import torch
from torch import Tensor

from scission.kernels.indexer import reference

__all__ = ["hadamard", "pick_rows", "score_entries"]


def hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform of the last dim n, a power of two: natural order, by n ** -0.5."""
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, got {n}")
    return reference.hadamard(x)


def score_entries(
    q: Tensor, weights: Tensor, keys: Tensor, rows: Tensor, sequences: Tensor, bias: Tensor
) -> Tensor:
    """sum_h weights_h * max(0, q_h . key) for every entry of the query's own sequence. fp32.

    Args:
        q: [num_tokens, num_heads, dim].
        weights: [num_tokens, num_heads] float32, any sign.
        keys: [pool rows, dim].
        rows: [num_seqs, max_entries] int64: the pool row of each sequence's entries.
        sequences: [num_tokens] int64: row of `rows`.
        bias: [num_tokens, max_entries] float32: -inf where an entry is not visible, else 0.

    Returns:
        [num_tokens, max_entries] float32.
    """
    if bias.shape != (q.shape[0], rows.shape[1]) or weights.shape != q.shape[:2]:
        raise ValueError(
            f"q {list(q.shape)}, weights {list(weights.shape)}, rows {list(rows.shape)} and "
            f"bias {list(bias.shape)} do not fit"
        )
    if weights.dtype != torch.float32 or bias.dtype != torch.float32:
        raise ValueError(f"weights and bias must be float32, got {weights.dtype}, {bias.dtype}")
    return reference.score_entries(q, weights, keys, rows, sequences, bias)


def pick_rows(scores: Tensor, rows: Tensor, sequences: Tensor, top_k: int) -> Tensor:
    """The pool rows of the best entries of each query; of equal scores the lowest entry wins.

    Args:
        scores: [num_tokens, max_entries] float32; -inf where an entry is not visible.
        rows, sequences: as in `score_entries`.
        top_k: any number below max_entries.

    Returns:
        [num_tokens, top_k] int64, best first: rows of invisible entries stand at the end, where a
        query sees fewer than top_k.
    """
    if not 0 < top_k <= scores.shape[1]:
        raise ValueError(f"top_k must be within 1 .. {scores.shape[1]}, got {top_k}")
    return reference.pick_rows(scores, rows, sequences, top_k)
