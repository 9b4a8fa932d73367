"""The lightning indexer: scores every entry for every query and picks the best."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.kernels.indexer import reference
from scission.kernels.places import Places
from scission.kernels.target import target_of

__all__ = ["can_pick", "hadamard", "pick_entries", "pick_rows", "score_entries", "top_k"]

_KERNEL_DTYPE = torch.bfloat16
# heads of one product are a tile of a matrix unit
_NUM_HEADS = (16, 32, 64, 128)
_DIMS = (64, 128, 256)


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


def pick_entries(
    q: Tensor, weights: Tensor, keys: Tensor, top_k: int, ratio: int, places: Places
) -> Tensor:
    """The entries a query attends to: those of the largest sum_h weights_h * max(0, q_h . key).

    A query at position p sees the (p + 1) // ratio first entries of its sequence; where these are
    top_k at most it attends to all, and nothing is scored. Of equal scores the lowest entry wins.
    Entry e lies in row block_table[e // n] * n + e % n of the pool, n = block_size / ratio.

    Args:
        q: [num_tokens, num_heads, dim], rotated, transformed and rounded as the keys are.
        weights: [num_tokens, num_heads] float32, any sign.
        keys: [pool rows, dim] of q's dtype; rows of entries that no query sees are never read.
        ratio: tokens an entry.

    Returns:
        [num_tokens, top_k] int32 pool rows in the order of their entries, then -1.
    """
    if q.ndim != 3 or weights.shape != q.shape[:2] or places.positions.shape != q.shape[:1]:
        raise ValueError(
            f"q {list(q.shape)}, weights {list(weights.shape)} and "
            f"{places.num_tokens} positions do not fit"
        )
    if keys.ndim != 2 or keys.shape[1] != q.shape[2] or keys.dtype != q.dtype:
        raise ValueError(
            f"keys must be [rows, {q.shape[2]}] {q.dtype}, got {list(keys.shape)} {keys.dtype}"
        )
    if weights.dtype != torch.float32:
        raise ValueError(f"weights must be float32, got {weights.dtype}")
    if top_k < 1 or ratio < 1 or places.block_size % ratio:
        raise ValueError(
            f"top_k {top_k} and ratio {ratio} must be positive, and ratio divide "
            f"the block size {places.block_size}"
        )
    target = target_of(q.device)
    num_heads, dim = q.shape[1:]
    if target is None or not q.shape[0] or q.dtype != _KERNEL_DTYPE or not can_pick(num_heads, dim):
        return reference.pick_entries(q, weights, keys, top_k, ratio, places)
    # only where a kernel is launched is Triton needed
    from scission.kernels.indexer.pick import pick_scored

    q, weights = with_more_heads(q, weights, min(n for n in _NUM_HEADS if n >= num_heads))
    return pick_scored(q.contiguous(), weights, keys, top_k, ratio, places, target)


def can_pick(num_heads: int, dim: int) -> bool:
    """Whether there are kernels for bfloat16 queries of such heads."""
    return num_heads <= _NUM_HEADS[-1] and dim in _DIMS


def with_more_heads(q: Tensor, weights: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Heads of zeros behind those of `pick_entries`, up to `num_heads`: they change no score."""
    missing = num_heads - q.shape[1]
    if not missing:
        return q, weights
    return F.pad(q, (0, 0, 0, missing)), F.pad(weights, (0, missing))


def top_k(scores: Tensor, lengths: Tensor, k: int) -> Tensor:
    """The columns of each row's k largest scores; of equal scores the lowest column wins.

    Args:
        scores: [num_rows, max_length] float32, no NaN; what lies past a row's length is not read.
        lengths: [num_rows] int32.
        k: any number; it may exceed the lengths.

    Returns:
        [num_rows, k] int32, ascending; where a row is shorter than k, -1 follows its columns.
    """
    if scores.ndim != 2 or scores.dtype != torch.float32:
        raise ValueError(
            f"scores must be [rows, columns] float32, got {list(scores.shape)} {scores.dtype}"
        )
    if lengths.shape != scores.shape[:1] or lengths.dtype != torch.int32:
        raise ValueError(
            f"lengths must be [{scores.shape[0]}] int32, got {list(lengths.shape)} {lengths.dtype}"
        )
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    target = target_of(scores.device)
    if target is None or not scores.numel():
        return reference.top_k(scores, lengths, k)
    from scission.kernels.indexer.select import select_columns

    out = torch.empty(scores.shape[0], k, dtype=torch.int32, device=scores.device)
    # rows of adjacent columns
    rows = scores if scores.stride(1) == 1 else scores.contiguous()
    select_columns(rows, lengths.contiguous(), k, out, target)
    return out
