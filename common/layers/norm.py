"""RMSNorm with a weight from the checkpoint."""

import torch
from torch import Tensor

from scission.common.checkpoint.weights import Weights
from scission.kernels.linear import QuantizedRows, Scaling, SplitSums
from scission.kernels.norm import add_norm, rms_norm


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

    def add(
        self,
        x: Tensor,
        y: Tensor | SplitSums | None,
        quantizes: Scaling | None = None,
        static_scale: Tensor | None = None,
        *,
        keeps_values: bool = False,
    ) -> tuple[Tensor, Tensor | QuantizedRows]:
        """x + y and its norm, quantised or not: `add_norm` with this weight."""
        return add_norm(
            x, y, self.weight, self.eps, quantizes, static_scale, keeps_values=keeps_values
        )
