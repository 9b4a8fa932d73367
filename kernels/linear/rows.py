"""Rows of activations that were quantised before they are multiplied, and how they are scaled."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scission.kernels.quant import FP8_BLOCK

# ue8m0: amax / 448 of 128 values, rounded up to a power of two (DeepSeek-V4); dynamic: amax / 448
# of 128 values as it is (Qwen3, Step); static: one scale that the checkpoint brings (Ministral)
Scaling = Literal["ue8m0", "dynamic", "static"]


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """[num_tokens, d] as e4m3 codes; value = code * scale.

    `values`, where a producer keeps them, are the rows before they were rounded: what a layer
    multiplies that rounds no input.
    """

    values: Tensor | None  # [num_tokens, d] bfloat16 (float32 from the references)
    codes: Tensor  # [num_tokens, d] float8_e4m3fn
    scales: Tensor  # [num_tokens, ceil(d / 128)] float32; [] of all, with a static scale

    @property
    def num_tokens(self) -> int:
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        return self.codes.shape[1]

    @property
    def is_static(self) -> bool:
        return self.scales.dim() == 0

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[num_tokens, d] of `dtype`: what the codes stand for."""
        values = self.codes.float()
        if self.is_static:
            return (values * self.scales).to(dtype)
        scales = self.scales.repeat_interleave(FP8_BLOCK, dim=1)[:, : self.width]
        return (values * scales).to(dtype)


@dataclass(frozen=True, slots=True)
class SplitSums:
    """[num_tokens, d] of a product whose inputs were split: who reads it adds the parts up, in fp32
    and always in the same order, and rounds to bfloat16. That saves a pass over them.
    """

    parts: Tensor  # [split, num_tokens, d] float32

    @property
    def num_tokens(self) -> int:
        return self.parts.shape[1]

    @property
    def width(self) -> int:
        return self.parts.shape[2]


# what a linear layer takes, and what one gives that may leave the adding up to its reader
Rows = Tensor | QuantizedRows
Sums = Tensor | SplitSums
