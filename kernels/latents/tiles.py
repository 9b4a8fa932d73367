"""What kernels do with rows that they hold: casts, rotations, transforms and round trips."""

import triton
import triton.language as tl
from triton import knobs

from scission.kernels.rounding import round_to_bf16

# a cast alone rounds to nearest on every backend, but truncates in the interpreter
_CAST_ROUNDS = tl.constexpr(not knobs.runtime.interpret)


@triton.jit
def through_bf16(x):
    """[..] float32, rounded to values that bfloat16 holds."""
    if _CAST_ROUNDS:
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        return round_to_bf16(x)


@triton.jit
def norm_rows(x, eps, WIDTH: tl.constexpr):
    """[rows, padded] float32, zeros from column WIDTH on: x * rsqrt(mean(x ** 2) + eps)."""
    return x * tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)[:, None]


@triton.jit
def load_rotation(rotation_ptr, WIDTH: tl.constexpr, ROPE_DIM: tl.constexpr, PADDED: tl.constexpr):
    """Cosines and sines [PADDED / 2] of one token for rows of WIDTH: pairs before the last
    ROPE_DIM channels stay as they are.
    """
    pairs = tl.arange(0, PADDED // 2)
    at = pairs - (WIDTH - ROPE_DIM) // 2
    is_turned = (at >= 0) & (pairs < WIDTH // 2)
    cos = tl.load(rotation_ptr + 2 * at, mask=is_turned, other=1.0)
    sin = tl.load(rotation_ptr + 2 * at + 1, mask=is_turned, other=0.0)
    return cos, sin


@triton.jit
def turn_pairs(x, cos, sin):
    """[rows, n] float32, cos and sin [n / 2]: (a, b) -> (a cos - b sin, a sin + b cos)."""
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), x.shape)


@triton.jit
def _round_to_grid(x, lowest, MANTISSA_BITS: tl.constexpr):
    """To nearest, ties to even, in a float format whose smallest normal is `lowest`: the fp32
    adder leaves multiples of the step in x's binade.
    """
    binades = tl.maximum(tl.abs(x), lowest).to(tl.int32, bitcast=True) & 0x7F800000
    shift = (binades + (((23 - MANTISSA_BITS) << 23) + (1 << 22))).to(tl.float32, bitcast=True)
    return (x + shift) - shift


@triton.jit
def round_trip_kv(x):
    """[blocks, 64] float32 through e4m3 with a power-of-two scale a block, and back."""
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-4)
    # scale * 2 ** -6, the smallest normal; the carry past 448's mantissa rounds the scale up
    lowest = ((amax.to(tl.int32, bitcast=True) - 0x06E00001) & 0x7F800000).to(
        tl.float32, bitcast=True
    )
    return _round_to_grid(x, lowest[:, None], 3)


@triton.jit
def round_trip_index(x):
    """[groups, 32] float32 through e2m1 with a power-of-two scale a group, and back."""
    # 6 * 2 ** -126
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), 7.052966104933725e-38)
    # scale * 1, the smallest normal
    lowest = ((amax.to(tl.int32, bitcast=True) - 0x00C00001) & 0x7F800000).to(
        tl.float32, bitcast=True
    )
    return _round_to_grid(x, lowest[:, None], 1)


@triton.jit
def round_kv_row(x, WIDTH: tl.constexpr, ROPE_DIM: tl.constexpr):
    """[1, padded] float32: the round trip, in blocks of 64, of the channels before the last
    ROPE_DIM of WIDTH.
    """
    offs = tl.arange(0, x.shape[1])[None, :]
    is_plain = offs < WIDTH - ROPE_DIM
    blocks = tl.reshape(tl.where(is_plain, x, 0.0), [x.shape[1] // 64, 64])
    return tl.where(is_plain, tl.reshape(round_trip_kv(blocks), x.shape), x)


@triton.jit
def signs(SIZE: tl.constexpr):
    """[SIZE, SIZE] float32, SIZE at most 256: the Hadamard matrix in natural order, 1 and -1."""
    bits = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    # bit i of the constant is the parity of i
    is_odd = (0x6996 >> ((bits ^ (bits >> 4)) & 15)) & 1
    # the bits of 1, and of its sign
    return ((is_odd << 31) | 0x3F800000).to(tl.float32, bitcast=True)
