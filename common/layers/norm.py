"""RMSNorm with a weight from the checkpoint."""

import torch
from torch import Tensor

from scission.common.checkpoint.weights import Weights
from scission.kernels.norm import rms_norm


class RMSNorm:
    """The weight is bf16 on disk and fp32 in memory; zero-centred ones are stored less one."""

    def __init__(
        self, w: Weights, name: str, dim: int, eps: float, *, is_zero_centered: bool = False
    ) -> None:
        weight = w.tensor(f"{name}.weight", (dim,), torch.bfloat16).float()
        self.weight = weight + 1 if is_zero_centered else weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """[.., dim] -> [.., dim], fp32 inside."""
        return rms_norm(x, self.weight, self.eps)
