"""RMSNorm in plain PyTorch: the definition."""

import functools

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    values = x.float()
    y = values * inverse_rms(values, eps)
    if weight is not None:
        y.mul_(weight)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """rsqrt(mean(x ** 2) + eps) over the last dim: [.., n] float32 -> [.., 1].

    By way of the norm: it reads x once and writes nothing, which pow and mean do.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_scalar(eps, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()


@functools.cache
def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)
