"""The gate of a gated feed-forward layer, clamped after silu or before it."""

from torch import Tensor

from scission.kernels.activation import reference
from scission.kernels.linear import QuantizedRows, Scaling, quantize_rows

__all__ = ["clamped_silu_mul", "silu_mul", "silu_mul_rows"]


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
    return reference.silu_mul(gate_up, limit)


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
    rows = quantize_rows(reference.silu_mul(gate_up, limit), quantizes, static_scale)
    return QuantizedRows(values=None, codes=rows.codes, scales=rows.scales)


def clamped_silu_mul(gate_up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clip(up, -limit, limit): DeepSeek-V4 clamps before silu.

    The gate is clipped from above only; shapes as in `silu_mul`.
    """
    _check(gate_up)
    return reference.clamped_silu_mul(gate_up, limit)


def _check(gate_up: Tensor) -> None:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up must be as wide as each other, got {list(gate_up.shape)}")
