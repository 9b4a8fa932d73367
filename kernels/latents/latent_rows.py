"""The query latent normalised and quantised, the key-value row normalised, turned, rounded and
kept: one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.latents.tiles import (
    load_rotation,
    norm_rows,
    round_kv_row,
    through_bf16,
    turn_pairs,
)
from scission.kernels.linear.rows import QuantizedRows
from scission.kernels.places import Places
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import quantize_blocks

NUM_WARPS = 2


@triton.jit
def _query_latent(
    x_ptr,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    values_ptr,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    KEEPS_VALUES: tl.constexpr,
):
    offs = tl.arange(0, PADDED)
    mask = offs < WIDTH
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)[None, :]
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)[None, :]
    x = through_bf16(norm_rows(x, eps, WIDTH) * weight)
    if KEEPS_VALUES:
        tl.store(values_ptr + offs, tl.reshape(x, [PADDED]).to(tl.bfloat16), mask=mask)
    codes, scales = quantize_blocks(tl.reshape(x, [PADDED // 128, 128]))
    tl.store(codes_ptr + offs, tl.reshape(codes, [PADDED]), mask=mask)
    blocks = tl.arange(0, PADDED // 128)
    tl.store(scales_ptr + blocks, scales, mask=blocks < (WIDTH + 127) // 128)


@triton.jit
def _key_value_row(
    x_ptr,
    weight_ptr,
    rotation_ptr,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    offs = tl.arange(0, PADDED)
    mask = offs < WIDTH
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)[None, :]
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)[None, :]
    cos, sin = load_rotation(rotation_ptr, WIDTH, ROPE_DIM, PADDED)
    x = through_bf16(turn_pairs(through_bf16(norm_rows(x, eps, WIDTH) * weight), cos, sin))
    if ROUNDS:
        x = round_kv_row(x, WIDTH, ROPE_DIM)
    return tl.reshape(x, [PADDED]).to(tl.bfloat16)


@triton.jit
def norm_latents_kernel(
    # tensors
    x_ptr,
    q_weight_ptr,
    kv_weight_ptr,
    rotation_ptr,
    positions_ptr,
    slots_ptr,
    codes_ptr,
    scales_ptr,
    values_ptr,
    kv_ptr,
    ring_ptr,
    # sizes, strides in elements, meta-parameters
    eps,
    window,
    stride_x_token,
    stride_rotation_token,
    Q_LORA: tl.constexpr,
    Q_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ROUNDS_KV: tl.constexpr,
    HAS_RING: tl.constexpr,
    KEEPS_VALUES: tl.constexpr,
):
    """One program, one token's query latent or its key-value row; with a ring, a token is the only
    one of its sequence.
    """
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * stride_x_token
    if tl.program_id(1) == 0:
        _query_latent(
            x_ptr,
            q_weight_ptr,
            codes_ptr + token * Q_LORA,
            scales_ptr + token * ((Q_LORA + 127) // 128),
            values_ptr + token * Q_LORA,
            eps,
            Q_LORA,
            Q_PADDED,
            KEEPS_VALUES,
        )
    else:
        kv = _key_value_row(
            x_ptr + Q_LORA,
            kv_weight_ptr,
            rotation_ptr + token * stride_rotation_token,
            eps,
            DIM,
            DIM_PADDED,
            ROPE_DIM,
            ROUNDS_KV,
        )
        channels = tl.arange(0, DIM_PADDED)
        tl.store(kv_ptr + token * DIM + channels, kv, mask=channels < DIM)
        if HAS_RING:
            position = tl.load(positions_ptr + token)
            if position >= 0:
                row = tl.load(slots_ptr + token) * window + position % window
                tl.store(ring_ptr + row * DIM + channels, kv, mask=channels < DIM)


def norm_latents(
    x: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    eps: float,
    rotation: Tensor,
    round_kv: bool,
    ring: Tensor | None,
    window: int,
    places: Places,
    keeps_values: bool,
) -> tuple[QuantizedRows, Tensor]:
    assert x.stride(1) == 1 and rotation.stride(1) == 1
    assert ring is None or ring.is_contiguous()
    num_tokens = x.shape[0]
    q_lora, dim = q_weight.shape[0], kv_weight.shape[0]
    codes = torch.empty(num_tokens, q_lora, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_tokens, -(-q_lora // FP8_BLOCK), device=x.device)
    values = x.new_empty(num_tokens, q_lora) if keeps_values else None
    kv = x.new_empty(num_tokens, dim)
    if num_tokens:
        norm_latents_kernel[(num_tokens, 2)](
            x,
            q_weight,
            kv_weight,
            torch.view_as_real(rotation),
            places.positions,
            places.slots,
            codes,
            scales,
            kv if values is None else values,
            kv,
            kv if ring is None else ring,
            eps,
            window,
            x.stride(0),
            2 * rotation.stride(0),
            Q_LORA=q_lora,
            Q_PADDED=padded(q_lora, FP8_BLOCK),
            DIM=dim,
            DIM_PADDED=padded(dim, 64),
            ROPE_DIM=2 * rotation.shape[1],
            ROUNDS_KV=round_kv,
            HAS_RING=ring is not None and places.is_single,
            KEEPS_VALUES=keeps_values,
            num_warps=NUM_WARPS,
        )
    return QuantizedRows(codes=codes, scales=scales, values=values), kv


def padded(width: int, block: int) -> int:
    """A power of two that holds the width, of whole blocks."""
    return max(1 << (width - 1).bit_length(), block)
