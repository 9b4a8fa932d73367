"""Rows of a product, or the parts of their sums, as kernels that read them take them."""

import triton
import triton.language as tl

from scission.kernels.rounding import rounded_as


@triton.jit
def load_parts(ptrs, mask, num_parts, stride_part, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """[..] float32, of values that DTYPE holds.

    PARTS: 1: they lie at ptrs; else a bound of num_parts, of which those lie there that are added,
    float32.
    """
    x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 1:
        for part in tl.static_range(1, PARTS):
            is_part = mask & (part < num_parts)
            x += tl.load(ptrs + part * stride_part, mask=is_part, other=0.0)
        x = rounded_as(x, DTYPE)
    return x
