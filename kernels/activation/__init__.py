"""The gate of a gated feed-forward layer, clamped after silu."""

from torch import Tensor

from scission.kernels.activation import reference

__all__ = ["silu_mul"]


def silu_mul(gate_up: Tensor, limit: float | None = None) -> Tensor:
    """min(silu(gate), limit) * clip(up, -limit, limit), fp32 inside.

    silu is never below -0.28, so the gate needs no lower bound.

    Args:
        gate_up: [.., 2 * inner], gate then up.
        limit: None: no clamp.

    Returns:
        [.., inner] of gate_up's dtype.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up must be as wide as each other, got {list(gate_up.shape)}")
    return reference.silu_mul(gate_up, limit)
