"""Attention over listed rows, a sliding window and compressed entries together, with a sink."""

import torch
from torch import Tensor

from scission.kernels.attention import reference

__all__ = ["attend"]


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
