"""What the kernels over per-head K and V share: heads as they are read, attended and handed on.

Intermediate values are rounded where the references round theirs.
"""

import triton
import triton.language as tl

from scission.kernels.linear.sum_parts import load_parts
from scission.kernels.rounding import quantize_blocks_as, rounded_as


@triton.jit
def load_turned(
    ptrs,
    mask,
    is_key,
    q_weight_ptr,
    k_weight_ptr,
    rotation_ptr,
    query_scale_ptr,
    eps,
    num_parts,
    stride_part,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_QUERY_SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One token's heads that begin at ptrs [rows], normalised, turned and (queries) scaled.

    is_key: [rows], which of them are of keys. weights: [HEAD_DIM]. rotation_ptr: [PAIRS, 2],
    cosines beside sines; not read where PAIRS is 0. query_scale_ptr: one number. num_parts, PARTS:
    of `load_parts`. DTYPE: of the activations.

    Returns:
        [rows, HEAD_DIM] float32; zeros where masked.
    """
    offs_d = tl.arange(0, HEAD_DIM)
    is_first = offs_d < PAIRS
    is_turned = offs_d < 2 * PAIRS
    # the other channel of a pair, read again: it lies in another thread
    others = tl.where(is_turned, tl.where(is_first, offs_d + PAIRS, offs_d - PAIRS), offs_d)
    mask = mask[:, None]
    x = load_parts(ptrs[:, None] + offs_d[None, :], mask, num_parts, stride_part, PARTS, DTYPE)
    y = x
    if PAIRS > 0:
        y = load_parts(ptrs[:, None] + others[None, :], mask, num_parts, stride_part, PARTS, DTYPE)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        q_weight, k_weight = tl.load(q_weight_ptr + offs_d), tl.load(k_weight_ptr + offs_d)
        weight = tl.where(is_key[:, None], k_weight[None, :], q_weight[None, :])
        x = rounded_as(x * inverse * weight, DTYPE)
        if PAIRS > 0:
            q_weight, k_weight = tl.load(q_weight_ptr + others), tl.load(k_weight_ptr + others)
            weight = tl.where(is_key[:, None], k_weight[None, :], q_weight[None, :])
            y = rounded_as(y * inverse * weight, DTYPE)
    if PAIRS > 0:
        angles = rotation_ptr + offs_d % PAIRS * 2
        cos = tl.load(angles, mask=is_turned, other=1.0)
        sin = tl.load(angles + 1, mask=is_turned, other=0.0)
        sin = tl.where(is_first, -sin, sin)
        x = rounded_as(x * cos[None, :] + y * sin[None, :], DTYPE)
    if HAS_QUERY_SCALE:
        scaled = rounded_as(x * tl.load(query_scale_ptr), DTYPE)
        x = tl.where(is_key[:, None], x, scaled)
    return x


@triton.jit
def add_keys(q, k, v, seen, scale, largest, total, values, IS_MASKED: tl.constexpr):
    """One more tile of keys in the running softmax of rows.

    q: [rows, HEAD_DIM], k and v: [keys, HEAD_DIM]; seen: [rows, keys], read with IS_MASKED.
    scale: of scores, times log2(e). largest, total: [rows] float32, the largest scaled score and
    the sum of exponentials; values: [rows, HEAD_DIM] float32, not normalised.
    """
    scores = tl.dot(q, tl.trans(k))
    if IS_MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
    shift = new_largest
    if IS_MASKED:
        # a row that has seen nothing yet has no largest score
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weights = tl.exp2(scores * scale - shift[:, None])
    fade = tl.exp2(largest - shift)
    total = total * fade + tl.sum(weights, 1)
    values = tl.dot(weights.to(v.dtype), v, values * fade[:, None])
    return new_largest, total, values


@triton.jit
def normalized(largest, total, values, sink_ptr, heads, mask, HAS_SINK: tl.constexpr):
    """[rows, HEAD_DIM]: the sums divided by their weights' total; zeros where nothing was seen.

    sink_ptr: [num_heads] float32, in units of e; heads: [rows].
    """
    divisor = tl.where(total == 0.0, 1.0, total)
    if HAS_SINK:
        sink = tl.load(sink_ptr + heads, mask=mask, other=0.0) * 1.4426950408889634
        # where nothing was seen the values are zeros, whatever divides them
        divisor += tl.exp2(sink - tl.where(total == 0.0, sink, largest))
    return values / divisor[:, None]


@triton.jit
def store_heads(
    values,
    rows,
    mask,
    out_ptr,
    scales_ptr,
    gates_ptr,
    HAS_GATE: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALING: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Finished heads [rows, HEAD_DIM] float32, gated and rounded as their reader takes them.

    rows: [rows], token * num_heads + head. gates_ptr: [rows], of DTYPE as the activations.
    SCALING: of `quantize_blocks_as`, a head being a block of 128, "none" for DTYPE as it is; with
    "static" scales_ptr is the one scale, which is read.
    """
    values = rounded_as(values, DTYPE)
    if HAS_GATE:
        gate = tl.load(gates_ptr, mask=mask, other=0.0).to(tl.float32)
        gate = rounded_as(1.0 / (1.0 + tl.exp(-gate)), DTYPE)
        values = rounded_as(values * gate[:, None], DTYPE)
    outs = out_ptr + rows[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    if SCALING == "none":
        tl.store(outs, values.to(DTYPE), mask=mask[:, None])
    else:
        codes, scales = quantize_blocks_as(values, scales_ptr, SCALING)
        tl.store(outs, codes, mask=mask[:, None])
        if SCALING != "static":
            tl.store(scales_ptr + rows, scales, mask=mask)
