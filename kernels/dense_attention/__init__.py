"""Grouped-query attention over K and V of blocks, rings and fresh tokens: `attend_dense` by rows
that the host has listed, `attend_heads` from a step's projections on, where its `Places` say.
"""

import torch
from torch import Tensor

from scission.kernels.dense_attention import places_reference, reference
from scission.kernels.dense_attention.heads import Heads, Turn
from scission.kernels.dense_attention.key_rows import KeyRows
from scission.kernels.dense_attention.places_reference import turn_heads
from scission.kernels.linear import (
    QuantizedRows,
    Scaling,
    SplitSums,
    quantize_rows,
    whole_sums,
)
from scission.kernels.places import Places
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.target import target_of

__all__ = ["Heads", "KeyRows", "Turn", "attend_dense", "attend_heads", "turn_heads"]

_HEAD_DIMS = (64, 128, 256)
_KERNEL_DTYPE = torch.bfloat16
_MAX_GROUP = 15  # query heads of a key-value head
_KEYS_OF_A_TILE = 64  # of one block


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
    return reference.attend_dense(q, k, v, keys, scale, window, sink)


def attend_heads(
    qkv: Tensor | SplitSums,
    heads: Heads,
    turn: Turn,
    k_pool: Tensor,
    v_pool: Tensor,
    places: Places,
    gate: Tensor | None = None,
    scaling: Scaling | None = None,
    static_scale: Tensor | None = None,
) -> Tensor | QuantizedRows:
    """From one layer's projections to the rows that its output projection takes.

    Queries and keys are normalised, turned and scaled as `heads` and `turn` say; K and V are
    written into their blocks (or, with a window, rings of `window` rows); every query attends to
    its sequence's keys at its own position and before, with a window to those after
    position - window.
    Padding attends to nothing and gives zeros.

    Args:
        qkv: [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], or the parts of its sums; what
            it holds afterwards is not said.
        k_pool, v_pool: [pool rows, num_kv_heads, head_dim] of the activations' dtype.
        gate: [num_tokens, num_heads]: every head's output is multiplied by its sigmoid.
        scaling, static_scale: how the output is rounded, as `quantize_rows` takes them; None: it is
            given as it is.

    Returns:
        [num_tokens, num_heads * head_dim].
    """
    wanted = (heads.num_kv_heads, heads.head_dim)
    num_tokens, width = (qkv if isinstance(qkv, Tensor) else qkv.parts).shape[-2:]
    num_heads = heads.num_heads(width)
    if (
        k_pool.shape != v_pool.shape
        or tuple(k_pool.shape[1:]) != wanted
        or width % heads.head_dim
        or num_heads < 0
        or (heads.num_kv_heads and num_heads % heads.num_kv_heads)
    ):
        raise ValueError(
            f"qkv of {width} channels, k {list(k_pool.shape)} and v {list(v_pool.shape)} do not "
            f"fit {wanted[0]} key-value heads of {wanted[1]} channels"
        )
    if num_tokens != places.num_tokens:
        raise ValueError(f"{num_tokens} rows do not fit {places.num_tokens} tokens")
    target = target_of(k_pool.device)
    if target is not None and k_pool.dtype == _KERNEL_DTYPE and can_run(heads, num_heads, places):
        # a head is a block of scales, or rows are quantised after
        inside = scaling if heads.head_dim == FP8_BLOCK else None
        from scission.kernels.dense_attention.chunks import attend_chunks
        from scission.kernels.dense_attention.single_tokens import attend_single_tokens

        gate = gate.contiguous() if gate is not None else None
        static = static_scale if inside else None
        arguments = (heads, turn, k_pool, v_pool, places, gate, inside, static, target)
        if places.is_single:
            rows = attend_single_tokens(qkv, *arguments)
        else:
            rows = attend_chunks(whole_sums(qkv), *arguments)
    else:
        qkv = whole_sums(qkv)
        out = places_reference.attend_heads(qkv, heads, turn, k_pool, v_pool, places)
        if gate is not None:
            out = out * gate.float().sigmoid().to(out.dtype).unsqueeze(-1)
        rows = out.flatten(1)
    if scaling is None or isinstance(rows, QuantizedRows):
        return rows
    return quantize_rows(rows, scaling, static_scale)


def can_run(heads: Heads, num_heads: int, places: Places) -> bool:
    """Whether the kernels of `attend_heads` take these shapes."""
    return (
        heads.head_dim in _HEAD_DIMS
        and num_heads > 0
        and num_heads // heads.num_kv_heads <= _MAX_GROUP
        and (heads.q_weight is None) == (heads.k_weight is None)
        and (heads.window is not None or places.block_size % _KEYS_OF_A_TILE == 0)
    )
