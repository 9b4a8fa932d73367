"""silu(gate) * up, clamped after silu or before it, and quantised in the same pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dependent_launch import await_prior, dependent
from scission.kernels.linear.rows import QuantizedRows, Scaling
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import quantize_blocks_as, round_to_bf16
from scission.kernels.target import Target

BLOCKS = 8  # of 128 channels, that a program takes
NUM_WARPS = 4


@triton.jit
def silu_mul_kernel(
    # tensors
    gate_up_ptr,
    static_scale_ptr,
    out_ptr,
    scales_ptr,
    # sizes, meta-parameters
    limit,
    num_blocks,
    HAS_LIMIT: tl.constexpr,
    CLAMPS_FIRST: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALING: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One program, some blocks of one row; out is codes, or bfloat16 with SCALING "none"."""
    row = tl.program_id(0).to(tl.int64)
    offs_b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    mask_b = offs_b < num_blocks
    offs = offs_b[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = mask_b[:, None]
    width = num_blocks * 128
    await_prior(IS_DEPENDENT)
    gates = gate_up_ptr + row * 2 * width + offs
    gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gates + width, mask=mask, other=0.0).to(tl.float32)
    if HAS_LIMIT and CLAMPS_FIRST:
        gate = tl.minimum(gate, limit)
    gate = gate / (1.0 + tl.exp(-gate))
    if HAS_LIMIT:
        if not CLAMPS_FIRST:
            gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    values = round_to_bf16(gate * up)
    outs = out_ptr + row * width + offs
    if SCALING == "none":
        tl.store(outs, values.to(tl.bfloat16), mask=mask)
    else:
        codes, scales = quantize_blocks_as(values, static_scale_ptr, SCALING)
        tl.store(outs, codes, mask=mask)
        if SCALING != "static":
            tl.store(scales_ptr + row * num_blocks + offs_b, scales, mask=mask_b)


def silu_mul(
    gate_up: Tensor,
    limit: float | None,
    clamps_first: bool,
    scaling: Scaling | None,
    static_scale: Tensor | None,
    target: Target,
) -> Tensor | QuantizedRows:
    """Of contiguous bfloat16 rows whose halves are multiples of 128 wide."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    num_blocks = width // FP8_BLOCK
    is_coded = scaling is not None
    dtype = torch.float8_e4m3fn if is_coded else gate_up.dtype
    out = gate_up.new_empty((num_rows, width), dtype=dtype)
    scales = out
    if static_scale is not None:
        scales = static_scale
    elif is_coded:
        scales = gate_up.new_empty((num_rows, num_blocks), dtype=torch.float32)
    if num_rows:
        silu_mul_kernel[(num_rows, triton.cdiv(num_blocks, BLOCKS))](
            gate_up,
            scales,
            out,
            scales,
            limit or 0.0,
            num_blocks,
            HAS_LIMIT=limit is not None,
            CLAMPS_FIRST=clamps_first,
            BLOCKS=BLOCKS,
            SCALING=scaling or "none",
            IS_DEPENDENT=target.has_ptx,
            num_warps=NUM_WARPS,
            **dependent(target),
        )
    return QuantizedRows(None, out, scales) if is_coded else out
