"""Query heads normalised and turned in place, and the indexer's queries made ready."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.latents.latent_rows import padded
from scission.kernels.latents.tiles import (
    load_rotation,
    norm_rows,
    round_trip_index,
    signs,
    through_bf16,
    turn_pairs,
)
from scission.kernels.rounding import dot_as
from scission.kernels.target import Target

HEADS = 4  # of a program
HEADS_WARPS = 4
NUM_WARPS = 4
PROGRAMS = 528  # each makes the matrix once: four a multiprocessor of an H200


@triton.jit
def turn_heads_kernel(
    # tensors
    q_ptr,
    rotation_ptr,
    # sizes, strides in elements, meta-parameters
    eps,
    num_heads,
    stride_q_token,
    stride_q_head,
    stride_rotation_token,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program, some heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    offs = tl.arange(0, DIM_PADDED)[None, :]
    mask = (heads < num_heads) & (offs < DIM)
    ptrs = q_ptr + token * stride_q_token + heads * stride_q_head + offs
    x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    rotation_ptr += token * stride_rotation_token
    cos, sin = load_rotation(rotation_ptr, DIM, ROPE_DIM, DIM_PADDED)
    x = turn_pairs(through_bf16(norm_rows(x, eps, DIM)), cos, sin)
    tl.store(ptrs, through_bf16(x).to(tl.bfloat16), mask=mask)


def turn_heads_(q: Tensor, eps: float, rotation: Tensor) -> Tensor:
    assert q.stride(2) == 1 and rotation.stride(1) == 1
    num_tokens, num_heads, dim = q.shape
    if q.numel():
        turn_heads_kernel[(num_tokens, triton.cdiv(num_heads, HEADS))](
            q,
            torch.view_as_real(rotation),
            eps,
            num_heads,
            q.stride(0),
            q.stride(1),
            2 * rotation.stride(0),
            DIM=dim,
            DIM_PADDED=padded(dim, 64),
            ROPE_DIM=2 * rotation.shape[1],
            HEADS=HEADS,
            num_warps=HEADS_WARPS,
        )
    return q


@triton.jit
def index_queries_kernel(
    # tensors
    q_ptr,
    rotation_ptr,
    out_ptr,
    # sizes, strides in elements, meta-parameters
    num_tokens,
    num_heads,
    scale,
    stride_q_token,
    stride_q_head,
    stride_rotation_token,
    DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROUNDS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """Programs take tiles of heads of one token in turn."""
    tiles = (num_heads + BLOCK_M - 1) // BLOCK_M
    offs = tl.arange(0, DIM)[None, :]
    if ROUNDS:
        matrix = signs(DIM).to(DOT_TYPE)
    for tile in range(tl.program_id(0), num_tokens * tiles, tl.num_programs(0)):
        token = (tile // tiles).to(tl.int64)
        heads = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask = (heads < num_heads) & (offs < DIM)
        ptrs = q_ptr + token * stride_q_token + heads * stride_q_head + offs
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        cos, sin = load_rotation(rotation_ptr + token * stride_rotation_token, DIM, ROPE_DIM, DIM)
        x = through_bf16(turn_pairs(x, cos, sin))
        if ROUNDS:
            x = through_bf16(dot_as(x, matrix, DOT_TYPE) * scale)
            groups = round_trip_index(tl.reshape(x, [BLOCK_M * DIM // 32, 32]))
            x = tl.reshape(groups, [BLOCK_M, DIM])
        outs = out_ptr + (token * num_heads + heads) * DIM + offs
        tl.store(outs, x.to(tl.bfloat16), mask=mask)


def index_queries(q: Tensor, rotation: Tensor, rounds: bool, target: Target) -> Tensor:
    assert q.stride(2) == 1 and rotation.stride(1) == 1
    num_tokens, num_heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel():
        block_m = tile_heads(num_tokens, target)
        num_tiles = num_tokens * triton.cdiv(num_heads, block_m)
        index_queries_kernel[(min(num_tiles, PROGRAMS),)](
            q,
            torch.view_as_real(rotation),
            out,
            num_tokens,
            num_heads,
            dim**-0.5,
            q.stride(0),
            q.stride(1),
            2 * rotation.stride(0),
            DIM=dim,
            ROPE_DIM=2 * rotation.shape[1],
            BLOCK_M=block_m,
            ROUNDS=rounds,
            DOT_TYPE=getattr(tl, target.decoded),
            num_warps=NUM_WARPS,
        )
    return out


def tile_heads(num_tokens: int, target: Target) -> int:
    """Few tokens spread over more programs: 16 heads take 3.2 us for one token and 7.5 us for 128
    on an H200, 64 heads 4.3 and 5.0 us. 64 heads and the matrix spill on gfx1201.
    """
    if num_tokens <= 16:
        return 16
    return 64 if target.backend == "cuda" else 32
