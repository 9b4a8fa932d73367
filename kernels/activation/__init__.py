"""The gate of a gated feed-forward layer, clamped after silu or before it."""

import torch
from torch import Tensor

from scission.kernels.activation import reference
from scission.kernels.linear import QuantizedRows, Scaling, quantize_rows
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.target import target_of

__all__ = ["clamped_silu_mul", "clamped_silu_mul_rows", "silu_mul", "silu_mul_rows"]


def silu_mul(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """min(silu(gate), limit) * clip(up, -limit, limit), fp32 inside.

    silu is never below -0.28, so the gate needs no lower bound.

    Args:
        gate_up: [.., 2 * inner], gate then up.
        limit: None: no clamp.

    Returns:
        [.., inner] of gate_up's dtype.
    """
    _check(gate_up)
    values = _launched(gate_up, limit, False)
    return values if isinstance(values, Tensor) else reference.silu_mul(gate_up, limit)


def silu_mul_rows(
    gate_up: Tensor,
    limit: float | None,
    quantizes: Scaling,
    static_scale: Tensor | None = None,
) -> QuantizedRows:
    """`silu_mul`, quantised as the next layer takes it.

    Args:
        gate_up: [num_tokens, 2 * inner], gate then up.
        quantizes, static_scale: of `quantize_rows`.
    """
    _check(gate_up)
    coded = _launched(gate_up, limit, False, quantizes, static_scale)
    if isinstance(coded, QuantizedRows):
        return coded
    rows = quantize_rows(reference.silu_mul(gate_up, limit), quantizes, static_scale)
    return QuantizedRows(values=None, codes=rows.codes, scales=rows.scales)


def clamped_silu_mul(gate_up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit): DeepSeek-V4 clamps before silu.

    The gate is clipped from above only; shapes as in `silu_mul`.
    """
    _check(gate_up)
    values = _launched(gate_up, limit, True)
    return values if isinstance(values, Tensor) else reference.clamped_silu_mul(gate_up, limit)


def clamped_silu_mul_rows(gate_up: Tensor, limit: float) -> QuantizedRows:
    """`clamped_silu_mul`, quantised as DeepSeek-V4's layers take it ("ue8m0")."""
    _check(gate_up)
    coded = _launched(gate_up, limit, True, "ue8m0")
    if isinstance(coded, QuantizedRows):
        return coded
    rows = quantize_rows(reference.clamped_silu_mul(gate_up, limit), "ue8m0")
    return QuantizedRows(values=None, codes=rows.codes, scales=rows.scales)


def _launched(
    gate_up: Tensor,
    limit: float | None,
    clamps_first: bool,
    quantizes: Scaling | None = None,
    static_scale: Tensor | None = None,
) -> Tensor | QuantizedRows | None:
    """None: no kernel takes this."""
    target = target_of(gate_up.device)
    fits = gate_up.dim() == 2 and gate_up.shape[1] % (2 * FP8_BLOCK) == 0
    if target is None or gate_up.dtype != torch.bfloat16 or not fits:
        return None
    # only where a kernel is launched is Triton needed
    from scission.kernels.activation.silu_rows import silu_mul as launch

    return launch(gate_up.contiguous(), limit, clamps_first, quantizes, static_scale, target)


def _check(gate_up: Tensor) -> None:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up must be as wide as each other, got {list(gate_up.shape)}")
