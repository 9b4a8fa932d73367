"""Grouped-query attention over listed rows of K and V: blocks, rings and fresh tokens alike."""

import torch
from torch import Tensor

from scission.kernels.dense_attention import reference
from scission.kernels.dense_attention.key_rows import KeyRows, tiles_of
from scission.kernels.target import target_of

__all__ = ["KeyRows", "attend_dense", "tiles_of"]

_HEAD_DIMS = (64, 128, 256)
_KERNEL_DTYPE = torch.bfloat16


def attend_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: KeyRows,
    scale: float,
    window: int | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention; consecutive query heads share a key-value head.

    A query at position p sees the keys at p and before, with a window those after p - window. A
    query without any key (padding) gives zeros.

    Args:
        q: [num_tokens, num_heads, head_dim].
        k, v: [pool rows, num_kv_heads, head_dim] of q's dtype; num_heads is a multiple of
            num_kv_heads.
        scale: of the scores.
        window: keys that a query sees, its own included; None: all.
        sink: [num_heads] float32, one more logit of each head's denominator, not scaled; None: no
            sink.

    Returns:
        [num_tokens, num_heads, head_dim] of q's dtype; scores, softmax and sums are fp32.
    """
    if k.shape != v.shape or q.shape[2] != k.shape[2] or (k.shape[1] and q.shape[1] % k.shape[1]):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit each other"
        )
    if keys.positions.shape != q.shape[:1] or len(keys.spans) != keys.rows.shape[0]:
        raise ValueError(
            f"{q.shape[0]} queries and {keys.rows.shape[0]} sequences do not fit "
            f"{keys.positions.shape[0]} positions and {len(keys.spans)} spans"
        )
    if sink is not None and (sink.shape != q.shape[1:2] or sink.dtype != torch.float32):
        raise ValueError(f"sink must be [{q.shape[1]}] float32, got {list(sink.shape)}")
    target = target_of(q.device)
    can_run = q.dtype == k.dtype == _KERNEL_DTYPE and q.shape[2] in _HEAD_DIMS
    if target is None or keys.tiles is None or not can_run or not q.shape[1]:
        return reference.attend_dense(q, k, v, keys, scale, window, sink)
    # only where a kernel is launched is Triton needed
    from scission.kernels.dense_attention.listed_rows import attend_listed_rows

    return attend_listed_rows(q, k, v, keys, keys.tiles, scale, window, sink, target)
