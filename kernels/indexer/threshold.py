"""Thresholds of ragged rows of scores, as the kernels that narrow and select them find them."""

import triton
import triton.language as tl

# thirds of the range between two floats, before that between their bits is halved
_FLOAT_STEPS: tl.constexpr = tl.constexpr(12)


@triton.jit
def length_of(lengths_ptr, row, RATIO: tl.constexpr):
    """A row's length, or the number of entries that a query at its position sees."""
    length = tl.load(lengths_ptr + row)
    if RATIO > 0:
        length = (length + 1) // RATIO
    return length.to(tl.int32)


@triton.jit
def order_of(x):
    """Integers ordered as the floats are; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_of(order):
    """The inverse of `order_of`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def threshold(x, count, k, slack):
    """The value that k of x reach, or up to k + slack; and how many of x to take are equal to it.

    Args:
        x: [size] float32, below 2 ** 15 of them; NaN counts as absent, `count` >= k are present.

    Returns:
        The largest value that at least k of x reach, or one that k to k + slack do, and how many
        of those equal to it belong to the k largest (size, if all).
    """
    sizes = tl.where(x == x, tl.abs(x), 0.0).to(tl.int32, bitcast=True)
    high = tl.max(sizes, axis=0).to(tl.float32, bitcast=True)
    low = -high
    # reached by num_low >= k and by num_high < k; by none above the highest
    num_low = count
    num_high = count * 0
    third = high * (2.0 / 3.0)
    step = 0
    # thirds of the values come close to thirds of the counts; infinities have none
    while (num_low > k + slack) & (step < _FLOAT_STEPS) & (third > 0.0) & (third < 1e38):
        first = low + third
        second = high - third
        # both counts in one sum
        reached = (x >= first).to(tl.int32) + ((x >= second).to(tl.int32) << 16)
        total = tl.sum(reached, axis=0)
        num_first = total & 0xFFFF
        num_second = total >> 16
        if num_second >= k:
            low = second
            num_low = num_second
        elif num_first >= k:
            low = first
            num_low = num_first
            high = second
            num_high = num_second
        else:
            high = first
            num_high = num_first
        third = (high - low) * (1.0 / 3.0)
        step += 1
    # halves of the bits end at two neighbours
    low_order = order_of(low)
    high_order = order_of(high) + (num_high == 0).to(tl.int32)
    width = (high_order - low_order).to(tl.uint32, bitcast=True)
    while (num_low > k + slack) & (width > 1):
        middle = low_order + (width // 2).to(tl.int32, bitcast=True)
        num_middle = tl.sum((x >= float_of(middle)).to(tl.int32), axis=0)
        if num_middle >= k:
            low_order = middle
            num_low = num_middle
        else:
            high_order = middle
            num_high = num_middle
        width = (high_order - low_order).to(tl.uint32, bitcast=True)
    return float_of(low_order), tl.where(num_low > k, k - num_high, 1 << 15)
