"""The residual sum, its RMS norm and the quantised rows in one pass, a row a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dependent_launch import await_prior, dependent
from scission.kernels.linear.rows import QuantizedRows, Scaling, SplitSums
from scission.kernels.linear.sum_parts import load_parts
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import quantize_blocks_as, round_to_bf16
from scission.kernels.target import Target

# rows of a batch from which on programs are narrow: many of them fill the chip
_MANY_ROWS = 256


@triton.jit(do_not_specialize=["num_parts"])
def add_norm_kernel(
    # tensors
    x_ptr,
    y_ptr,
    weight_ptr,
    static_scale_ptr,
    total_ptr,
    normed_ptr,
    codes_ptr,
    scales_ptr,
    # sizes, meta-parameters
    eps,
    num_blocks,
    num_parts,
    stride_y_part,
    BLOCKS: tl.constexpr,
    PARTS: tl.constexpr,
    KEEPS_VALUES: tl.constexpr,
    SCALING: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One program, one row of num_blocks * 128 values; sums and normalised rows are bfloat16.

    PARTS: 0: there is no y; 1: y is bfloat16; else a bound of num_parts: y is their sum, float32.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_b = tl.arange(0, BLOCKS)
    mask_b = offs_b < num_blocks
    offs = offs_b[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = mask_b[:, None]
    width = num_blocks * 128
    # no kernel writes weights
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    await_prior(IS_DEPENDENT)
    x = tl.load(x_ptr + row * width + offs, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        ys = y_ptr + row * width + offs
        y = load_parts(ys, mask, num_parts, stride_y_part, PARTS, tl.bfloat16)
        x = round_to_bf16(x + y)
        tl.store(total_ptr + row * width + offs, x.to(tl.bfloat16), mask=mask)
    squares = tl.sum(tl.sum(x * x, axis=1), axis=0)
    normed = round_to_bf16(x * tl.rsqrt(squares / width + eps) * weight)
    if KEEPS_VALUES:
        tl.store(normed_ptr + row * width + offs, normed.to(tl.bfloat16), mask=mask)
    if SCALING != "none":
        codes, scales = quantize_blocks_as(normed, static_scale_ptr, SCALING)
        tl.store(codes_ptr + row * width + offs, codes, mask=mask)
        if SCALING != "static":
            tl.store(scales_ptr + row * num_blocks + offs_b, scales, mask=mask_b)


def num_warps(num_rows: int) -> int:
    """Alone a row is a chain of loads: more threads hold fewer values each."""
    return 8 if num_rows < _MANY_ROWS else 4


def add_norm(
    x: Tensor,
    y: Tensor | SplitSums | None,
    weight: Tensor,
    eps: float,
    scaling: Scaling | None,
    static_scale: Tensor | None,
    keeps_values: bool,
    target: Target,
) -> tuple[Tensor, Tensor | QuantizedRows]:
    """As `kernels.norm.add_norm`: bfloat16, contiguous, d a multiple of 128."""
    num_rows, width = x.shape
    num_blocks = width // FP8_BLOCK
    keeps_values = keeps_values or scaling is None
    y_rows = y.parts if isinstance(y, SplitSums) else y
    num_parts = y.parts.shape[0] if isinstance(y, SplitSums) else 1
    total = torch.empty_like(x) if y is not None else x
    normed = torch.empty_like(x) if keeps_values else x
    codes, scales = x, x
    if scaling is not None:
        codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
        if static_scale is not None:
            scales = static_scale
        else:
            scales = x.new_empty((num_rows, num_blocks), dtype=torch.float32)
    if num_rows:
        add_norm_kernel[(num_rows,)](
            x,
            y_rows if y_rows is not None else x,
            weight,
            scales,
            total,
            normed,
            codes,
            scales,
            eps,
            num_blocks,
            num_parts,
            x.numel(),
            BLOCKS=triton.next_power_of_2(num_blocks),
            PARTS=0 if y is None else triton.next_power_of_2(num_parts),
            KEEPS_VALUES=keeps_values,
            SCALING=scaling or "none",
            IS_DEPENDENT=target.has_ptx,
            num_warps=num_warps(num_rows),
            **dependent(target),
        )
    if scaling is None:
        return total, normed
    return total, QuantizedRows(normed if keeps_values else None, codes, scales)
