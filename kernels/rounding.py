"""Conversions that Triton's backends and its interpreter must agree on, bit for bit."""

import triton
import triton.language as tl


@triton.jit
def round_to_bf16(x):
    """[..] float32, rounded to values that bfloat16 holds: to nearest, ties to even.

    A cast alone truncates in the interpreter.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    rounded = (bits & -65536).to(tl.float32, bitcast=True)
    # a NaN's bits may be all ones, which would carry into the sign
    return tl.where(x == x, rounded, x)


@triton.jit
def store_rounded(ptrs, values, mask):
    """Store float32 values as what the pointers point to: bfloat16, rounded, or float32."""
    if ptrs.dtype.element_ty == tl.bfloat16:
        values = round_to_bf16(values)
    tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def quantize_blocks(x):
    """[rows, 128] float32 -> e4m3 codes and [rows] float32 scales.

    The scale is amax / 448 rounded up to a power of two, from the bits: those of 1 less those of
    448 = 1.75 * 2 ** 8, plus all mantissa bits, carry into the exponent exactly when amax is above
    448 times the power below.
    """
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-4)
    bits = (amax.to(tl.int32, bitcast=True) - 0x03E00001) & 0x7F800000
    scales = bits.to(tl.float32, bitcast=True)
    # the reciprocal of a power of two, exactly
    inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    x = x * inverse[:, None]
    # rounded by the fp32 adder to multiples of e4m3's step in x's binade (2 ** -9 below 2 ** -6),
    # so that the cast is exact
    binades = tl.maximum(tl.abs(x), 0.015625).to(tl.int32, bitcast=True) & 0x7F800000
    shift = (binades + 0x0A400000).to(tl.float32, bitcast=True)
    return ((x + shift) - shift).to(tl.float8e4nv), scales


@triton.jit
def dot_as(a, b, DOT_TYPE: tl.constexpr):
    """a @ b, both cast to DOT_TYPE, summed in float32."""
    return tl.dot(a.to(DOT_TYPE), b.to(DOT_TYPE), input_precision="ieee")
