"""The sum of each token's rows, and of what else is added to it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.rounding import store_rounded

BLOCK = 1024


@triton.jit
def sum_rows_kernel(
    # tensors
    rows_ptr,
    row_of_ptr,
    plus_ptr,
    out_ptr,
    # sizes, meta-parameters
    num_rows,
    width,
    num_choices,
    num_parts,
    HAS_PLUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, part of one token: its rows in order of choice, float32 inside."""
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < width
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(num_choices):
        row = tl.load(row_of_ptr + token * num_choices + choice)
        mask_row = mask & (row >= 0)
        for part in range(num_parts):
            start = (part * num_rows + row).to(tl.int64) * width
            total += tl.load(rows_ptr + start + offs, mask=mask_row, other=0.0).to(tl.float32)
    if HAS_PLUS:
        total += tl.load(plus_ptr + token * width + offs, mask=mask, other=0.0).to(tl.float32)
    store_rounded(out_ptr + token * width + offs, total, mask)


def sum_rows(rows: Tensor, row_of: Tensor, plus: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[num_tokens, d] of `dtype`.

    Args:
        rows: [num_parts, num_rows, d] float32 or bfloat16, contiguous.
        row_of: [num_tokens, k] int32, contiguous; -1: no row.
        plus: [num_tokens, d] of any float dtype; None: nothing.
    """
    num_parts, num_rows, width = rows.shape
    num_tokens, num_choices = row_of.shape
    out = torch.empty(num_tokens, width, dtype=dtype, device=rows.device)
    if num_tokens:
        sum_rows_kernel[(num_tokens, triton.cdiv(width, BLOCK))](
            rows,
            row_of,
            plus.contiguous() if plus is not None else rows,
            out,
            num_rows,
            width,
            num_choices,
            num_parts,
            HAS_PLUS=plus is not None,
            BLOCK=BLOCK,
        )
    return out
