"""Attention over a sliding window and compressed entries together, with a sink.

`attend` takes rows that the host has listed; `attend_sparse` finds them by the batch's places.
"""

import torch
from torch import Tensor

from scission.kernels.attention import reference
from scission.kernels.places import Places
from scission.kernels.target import target_of

__all__ = ["attend", "attend_sparse", "can_attend_sparse"]

_DIMS = (64, 128, 256, 512)
_KERNEL_DTYPE = torch.bfloat16


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
    """One softmax per head over a query's window rows and entry rows together; key is value.

    A sink logit per head takes part in the denominator only. Absent keys have bias -inf; their row
    numbers must name rows with finite content. A query without any key gives zeros.

    Args:
        q: [num_tokens, num_heads, dim].
        window: [window pool rows, dim]; `window_rows`: [num_tokens, num_window] int64 into it.
        entries: [entry pool rows, dim]; `entry_rows`: [num_tokens, num_entries]; or both None.
        bias: [num_tokens, num_window + num_entries] float32, added to the scaled scores: 0 or -inf.
        sink: [num_heads] float32, not scaled.
        scale: of the scores.

    Returns:
        [num_tokens, num_heads, dim] of q's dtype; scores, softmax and sums are fp32.
    """
    num_keys = window_rows.shape[1] + (entry_rows.shape[1] if entry_rows is not None else 0)
    if (entries is None) != (entry_rows is None):
        raise ValueError("entries and entry_rows come together")
    if bias.shape != (q.shape[0], num_keys) or bias.dtype != torch.float32:
        raise ValueError(
            f"bias must be {[q.shape[0], num_keys]} float32, got {list(bias.shape)} {bias.dtype}"
        )
    if sink.shape != (q.shape[1],) or window.shape[1] != q.shape[2]:
        raise ValueError(
            f"q {list(q.shape)} does not fit sink {list(sink.shape)}, window {list(window.shape)}"
        )
    return reference.attend(q, window, window_rows, entries, entry_rows, bias, sink, scale)


def can_attend_sparse(dim: int) -> bool:
    """Whether there are kernels of `attend_sparse` for bfloat16 rows of this width."""
    return dim in _DIMS


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
    """`attend` for every token of a batch, the outputs turned back; nothing asked of the host.

    A query at position p sees the window's positions (p - window, p] and the entries of its
    picks or, without picks, every entry e < (p + 1) // ratio of its sequence. A window position
    from the chunk's start on is read from `kv`, an earlier one from the ring, which may hold the
    chunk's rows already only where nothing a query still sees was overwritten: of chunks of one
    token. Padding gives zeros; rows that no query sees may hold anything.

    Args:
        q: [num_tokens, num_heads, dim], normalised and turned.
        kv: [num_tokens, dim]: this step's rows, key and value in one.
        ring: [slots * window, dim]: row slot * window + position % window.
        entries: [pool rows, dim]: entry e of a sequence lies in its block e // n, n = block_size //
            ratio, at row block * n + e % n; None exactly where ratio is 0: the window alone.
        picks: [num_tokens, k] int32 rows of entries: min(k, (p + 1) // ratio) of them, then -1.
        ratio: tokens of an entry, which divides the block size.
        sink: [num_heads] float32, one more logit of each head's denominator, not scaled.
        scale: of the scores.
        inverse: [num_tokens, rope_dim / 2] complex64, turns the outputs' last channels.

    Returns:
        [num_tokens, num_heads, dim] of q's dtype, contiguous; all between is fp32.
    """
    num_tokens, num_heads, dim = q.shape
    if num_tokens != places.num_tokens or kv.shape != (num_tokens, dim):
        raise ValueError(
            f"q {list(q.shape)} and kv {list(kv.shape)} do not fit {places.num_tokens} tokens"
        )
    if sink.shape != (num_heads,) or sink.dtype != torch.float32:
        raise ValueError(f"sink must be [{num_heads}] float32, got {list(sink.shape)}")
    if ring.shape[1:] != (dim,) or ring.shape[0] % window:
        raise ValueError(f"ring {list(ring.shape)} does not hold windows of {window} rows of {dim}")
    if (entries is None) != (ratio == 0) or (entries is None and picks is not None):
        raise ValueError(f"entries come with their ratio, picks with entries; ratio is {ratio}")
    if ratio and places.block_size % ratio:
        raise ValueError(f"blocks of {places.block_size} tokens hold no whole entries of {ratio}")
    if picks is not None and (picks.shape[0] != num_tokens or picks.dtype != torch.int32):
        raise ValueError(f"picks must be [{num_tokens}, k] int32, got {list(picks.shape)}")
    if inverse.shape[0] != num_tokens or 2 * inverse.shape[1] > dim:
        raise ValueError(f"inverse {list(inverse.shape)} does not fit q {list(q.shape)}")
    target = target_of(q.device)
    pools = [kv, ring] if entries is None else [kv, ring, entries]
    can_run = q.stride(2) == 1 and all(p.is_contiguous() and p.dtype == q.dtype for p in pools)
    if target is not None and can_run and q.dtype == _KERNEL_DTYPE and can_attend_sparse(dim):
        # only where a kernel is launched is Triton needed, and Gluon on Hopper alone
        from scission.kernels.attention import sparse_rows

        arguments = (q, kv, ring, window, entries, picks, ratio, sink, scale, inverse, places)
        if target.name == "sm_90":
            from scission.kernels.attention import hopper_rows

            if hopper_rows.is_faster(num_tokens, num_heads, dim):
                return hopper_rows.attend_rows(*arguments, target)
        return sparse_rows.attend_rows(*arguments, target)
    return reference.attend_sparse(
        q, kv, ring, window, entries, picks, ratio, sink, scale, inverse, places
    )
