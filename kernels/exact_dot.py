"""A product with float32 weights on matrix units that take bfloat16."""

import triton
import triton.language as tl


@triton.jit
def dot_exact(w, x, acc, DOT_TYPE: tl.constexpr):
    """acc + w @ x, summed in float32, for x whose values bfloat16 holds; w is not rounded.

    The three bfloat16 numbers that a float32 is the sum of are multiplied one by one; of a
    bfloat16 w there is one. DOT_TYPE: bfloat16, or float32 where there are no such units.
    """
    if DOT_TYPE == tl.float32:
        acc = tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    elif w.dtype == tl.bfloat16:
        acc = tl.dot(w, x.to(DOT_TYPE), acc)
    else:
        x = x.to(DOT_TYPE)
        high = w.to(DOT_TYPE)
        rest = w - high.to(tl.float32)
        middle = rest.to(DOT_TYPE)
        low = (rest - middle.to(tl.float32)).to(DOT_TYPE)
        acc = tl.dot(high, x, acc)
        acc = tl.dot(middle, x, acc)
        acc = tl.dot(low, x, acc)
    return acc
