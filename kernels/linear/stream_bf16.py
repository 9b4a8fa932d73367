"""y = x Wᵀ over bfloat16 weights for few rows: the weights are streamed, the sums stay fp32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.dependent_launch import await_prior, dependent, release_next
from scission.kernels.linear.split_sums import add_splits, pick_split
from scission.kernels.rounding import dot_as, store_rounded
from scission.kernels.target import Target

# H200, us of 1 row / 32 rows, float32 out, and of the library: [2688, 4096] 8.5 / 9.8 and 10.7 /
# 11.2; [151936, 4096] 280 / 296 and 342 / 349; its bytes take 4.9 and 277
MAX_ROWS = 32
BLOCK_N = 64
BLOCK_K = 128
NUM_WARPS = 4
_NUM_PROGRAMS = 192


def row_tiles() -> tuple[int, ...]:
    """Of how many rows a program's tile is, at most MAX_ROWS."""
    return (16, MAX_ROWS)


def num_stages(target: Target) -> int:
    # 16 KiB of weights and up to 8 KiB of rows a stage
    return target.num_stages(4)


@triton.jit(do_not_specialize=["num_rows", "blocks_per_split"])
def stream_bf16_kernel(
    # tensors
    x_ptr,
    w_ptr,
    out_ptr,
    # sizes, strides in elements, meta-parameters
    num_rows,
    out_features,
    in_features,
    blocks_per_split,
    stride_x_row,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One program, BLOCK_N outputs of all rows over blocks_per_split blocks of BLOCK_K inputs.

    out: [split, num_rows, out_features]. The weight is the left operand: few rows are not padded
    to 64.
    """
    split = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < out_features
    mask_m = offs_m < num_rows
    # outputs past the end read the last row and are never stored
    rows_n = tl.where(mask_n, offs_n, out_features - 1)
    w_ptrs = w_ptr + rows_n[:, None] * in_features + offs_k[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_x_row + offs_k[None, :]
    first = split.to(tl.int32) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, in_features // BLOCK_K)
    await_prior(IS_DEPENDENT)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(first, last, num_stages=NUM_STAGES):
        w = tl.load(w_ptrs + block * BLOCK_K)
        x = tl.load(x_ptrs + block * BLOCK_K, mask=mask_m[:, None], other=0.0)
        acc += dot_as(w, x.T, DOT_TYPE)
    release_next(IS_DEPENDENT)
    out_ptrs = out_ptr + (split * num_rows + offs_m[None, :]) * out_features + offs_n[:, None]
    store_rounded(out_ptrs, acc, mask_n[:, None] & mask_m[None, :])


def stream_bf16(x: Tensor, w: Tensor, out_dtype: torch.dtype, target: Target) -> Tensor:
    """[n, in] -> [n, out] of out_dtype.

    Args:
        x: [n, in] bfloat16, n at most MAX_ROWS; in is a multiple of BLOCK_K.
        w: [out, in] bfloat16, contiguous.
        out_dtype: float32 or bfloat16.
    """
    num_rows, in_features = x.shape
    out_features = w.shape[0]
    out = torch.empty(num_rows, out_features, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    num_tiles = triton.cdiv(out_features, BLOCK_N)
    num_blocks = in_features // BLOCK_K
    split = pick_split(num_tiles, num_blocks, _NUM_PROGRAMS)
    partials = out if split == 1 else torch.empty(split, *out.shape, device=x.device)
    stream_bf16_kernel[(num_tiles, split)](
        x,
        w,
        partials,
        num_rows,
        out_features,
        in_features,
        triton.cdiv(num_blocks, split),
        x.stride(0),
        BLOCK_N=BLOCK_N,
        BLOCK_M=next(rows for rows in row_tiles() if num_rows <= rows),
        BLOCK_K=BLOCK_K,
        DOT_TYPE=tl.bfloat16 if target.decoded == "bfloat16" else tl.float32,
        NUM_STAGES=num_stages(target),
        IS_DEPENDENT=target.has_ptx,
        num_warps=NUM_WARPS,
        **dependent(target),
    )
    return out if split == 1 else add_splits(partials, out, target)
