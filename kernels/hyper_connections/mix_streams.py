"""Two launches a sublayer: what is pending is written and the streams scored; then x is read.

The first goes over the streams by slices of d, which all programs share out, and leaves partial
sums of the coefficients; the second adds them, always in the same order, mixes x, normalises and
quantises it, a token a program, while programs of their own work out how x's successor is written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.exact_dot import dot_exact
from scission.kernels.moe.outputs import ExpertOutputs
from scission.kernels.quant import FP8_BLOCK
from scission.kernels.rounding import quantize_blocks, round_to_bf16, store_rounded
from scission.kernels.target import Target

NUM_STREAMS = 4
BLOCK_T = 16
SCORE_WARPS = 4
# tokens of a program that works out how they are written, where their sums are whole
LANES = 64
WRITE_BLOCK = 1024
# up to which a program takes one token, and from which a product of matrices is quicker
FEW_TOKENS = 8
MANY_TOKENS = 256
_MAX_SPLIT = 128
# about four programs a multiprocessor
_NUM_PROGRAMS = 512


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Partial sums [split, num_tokens, columns] float32: the products with fn, then sum(v ** 2)."""

    partials: Tensor
    num_coefficients: int

    @property
    def split(self) -> int:
        return self.partials.shape[0]


def read_warps(num_blocks: int) -> int:
    """Every warp of a writer computes the same: more of them only take turns. 64 blocks of 128
    channels need the registers of 8."""
    return 4 if num_blocks <= 32 else 8


def columns_of(num_coefficients: int) -> int:
    """Of a token's partial sums: a power of two that holds the sum of squares, too."""
    return max(16, 1 << num_coefficients.bit_length())


def pick_split(num_tokens: int, num_slices: int) -> int:
    """Over how many programs d is divided: 128 slices of 32 for few tokens, 1 for thousands."""
    split = 1
    tiles = triton.cdiv(num_tokens, BLOCK_T)
    while split < _MAX_SPLIT and tiles * split < _NUM_PROGRAMS and split * 2 <= num_slices:
        split *= 2
    return split


def block_d(target: Target) -> int:
    """Channels of a slice; 32 spill on gfx1201."""
    return 16 if target.name == "gfx1201" else 32


def num_stages(target: Target) -> int:
    """AMD's copies pass through registers, which run out."""
    return 2 if target.has_ptx else 1


@triton.jit
def _pending_rows(
    y_ptr, row_of_ptr, tokens, mask_t, offs_d, mask, d, num_rows,
    NUM_PARTS: tl.constexpr, NUM_CHOICES: tl.constexpr,
):  # fmt: skip
    """[tokens, channels] of y, float32, rounded to bf16: as it lies there, or, of NUM_CHOICES rows
    a token and NUM_PARTS of each, summed up."""
    if NUM_CHOICES == 0:
        y = tl.load(y_ptr + tokens[:, None] * d + offs_d[None, :], mask=mask, other=0.0)
        return y.to(tl.float32)
    y = tl.zeros(mask.shape, tl.float32)
    # unrolled: one load does not wait for the other
    for choice in tl.static_range(NUM_CHOICES):
        rows = tl.load(row_of_ptr + tokens * NUM_CHOICES + choice, mask=mask_t, other=-1)
        is_row = mask & (rows >= 0)[:, None]
        for part in tl.static_range(NUM_PARTS):
            starts = (part * num_rows + rows).to(tl.int64) * d
            found = tl.load(y_ptr + starts[:, None] + offs_d[None, :], mask=is_row, other=0.0)
            y += found.to(tl.float32)
    return round_to_bf16(y)


@triton.jit
def _mixed(h0, h1, h2, h3, y, post_ptr, comb_ptr, tokens, mask_t, K: tl.constexpr):
    """post[K] y + sum_j comb[j, K] h_j, rounded to bf16: stream K after the sublayer."""
    new = tl.load(post_ptr + tokens * 4 + K, mask=mask_t, other=0.0)[:, None] * y
    comb_ptrs = comb_ptr + tokens * 16 + K
    new += tl.load(comb_ptrs, mask=mask_t, other=0.0)[:, None] * h0
    new += tl.load(comb_ptrs + 4, mask=mask_t, other=0.0)[:, None] * h1
    new += tl.load(comb_ptrs + 8, mask=mask_t, other=0.0)[:, None] * h2
    new += tl.load(comb_ptrs + 12, mask=mask_t, other=0.0)[:, None] * h3
    return round_to_bf16(new)


@triton.jit
def _scored(h, acc, squares, fn_ptrs, mask_fn, DOT_TYPE: tl.constexpr):
    """One stream's share of the products with fn and of the sum of squares."""
    fn = tl.load(fn_ptrs, mask=mask_fn, other=0.0)
    # matrix units cut what they add to: long sums are added up outside
    part = dot_exact(fn, tl.trans(h), tl.zeros_like(acc), DOT_TYPE)
    return acc + part, squares + tl.sum(h * h, axis=1)


@triton.jit
def score_streams_kernel(
    # tensors
    h_ptr,
    y_ptr,
    row_of_ptr,
    post_ptr,
    comb_ptr,
    out_ptr,
    fn_ptr,
    partials_ptr,
    # sizes, strides in elements, meta-parameters
    num_tokens,
    d,
    num_rows,
    slices_per_split,
    stride_h_token,
    stride_h_stream,
    NUM_COEFFICIENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program, BLOCK_T tokens and some slices of d, all four streams of them.

    With HAS_PENDING out[t, k] = post[t, k] y[t] + sum_j comb[t, j, k] h[t, j]; out may be h.
    partials[split, t] = the products of the flattened streams with fn, and their squares.
    """
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    mask_t = tokens < num_tokens
    columns = tl.arange(0, COLUMNS)
    is_coefficient = columns < NUM_COEFFICIENTS
    acc = tl.zeros([COLUMNS, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for i in tl.range(0, slices_per_split, num_stages=NUM_STAGES):
        offs_d = (split * slices_per_split + i) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < d
        mask = mask_t[:, None] & mask_d[None, :]
        mask_fn = is_coefficient[:, None] & mask_d[None, :]
        h_ptrs = h_ptr + tokens[:, None] * stride_h_token + offs_d[None, :]
        h0 = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        h1 = tl.load(h_ptrs + stride_h_stream, mask=mask, other=0.0).to(tl.float32)
        h2 = tl.load(h_ptrs + 2 * stride_h_stream, mask=mask, other=0.0).to(tl.float32)
        h3 = tl.load(h_ptrs + 3 * stride_h_stream, mask=mask, other=0.0).to(tl.float32)
        if HAS_PENDING:
            y = _pending_rows(
                y_ptr, row_of_ptr, tokens, mask_t, offs_d, mask, d, num_rows, NUM_PARTS,
                NUM_CHOICES,
            )  # fmt: skip
            new0 = _mixed(h0, h1, h2, h3, y, post_ptr, comb_ptr, tokens, mask_t, 0)
            new1 = _mixed(h0, h1, h2, h3, y, post_ptr, comb_ptr, tokens, mask_t, 1)
            new2 = _mixed(h0, h1, h2, h3, y, post_ptr, comb_ptr, tokens, mask_t, 2)
            new3 = _mixed(h0, h1, h2, h3, y, post_ptr, comb_ptr, tokens, mask_t, 3)
            h0, h1, h2, h3 = new0, new1, new2, new3
            out_ptrs = out_ptr + tokens[:, None] * (4 * d) + offs_d[None, :]
            store_rounded(out_ptrs, h0, mask)
            store_rounded(out_ptrs + d, h1, mask)
            store_rounded(out_ptrs + 2 * d, h2, mask)
            store_rounded(out_ptrs + 3 * d, h3, mask)
        fn_ptrs = fn_ptr + columns[:, None] * (4 * d) + offs_d[None, :]
        acc, squares = _scored(h0, acc, squares, fn_ptrs, mask_fn, DOT_TYPE)
        acc, squares = _scored(h1, acc, squares, fn_ptrs + d, mask_fn, DOT_TYPE)
        acc, squares = _scored(h2, acc, squares, fn_ptrs + 2 * d, mask_fn, DOT_TYPE)
        acc, squares = _scored(h3, acc, squares, fn_ptrs + 3 * d, mask_fn, DOT_TYPE)
    row_ptrs = partials_ptr + (split * num_tokens + tokens) * COLUMNS
    mask_out = is_coefficient[:, None] & mask_t[None, :]
    tl.store(row_ptrs[None, :] + columns[:, None], acc, mask=mask_out)
    tl.store(row_ptrs + NUM_COEFFICIENTS, squares, mask=mask_t)


@triton.jit
def score_tokens_kernel(
    # tensors
    h_ptr,
    y_ptr,
    row_of_ptr,
    post_ptr,
    comb_ptr,
    out_ptr,
    fn_ptr,
    partials_ptr,
    # sizes, strides in elements, meta-parameters
    num_tokens,
    d,
    num_rows,
    stride_h_token,
    stride_h_stream,
    NUM_COEFFICIENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """As `score_streams_kernel`, one token and one slice a program, without matrix units."""
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    columns = tl.arange(0, COLUMNS)
    is_coefficient = columns < NUM_COEFFICIENTS
    offs_d = split * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    # nothing depends on the weights' arrival but the end
    fn_ptrs = fn_ptr + columns[:, None] * (4 * d) + offs_d[None, :]
    mask_fn = is_coefficient[:, None] & mask_d[None, :]
    fn0 = tl.load(fn_ptrs, mask=mask_fn, other=0.0)
    fn1 = tl.load(fn_ptrs + d, mask=mask_fn, other=0.0)
    fn2 = tl.load(fn_ptrs + 2 * d, mask=mask_fn, other=0.0)
    fn3 = tl.load(fn_ptrs + 3 * d, mask=mask_fn, other=0.0)
    h_ptrs = h_ptr + token * stride_h_token + offs_d
    h0 = tl.load(h_ptrs, mask=mask_d, other=0.0).to(tl.float32)
    h1 = tl.load(h_ptrs + stride_h_stream, mask=mask_d, other=0.0).to(tl.float32)
    h2 = tl.load(h_ptrs + 2 * stride_h_stream, mask=mask_d, other=0.0).to(tl.float32)
    h3 = tl.load(h_ptrs + 3 * stride_h_stream, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_PENDING:
        if NUM_CHOICES == 0:
            y = tl.load(y_ptr + token * d + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        else:
            y = tl.zeros([BLOCK_D], tl.float32)
            for choice in tl.static_range(NUM_CHOICES):
                row = tl.load(row_of_ptr + token * NUM_CHOICES + choice)
                is_row = mask_d & (row >= 0)
                for part in tl.static_range(NUM_PARTS):
                    start = (part * num_rows + row).to(tl.int64) * d
                    found = tl.load(y_ptr + start + offs_d, mask=is_row, other=0.0)
                    y += found.to(tl.float32)
            y = round_to_bf16(y)
        new0 = _mixed_token(h0, h1, h2, h3, y, post_ptr, comb_ptr, token, 0)
        new1 = _mixed_token(h0, h1, h2, h3, y, post_ptr, comb_ptr, token, 1)
        new2 = _mixed_token(h0, h1, h2, h3, y, post_ptr, comb_ptr, token, 2)
        new3 = _mixed_token(h0, h1, h2, h3, y, post_ptr, comb_ptr, token, 3)
        h0, h1, h2, h3 = new0, new1, new2, new3
        out_ptrs = out_ptr + token * (4 * d) + offs_d
        store_rounded(out_ptrs, h0, mask_d)
        store_rounded(out_ptrs + d, h1, mask_d)
        store_rounded(out_ptrs + 2 * d, h2, mask_d)
        store_rounded(out_ptrs + 3 * d, h3, mask_d)
    products = fn0 * h0[None, :] + fn1 * h1[None, :] + fn2 * h2[None, :] + fn3 * h3[None, :]
    squares = tl.sum(h0 * h0 + h1 * h1 + h2 * h2 + h3 * h3, axis=0)
    row_ptr = partials_ptr + (split * num_tokens + token) * COLUMNS
    tl.store(row_ptr + columns, tl.sum(products, axis=1), mask=is_coefficient)
    tl.store(row_ptr + NUM_COEFFICIENTS, squares)


@triton.jit
def _mixed_token(h0, h1, h2, h3, y, post_ptr, comb_ptr, token, K: tl.constexpr):
    """`_mixed` of one token."""
    comb = comb_ptr + token * 16 + K
    new = tl.load(post_ptr + token * 4 + K) * y + tl.load(comb) * h0 + tl.load(comb + 4) * h1
    return round_to_bf16(new + tl.load(comb + 8) * h2 + tl.load(comb + 12) * h3)


@triton.jit
def write_streams_kernel(
    # tensors
    h_ptr,
    y_ptr,
    row_of_ptr,
    post_ptr,
    comb_ptr,
    out_ptr,
    squares_ptr,
    # sizes, strides in elements, meta-parameters
    d,
    num_rows,
    stride_h_token,
    stride_h_stream,
    stride_squares,
    HAS_PENDING: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_CHOICES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program, one token: what is pending is written, and the sum of squares. For many tokens,
    which a product of matrices scores."""
    token = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < d
        h_ptrs = h_ptr + token * stride_h_token + offs_d
        h0 = tl.load(h_ptrs, mask=mask_d, other=0.0).to(tl.float32)
        h1 = tl.load(h_ptrs + stride_h_stream, mask=mask_d, other=0.0).to(tl.float32)
        h2 = tl.load(h_ptrs + 2 * stride_h_stream, mask=mask_d, other=0.0).to(tl.float32)
        h3 = tl.load(h_ptrs + 3 * stride_h_stream, mask=mask_d, other=0.0).to(tl.float32)
        if HAS_PENDING:
            if NUM_CHOICES == 0:
                y = tl.load(y_ptr + token * d + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            else:
                y = tl.zeros([BLOCK_D], tl.float32)
                for choice in tl.static_range(NUM_CHOICES):
                    row = tl.load(row_of_ptr + token * NUM_CHOICES + choice)
                    is_row = mask_d & (row >= 0)
                    for part in tl.static_range(NUM_PARTS):
                        first = (part * num_rows + row).to(tl.int64) * d
                        found = tl.load(y_ptr + first + offs_d, mask=is_row, other=0.0)
                        y += found.to(tl.float32)
                y = round_to_bf16(y)
            new0 = _mixed_token(h0, h1, h2, h3, y, post_ptr, comb_ptr, token, 0)
            new1 = _mixed_token(h0, h1, h2, h3, y, post_ptr, comb_ptr, token, 1)
            new2 = _mixed_token(h0, h1, h2, h3, y, post_ptr, comb_ptr, token, 2)
            new3 = _mixed_token(h0, h1, h2, h3, y, post_ptr, comb_ptr, token, 3)
            h0, h1, h2, h3 = new0, new1, new2, new3
            out_ptrs = out_ptr + token * (4 * d) + offs_d
            store_rounded(out_ptrs, h0, mask_d)
            store_rounded(out_ptrs + d, h1, mask_d)
            store_rounded(out_ptrs + 2 * d, h2, mask_d)
            store_rounded(out_ptrs + 3 * d, h3, mask_d)
        squares += h0 * h0 + h1 * h1 + h2 * h2 + h3 * h3
    tl.store(squares_ptr + token * stride_squares, tl.sum(squares, axis=0))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _coefficient(sums, inverse_rms, scale_ptr, base_ptr, INDEX: tl.constexpr):
    """m * scale + base of one coefficient (steps 2 to 5 of the specification)."""
    return sums * inverse_rms * tl.load(scale_ptr + INDEX) + tl.load(base_ptr + INDEX)


@triton.jit
def _reciprocal(x, HAS_PTX: tl.constexpr):
    """1 / x to the last bit but one: forty of them follow one another."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def _normalise(a, b, c, d, eps, HAS_PTX: tl.constexpr):
    total = _reciprocal((a + b) + (c + d) + eps, HAS_PTX)
    return a * total, b * total, c * total, d * total


@triton.jit
def _softmax(a, b, c, d, eps):
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top)
    total = 1.0 / ((a + b) + (c + d))
    return a * total + eps, b * total + eps, c * total + eps, d * total + eps


@triton.jit
def _pick(sums, columns, INDEX: tl.constexpr):
    return tl.sum(tl.where(columns == INDEX, sums, 0.0), axis=0)


@triton.jit
def _sums_of(partials_ptr, token, num_tokens, split, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    """[COLUMNS], a token's partial sums added up."""
    splits = tl.arange(0, SPLITS)
    columns = tl.arange(0, COLUMNS)
    ptrs = partials_ptr + (splits.to(tl.int64) * num_tokens + token)[:, None] * COLUMNS
    parts = tl.load(ptrs + columns[None, :], mask=(splits < split)[:, None], other=0.0)
    return tl.sum(parts, axis=0)


@triton.jit
def _logit(
    partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr,
    COLUMNS: tl.constexpr, IS_SPLIT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Coefficient INDEX before its function: of one token, or of a vector of tokens."""
    if IS_SPLIT:
        m = _pick(sums, tl.arange(0, COLUMNS), INDEX)
    else:
        m = tl.load(partials_ptr + tokens * COLUMNS + INDEX, mask=mask, other=0.0)
    return _coefficient(m, inverse_rms, scale_ptr, base_ptr, INDEX)


@triton.jit
def _comb_row(
    partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr, eps,
    COLUMNS: tl.constexpr, IS_SPLIT: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """One row of comb after its softmax (step 5)."""
    a = _logit(
        partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr,
        COLUMNS, IS_SPLIT, 8 + 4 * ROW,
    )  # fmt: skip
    b = _logit(
        partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr,
        COLUMNS, IS_SPLIT, 9 + 4 * ROW,
    )  # fmt: skip
    c = _logit(
        partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr,
        COLUMNS, IS_SPLIT, 10 + 4 * ROW,
    )  # fmt: skip
    d = _logit(
        partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr,
        COLUMNS, IS_SPLIT, 11 + 4 * ROW,
    )  # fmt: skip
    return _softmax(a, b, c, d, eps)


@triton.jit
def _store_row(ptr, mask, a, b, c, d):
    tl.store(ptr, a, mask=mask)
    tl.store(ptr + 1, b, mask=mask)
    tl.store(ptr + 2, c, mask=mask)
    tl.store(ptr + 3, d, mask=mask)


@triton.jit
def _write_mix(
    partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr, post_ptr, comb_ptr,
    eps, num_iterations, COLUMNS: tl.constexpr, IS_SPLIT: tl.constexpr, HAS_PTX: tl.constexpr,
):  # fmt: skip
    """Steps 4 to 6: post and comb of one token, or of a vector of tokens."""
    for k in tl.static_range(4):
        logit = _logit(
            partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr,
            COLUMNS, IS_SPLIT, 4 + k,
        )  # fmt: skip
        tl.store(post_ptr + tokens * 4 + k, 2.0 * _sigmoid(logit), mask=mask)
    a0, a1, a2, a3 = _comb_row(
        partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr, eps,
        COLUMNS, IS_SPLIT, 0,
    )  # fmt: skip
    b0, b1, b2, b3 = _comb_row(
        partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr, eps,
        COLUMNS, IS_SPLIT, 1,
    )  # fmt: skip
    c0, c1, c2, c3 = _comb_row(
        partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr, eps,
        COLUMNS, IS_SPLIT, 2,
    )  # fmt: skip
    d0, d1, d2, d3 = _comb_row(
        partials_ptr, sums, tokens, mask, inverse_rms, scale_ptr, base_ptr, eps,
        COLUMNS, IS_SPLIT, 3,
    )  # fmt: skip
    # columns, then rows and columns in turn: 16 numbers in registers, no exchange between threads
    a0, b0, c0, d0 = _normalise(a0, b0, c0, d0, eps, HAS_PTX)
    a1, b1, c1, d1 = _normalise(a1, b1, c1, d1, eps, HAS_PTX)
    a2, b2, c2, d2 = _normalise(a2, b2, c2, d2, eps, HAS_PTX)
    a3, b3, c3, d3 = _normalise(a3, b3, c3, d3, eps, HAS_PTX)
    for _ in range(num_iterations - 1):
        a0, a1, a2, a3 = _normalise(a0, a1, a2, a3, eps, HAS_PTX)
        b0, b1, b2, b3 = _normalise(b0, b1, b2, b3, eps, HAS_PTX)
        c0, c1, c2, c3 = _normalise(c0, c1, c2, c3, eps, HAS_PTX)
        d0, d1, d2, d3 = _normalise(d0, d1, d2, d3, eps, HAS_PTX)
        a0, b0, c0, d0 = _normalise(a0, b0, c0, d0, eps, HAS_PTX)
        a1, b1, c1, d1 = _normalise(a1, b1, c1, d1, eps, HAS_PTX)
        a2, b2, c2, d2 = _normalise(a2, b2, c2, d2, eps, HAS_PTX)
        a3, b3, c3, d3 = _normalise(a3, b3, c3, d3, eps, HAS_PTX)
    row_ptr = comb_ptr + tokens * 16
    _store_row(row_ptr, mask, a0, a1, a2, a3)
    _store_row(row_ptr + 4, mask, b0, b1, b2, b3)
    _store_row(row_ptr + 8, mask, c0, c1, c2, c3)
    _store_row(row_ptr + 12, mask, d0, d1, d2, d3)


@triton.jit
def read_streams_kernel(
    # tensors
    h_ptr,
    partials_ptr,
    scale_ptr,
    base_ptr,
    weight_ptr,
    values_ptr,
    codes_ptr,
    scales_ptr,
    post_ptr,
    comb_ptr,
    # sizes, strides in elements, meta-parameters
    num_tokens,
    d,
    split,
    num_writers,
    stride_h_token,
    stride_h_stream,
    mean_eps,
    eps,
    norm_eps,
    num_iterations,
    NUM_COEFFICIENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    HAS_PTX: tl.constexpr,
):
    """The first num_writers programs: post and comb of LANES tokens (of one where sums are split).
    Every other: one token's sum of the streams, normalised; and quantised in blocks of 128.

    mean_eps, eps: of the coefficients; norm_eps: of the RMSNorm that follows.
    """
    program = tl.program_id(0)
    width = d * 4
    if program < num_writers:
        if SPLITS > 1:
            token = program.to(tl.int64)
            sums = _sums_of(partials_ptr, token, num_tokens, split, COLUMNS, SPLITS)
            squares = _pick(sums, tl.arange(0, COLUMNS), NUM_COEFFICIENTS)
            inverse_rms = tl.rsqrt(squares / width + mean_eps)
            _write_mix(
                partials_ptr, sums, token, True, inverse_rms, scale_ptr, base_ptr, post_ptr,
                comb_ptr, eps, num_iterations, COLUMNS, True, HAS_PTX,
            )  # fmt: skip
        else:
            tokens = program.to(tl.int64) * LANES + tl.arange(0, LANES)
            mask_t = tokens < num_tokens
            norm_ptrs = partials_ptr + tokens * COLUMNS + NUM_COEFFICIENTS
            norms = tl.load(norm_ptrs, mask=mask_t, other=1.0)
            inverse_rms_of = tl.rsqrt(norms / width + mean_eps)
            _write_mix(
                partials_ptr, norms, tokens, mask_t, inverse_rms_of, scale_ptr, base_ptr, post_ptr,
                comb_ptr, eps, num_iterations, COLUMNS, False, HAS_PTX,
            )  # fmt: skip
    else:
        token = (program - num_writers).to(tl.int64)
        offs_b = tl.arange(0, BLOCKS)
        offs = offs_b[:, None] * 128 + tl.arange(0, 128)[None, :]
        mask = offs < d
        # nothing depends on the sums yet
        h_ptrs = h_ptr + token * stride_h_token + offs
        h0 = tl.load(h_ptrs, mask=mask, other=0.0)
        h1 = tl.load(h_ptrs + stride_h_stream, mask=mask, other=0.0)
        h2 = tl.load(h_ptrs + 2 * stride_h_stream, mask=mask, other=0.0)
        h3 = tl.load(h_ptrs + 3 * stride_h_stream, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
        sums = _sums_of(partials_ptr, token, num_tokens, split, COLUMNS, SPLITS)
        columns = tl.arange(0, COLUMNS)
        squares = _pick(sums, columns, NUM_COEFFICIENTS)
        inverse_rms = tl.rsqrt(squares / width + mean_eps)
        # step 3 on all columns at once; the first four are picked
        is_read = columns < 4
        gates = sums * inverse_rms * tl.load(scale_ptr + columns, mask=is_read, other=0.0)
        gates = _sigmoid(gates + tl.load(base_ptr + columns, mask=is_read, other=0.0)) + eps
        x = _pick(gates, columns, 0) * h0.to(tl.float32)
        x += _pick(gates, columns, 1) * h1.to(tl.float32)
        x += _pick(gates, columns, 2) * h2.to(tl.float32)
        x += _pick(gates, columns, 3) * h3.to(tl.float32)
        x = round_to_bf16(x)
        mean = tl.sum(tl.sum(x * x, axis=1), axis=0) / d
        x = round_to_bf16(x * tl.rsqrt(mean + norm_eps) * weight)
        store_rounded(values_ptr + token * d + offs, x, mask)
        if QUANTIZES:
            codes, scales = quantize_blocks(x)
            tl.store(codes_ptr + token * d + offs, codes, mask=mask)
            num_blocks = d // 128
            tl.store(scales_ptr + token * num_blocks + offs_b, scales, mask=offs_b < num_blocks)


def can_run(streams: Tensor) -> bool:
    """Whether the kernels take streams [num_tokens, n, d]."""
    return (
        streams.dtype == torch.bfloat16
        and streams.shape[1] == NUM_STREAMS
        and not streams.shape[2] % FP8_BLOCK
        and streams.stride(2) == 1
    )


def dot_type(target: Target) -> tl.dtype:
    return tl.bfloat16 if target.decoded == "bfloat16" else tl.float32


def score_streams(
    h: Tensor,
    y: Tensor | ExpertOutputs | None,
    post: Tensor | None,
    comb: Tensor | None,
    fn: Tensor,
    fn_parts: Tensor,
    target: Target,
) -> tuple[Tensor, Coefficients]:
    """Write what is pending into the streams, in place where they are contiguous, and score them.

    Args:
        h: [num_tokens, 4, d] bfloat16.
        y: [num_tokens, d] bfloat16, or rows to be summed; None: nothing is pending.
        post, comb: [num_tokens, 4], [num_tokens, 4, 4] float32, with y.
        fn: [num_coefficients, 4 d] float32; `fn_parts`: of `bf16_parts`.

    Returns:
        The streams as they are now, and the coefficients' sums.
    """
    num_tokens, _, d = h.shape
    num_coefficients = fn.shape[0]
    columns = columns_of(num_coefficients)
    size_d = block_d(target)
    num_slices = triton.cdiv(d, size_d)
    is_many = num_tokens >= MANY_TOKENS
    is_few = num_tokens <= FEW_TOKENS
    split = 1 if is_many else num_slices if is_few else pick_split(num_tokens, num_slices)
    partials = torch.empty(split, num_tokens, columns, dtype=torch.float32, device=h.device)
    out = h
    if y is not None and not h.is_contiguous():
        out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if not num_tokens:
        return out, Coefficients(partials, num_coefficients)
    outputs = y if isinstance(y, ExpertOutputs) else None
    rows = y.contiguous() if isinstance(y, Tensor) else outputs.rows if outputs else h
    tensors = (
        h,
        rows,
        outputs.row_of if outputs else partials,
        post if post is not None else partials,
        comb if comb is not None else partials,
        out,
    )
    num_rows = outputs.rows.shape[1] if outputs else 0
    pending = {
        "HAS_PENDING": y is not None,
        "NUM_PARTS": outputs.rows.shape[0] if outputs else 1,
        "NUM_CHOICES": outputs.row_of.shape[1] if outputs else 0,
    }
    if is_many:
        write_streams_kernel[(num_tokens,)](
            *tensors,
            partials[0, :, num_coefficients],
            d,
            num_rows,
            h.stride(0),
            h.stride(1),
            columns,
            **pending,
            BLOCK_D=WRITE_BLOCK,
            num_warps=SCORE_WARPS,
        )
        partials[0, :, :num_coefficients] = _product(out, fn_parts)
    elif is_few:
        score_tokens_kernel[(num_tokens, split)](
            *tensors,
            fn,
            partials,
            num_tokens,
            d,
            num_rows,
            h.stride(0),
            h.stride(1),
            NUM_COEFFICIENTS=num_coefficients,
            COLUMNS=columns,
            **pending,
            BLOCK_D=size_d,
            num_warps=SCORE_WARPS,
        )
    else:
        score_streams_kernel[(triton.cdiv(num_tokens, BLOCK_T), split)](
            *tensors,
            fn,
            partials,
            num_tokens,
            d,
            num_rows,
            triton.cdiv(num_slices, split),
            h.stride(0),
            h.stride(1),
            NUM_COEFFICIENTS=num_coefficients,
            COLUMNS=columns,
            **pending,
            DOT_TYPE=dot_type(target),
            BLOCK_T=BLOCK_T,
            BLOCK_D=size_d,
            NUM_STAGES=num_stages(target),
            num_warps=SCORE_WARPS,
        )
    return out, Coefficients(partials, num_coefficients)


def bf16_parts(fn: Tensor) -> Tensor:
    """[n, k] float32 -> [3 n, k] bfloat16: matrices whose sum it is, one below the other."""
    high = fn.to(torch.bfloat16)
    rest = fn - high.float()
    middle = rest.to(torch.bfloat16)
    return torch.cat([high, middle, (rest - middle.float()).to(torch.bfloat16)])


def _product(h: Tensor, fn_parts: Tensor) -> Tensor:
    """[num_tokens, n] float32: the flattened streams times the matrix that fn_parts add up to."""
    v = h.flatten(1)
    if v.device.type == "cpu":
        products = torch.mm(v.float(), fn_parts.float().mT)
    else:
        products = torch.mm(v, fn_parts.mT, out_dtype=torch.float32)
    return products.view(v.shape[0], 3, -1).sum(1)


@dataclass(frozen=True, slots=True)
class Reading:
    """What comes of the streams: x as values and codes, and how the next output is written."""

    values: Tensor
    codes: Tensor | None
    scales: Tensor | None
    post: Tensor | None
    comb: Tensor | None


def read_streams(
    h: Tensor,
    coefficients: Coefficients,
    scale: Tensor,
    base: Tensor,
    mean_eps: float,
    eps: float,
    num_iterations: int,
    weight: Tensor,
    norm_eps: float,
    target: Target,
    *,
    quantizes: bool,
) -> Reading:
    """Mix, normalise and quantise x; without iterations (the head) nothing is written back.

    Args:
        h: [num_tokens, 4, d], as `score_streams` left them.
        scale, base: [num_coefficients] float32; `weight`: [d] float32.
    """
    num_tokens, n, d = h.shape
    values = torch.empty(num_tokens, d, dtype=h.dtype, device=h.device)
    codes = scales = post = comb = None
    if quantizes:
        codes = torch.empty(num_tokens, d, dtype=torch.float8_e4m3fn, device=h.device)
        scales = torch.empty(num_tokens, d // FP8_BLOCK, dtype=torch.float32, device=h.device)
    num_writers = 0
    splits = triton.next_power_of_2(coefficients.split)
    if num_iterations:
        post = torch.empty(num_tokens, n, dtype=torch.float32, device=h.device)
        comb = torch.empty(num_tokens, n, n, dtype=torch.float32, device=h.device)
        num_writers = num_tokens if splits > 1 else triton.cdiv(num_tokens, LANES)
    if num_tokens:
        read_streams_kernel[(num_writers + num_tokens,)](
            h,
            coefficients.partials,
            scale,
            base,
            weight,
            values,
            codes if codes is not None else values,
            scales if scales is not None else values,
            post if post is not None else values,
            comb if comb is not None else values,
            num_tokens,
            d,
            coefficients.split,
            num_writers,
            h.stride(0),
            h.stride(1),
            mean_eps,
            eps,
            norm_eps,
            num_iterations,
            NUM_COEFFICIENTS=coefficients.num_coefficients,
            COLUMNS=coefficients.partials.shape[2],
            SPLITS=splits,
            LANES=LANES,
            BLOCKS=triton.next_power_of_2(d // FP8_BLOCK),
            QUANTIZES=quantizes,
            HAS_PTX=target.has_ptx,
            num_warps=read_warps(d // FP8_BLOCK),
        )
    return Reading(values, codes, scales, post, comb)
