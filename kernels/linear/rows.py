"""Rows of activations as products with FP8 weights take them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows as e4m3 codes with a scale per 128 values, and as they were before."""

    values: Tensor | None  # [num_tokens, width] bfloat16; None: nobody needs them
    codes: Tensor  # [num_tokens, width] float8_e4m3fn
    scales: Tensor  # [num_tokens, width / 128] float32
