"""Scores of queries against the compressed keys that they see, read through block tables.

The keys are the left operand: one program takes BLOCK_E of them and multiplies them with the heads
of one query after another. How many entries there are is read on the device; programs share them
by tiles, so that the grid depends on the number of queries alone.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from scission.kernels.places import Places
from scission.kernels.rounding import dot_as
from scission.kernels.target import Target

# programs that fill a device
_NUM_PROGRAMS = 528


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes at a time: scores of block_e entries for block_t tokens."""

    block_e: int
    block_t: int
    num_warps: int
    num_stages: int


def single_tile(target: Target) -> Tile:
    """For sequences of one token."""
    return Tile(64, 1, 4, target.num_stages(3))


def chunk_tile(target: Target, num_tokens: int) -> Tile:
    """For sequences of several tokens."""
    block_t = 4 if num_tokens <= 256 else 32
    # gfx1201 spills with more entries or fewer warps: it holds both multiplicands in registers
    block_e, num_warps = (64, 8) if target.name == "gfx1201" else (128, 4)
    return Tile(block_e, block_t, num_warps, target.num_stages(3))


@triton.jit
def _entry_rows(table_ptr, entries, mask, ROWS_PER_BLOCK: tl.constexpr):
    """The pool rows of entries of one sequence; int64."""
    blocks = tl.load(table_ptr + entries // ROWS_PER_BLOCK, mask=mask, other=0)
    return blocks * ROWS_PER_BLOCK + entries % ROWS_PER_BLOCK


@triton.jit
def _weighted_matches(keys, q, weights, DOT_TYPE: tl.constexpr):
    """keys [entries, dim], q [heads, dim], weights [heads] -> [entries]."""
    matches = dot_as(keys, tl.trans(q), DOT_TYPE)
    return tl.sum(tl.maximum(matches, 0.0) * weights[None, :], axis=1)


@triton.jit
def score_single_kernel(
    # tensors
    q_ptr,
    weights_ptr,
    keys_ptr,
    positions_ptr,
    sequences_ptr,
    tables_ptr,
    scores_ptr,
    # sizes, strides in elements, meta-parameters
    top_k,
    stride_q_token,
    stride_weights_token,
    stride_keys_row,
    stride_tables_sequence,
    stride_scores_token,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program, every num_programs(1)-th tile of one token's entries."""
    token = tl.program_id(0).to(tl.int64)
    visible = ((tl.load(positions_ptr + token) + 1) // RATIO).to(tl.int32)
    # what is attended to anyway needs no score
    end = tl.where(visible > top_k, visible, 0)
    sequence = tl.load(sequences_ptr + token)
    table_ptr = tables_ptr + sequence * stride_tables_sequence
    offs_h = tl.arange(0, HEADS)
    offs_d = tl.arange(0, DIM)
    q = tl.load(q_ptr + token * stride_q_token + offs_h[:, None] * DIM + offs_d[None, :])
    weights = tl.load(weights_ptr + token * stride_weights_token + offs_h)
    first = tl.program_id(1) * BLOCK_E
    for start in tl.range(first, end, tl.num_programs(1) * BLOCK_E, num_stages=NUM_STAGES):
        entries = start + tl.arange(0, BLOCK_E)
        mask = entries < end
        rows = _entry_rows(table_ptr, entries, mask, ROWS_PER_BLOCK)
        keys_ptrs = keys_ptr + rows[:, None] * stride_keys_row + offs_d[None, :]
        keys = tl.load(keys_ptrs, mask=mask[:, None], other=0.0)
        scores = _weighted_matches(keys, q, weights, DOT_TYPE)
        tl.store(scores_ptr + token * stride_scores_token + entries, scores, mask=mask)


@triton.jit
def score_chunk_kernel(
    # tensors
    q_ptr,
    weights_ptr,
    keys_ptr,
    positions_ptr,
    sequences_ptr,
    tables_ptr,
    scores_ptr,
    # sizes, strides in elements, meta-parameters
    num_tokens,
    top_k,
    stride_q_token,
    stride_weights_token,
    stride_keys_row,
    stride_tables_sequence,
    stride_scores_token,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """One program, every num_programs(1)-th tile of the entries that BLOCK_T tokens see.

    A token may get scores of entries that later tokens of its tile see: nobody reads them.
    """
    # late tokens see most: they begin first
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    offs_h = tl.arange(0, HEADS)
    offs_d = tl.arange(0, DIM)
    token = tile * BLOCK_T
    last = tl.minimum(token + BLOCK_T, num_tokens)
    offs_t = token + tl.arange(0, BLOCK_T)
    mask_t = offs_t < last
    positions = tl.load(positions_ptr + offs_t, mask=mask_t, other=-1)
    visible = ((positions + 1) // RATIO).to(tl.int32)
    visible = tl.where(visible > top_k, visible, 0)
    sequences = tl.load(sequences_ptr + offs_t, mask=mask_t, other=-1)
    # the tokens of one sequence after those of another
    while token < last:
        sequence = tl.load(sequences_ptr + token)
        is_own = sequences == sequence
        next_token = tl.maximum(tl.max(tl.where(is_own, offs_t, 0), axis=0), token) + 1
        end = tl.max(tl.where(is_own, visible, 0), axis=0)
        table_ptr = tables_ptr + sequence * stride_tables_sequence
        first = tl.program_id(1) * BLOCK_E
        for start in range(first, end, tl.num_programs(1) * BLOCK_E):
            entries = start + tl.arange(0, BLOCK_E)
            mask = entries < end
            rows = _entry_rows(table_ptr, entries, mask, ROWS_PER_BLOCK)
            keys_ptrs = keys_ptr + rows[:, None] * stride_keys_row + offs_d[None, :]
            keys = tl.load(keys_ptrs, mask=mask[:, None], other=0.0)
            # positions ascend: the first tokens see none of these entries
            sees = is_own & (visible > start)
            seeing = tl.min(tl.where(sees, offs_t, last), axis=0)
            blind = tl.max(tl.where(sees, offs_t + 1, 0), axis=0)
            for t in tl.range(seeing, blind, num_stages=NUM_STAGES):
                row = tl.full([], t, tl.int64)
                q_ptrs = q_ptr + row * stride_q_token + offs_h[:, None] * DIM + offs_d[None, :]
                weights = tl.load(weights_ptr + row * stride_weights_token + offs_h)
                scores = _weighted_matches(keys, tl.load(q_ptrs), weights, DOT_TYPE)
                tl.store(scores_ptr + row * stride_scores_token + entries, scores, mask=mask)
        token = next_token


def num_splits(num_tiles: int, max_entries: int, tile: Tile) -> int:
    """Over how many programs the entries of a tile of tokens are divided."""
    wanted = max(_NUM_PROGRAMS // num_tiles, 1)
    return min(wanted, -(-max_entries // tile.block_e))


def score_visible(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    scores: Tensor,
    top_k: int,
    ratio: int,
    places: Places,
    first_token: int,
    target: Target,
) -> None:
    """Score the entries that queries see, where these are more than top_k.

    Args:
        q: [num_tokens, num_heads, dim] of all tokens; weights, keys: as `pick_entries` takes them.
        scores: [tokens, max_entries] float32, written, of those from first_token on.
    """
    num_tokens, max_entries = scores.shape
    _, num_heads, dim = q.shape
    part = slice(first_token, first_token + num_tokens)
    q, weights = q[part], weights[part]
    tensors = (
        q,
        weights,
        keys,
        places.positions[part],
        places.sequences[part],
        places.block_tables,
        scores,
    )
    sizes = (
        top_k,
        q.stride(0),
        weights.stride(0),
        keys.stride(0),
        places.block_tables.stride(0),
        scores.stride(0),
    )
    # the interpreter multiplies the bits of bf16
    dot_type = tl.bfloat16 if target.decoded == "bfloat16" else tl.float32
    if places.is_single:
        tile = single_tile(target)
        score_single_kernel[(num_tokens, num_splits(num_tokens, max_entries, tile))](
            *tensors,
            *sizes,
            HEADS=num_heads,
            DIM=dim,
            RATIO=ratio,
            ROWS_PER_BLOCK=places.block_size // ratio,
            BLOCK_E=tile.block_e,
            DOT_TYPE=dot_type,
            NUM_STAGES=tile.num_stages,
            num_warps=tile.num_warps,
        )
        return
    tile = chunk_tile(target, num_tokens)
    num_tiles = triton.cdiv(num_tokens, tile.block_t)
    score_chunk_kernel[(num_tiles, num_splits(num_tiles, max_entries, tile))](
        *tensors,
        num_tokens,
        *sizes,
        HEADS=num_heads,
        DIM=dim,
        RATIO=ratio,
        ROWS_PER_BLOCK=places.block_size // ratio,
        BLOCK_E=tile.block_e,
        BLOCK_T=tile.block_t,
        DOT_TYPE=dot_type,
        NUM_STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
