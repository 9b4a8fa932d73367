"""RMSNorm: fp32 inside, one cast at the end."""

from torch import Tensor

from scission.kernels.norm import reference

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x * rsqrt(mean(x ** 2) + eps) * weight over the last dim.

    Args:
        x: [.., n] float32 or bfloat16.
        weight: [n] float32; None: no weight.

    Returns:
        [.., n] of x's dtype.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    return reference.rms_norm(x, weight, eps)
