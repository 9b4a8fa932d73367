"""RMSNorm, alone and with the residual sum before it: fp32 inside, one cast at the end."""

import torch
from torch import Tensor

from scission.kernels.linear import (
    QuantizedRows,
    Scaling,
    SplitSums,
    quantize_rows,
    whole_sums,
)
from scission.kernels.norm import reference
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.target import target_of

__all__ = ["add_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x ** 2) + eps) * weight over the last dim.

    Args:
        x: [.., n] float32 or bfloat16.
        weight: [n] float32; None: no weight.

    Returns:
        [.., n] of x's dtype.
    """
    _check_weight(x, weight)
    return reference.rms_norm(x, weight, eps)


def add_norm(
    x: Tensor,
    y: Tensor | SplitSums | None,
    weight: Tensor,
    eps: float,
    quantizes: Scaling | None = None,
    static_scale: Tensor | None = None,
    *,
    keeps_values: bool = False,
) -> tuple[Tensor, Tensor | QuantizedRows]:
    """The residual sum, and its RMSNorm as the next layer takes it.

    Args:
        x: [num_tokens, d] float32 or bfloat16.
        y: like x, or the parts of its sums; None: nothing is added.
        weight: [d] float32.
        quantizes: how the normalised rows are scaled; None: they stay as they are.
        static_scale: [] float32, with "static" and only there.
        keeps_values: the rows are wanted before quantisation as well.

    Returns:
        x + y [num_tokens, d] (x itself where there is no y), and the normalised rows of x's dtype.
    """
    _check_weight(x, weight)
    if x.dim() != 2 or not _fits(x, y):
        raise ValueError(f"x must be [num_tokens, d] and y like it, got {list(x.shape)}")
    target = target_of(x.device)
    if target is not None and x.dtype == torch.bfloat16 and x.shape[1] % FP8_BLOCK == 0:
        # only where a kernel is launched is Triton needed
        from scission.kernels.norm import add_rows

        y = y.contiguous() if isinstance(y, Tensor) else y
        return add_rows.add_norm(
            x.contiguous(), y, weight, eps, quantizes, static_scale, keeps_values, target
        )
    total = x if y is None else x + whole_sums(y)
    normed = reference.rms_norm(total, weight, eps)
    if quantizes is None:
        return total, normed
    rows = quantize_rows(normed, quantizes, static_scale)
    return total, rows if keeps_values else QuantizedRows(
        values=None, codes=rows.codes, scales=rows.scales
    )


def _fits(x: Tensor, y: Tensor | SplitSums | None) -> bool:
    if isinstance(y, SplitSums):
        return y.parts.shape[1:] == x.shape
    return y is None or (y.shape == x.shape and y.dtype == x.dtype)


def _check_weight(x: Tensor, weight: Tensor | None) -> None:
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
