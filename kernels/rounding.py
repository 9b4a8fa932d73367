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
def rounded_as(x, dtype: tl.constexpr):
    """[..] float32, rounded to values that a dtype holds."""
    if dtype == tl.bfloat16:
        x = round_to_bf16(x)
    return x.to(dtype).to(tl.float32)


@triton.jit
def store_rounded(ptrs, values, mask):
    """Store float32 values as what the pointers point to: bfloat16, rounded, or float32."""
    if ptrs.dtype.element_ty == tl.bfloat16:
        values = round_to_bf16(values)
    tl.store(ptrs, values.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def round_to_e4m3(x):
    """[..] float32 within +-464 -> the nearest e4m3 code, ties to even.

    Rounded by the fp32 adder to multiples of e4m3's step in x's binade (2 ** -9 below 2 ** -6), so
    that the cast is exact on every backend.
    """
    binades = tl.maximum(tl.abs(x), 0.015625).to(tl.int32, bitcast=True) & 0x7F800000
    shift = (binades + 0x0A400000).to(tl.float32, bitcast=True)
    return ((x + shift) - shift).to(tl.float8e4nv)


@triton.jit
def quantize_blocks(x):
    """[rows, 128] float32 -> e4m3 codes and [rows] float32 scales, powers of two ("ue8m0").

    The scale is amax / 448 rounded up to a power of two, from the bits: those of 1 less those of
    448 = 1.75 * 2 ** 8, plus all mantissa bits, carry into the exponent exactly when amax is above
    448 times the power below.
    """
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-4)
    bits = (amax.to(tl.int32, bitcast=True) - 0x03E00001) & 0x7F800000
    scales = bits.to(tl.float32, bitcast=True)
    # the reciprocal of a power of two, exactly
    inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    return round_to_e4m3(x * inverse[:, None]), scales


@triton.jit
def quantize_blocks_dynamic(x):
    """[rows, 128] float32 -> e4m3 codes and [rows] float32 scales amax / 448 ("dynamic").

    Both divisions are IEEE's: a quotient is rounded once, as it is on a CPU (a product with the
    reciprocal would be rounded twice, or fused with the adder that rounds to e4m3).
    """
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-10)
    scales = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    divisors = tl.broadcast_to(scales[:, None], x.shape)
    return round_to_e4m3(tl.div_rn(x, divisors)), scales


@triton.jit
def quantize_static(x, scale):
    """[..] float32 -> e4m3 codes of x / scale, saturated; scale: a float32 scalar ("static")."""
    quotient = tl.div_rn(x, tl.full(x.shape, 1.0, tl.float32) * scale)
    return round_to_e4m3(tl.minimum(tl.maximum(quotient, -448.0), 448.0))


@triton.jit
def quantize_blocks_as(x, static_scale_ptr, SCALING: tl.constexpr):
    """[rows, 128] float32 -> e4m3 codes and [rows] float32 scales, as SCALING says.

    SCALING: of `kernels.linear.rows.Scaling`. With "static" the one scale is loaded, and what is
    returned as scales means nothing; else static_scale_ptr is not read.
    """
    if SCALING == "static":
        codes = quantize_static(x, tl.load(static_scale_ptr))
        scales = tl.full([x.shape[0]], 1.0, tl.float32)
    elif SCALING == "dynamic":
        codes, scales = quantize_blocks_dynamic(x)
    else:
        codes, scales = quantize_blocks(x)
    return codes, scales


@triton.jit
def dot_as(a, b, DOT_TYPE: tl.constexpr):
    """a @ b, both cast to DOT_TYPE, summed in float32."""
    return tl.dot(a.to(DOT_TYPE), b.to(DOT_TYPE), input_precision="ieee")
