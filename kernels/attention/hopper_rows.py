"""Sparse attention for Hopper, written in Gluon: copies run beside the products.

One warp group gathers keys and queries into shared memory, two multiply: each takes half of a
tile's keys for the scores and half of the channels for the values. Programs are persistent, so the
next token's keys arrive while a token is finished. Triton's own pipeline computes every score in
both warp groups and waits for a token's first keys.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from scission.kernels.attention.sparse_rows import add_splits
from scission.kernels.places import Places
from scission.kernels.target import Target

_LOG2_E = 1.4426950408889634
# what registers and shared memory are divided for: 8 warps with 208 registers, 4 with 88
DIM = 512
BLOCK_H = 64
BLOCK_N = 64
BLOCKS = 2
NUM_WARPS = 8
GATHER_WARPS = 4
GATHER_REGISTERS = 88
# tokens x blocks of heads that sparse_rows takes in less time: 8.8 us for one, here 11
MAX_FEW = 2
# more of them are not split, though programs stay idle: adding the parts costs more. On an H200 8
# tokens of CSA take 15 us split in 10; 64 take 32 us whole, and split in two 45 us
MAX_SPLIT_BLOCKS = 16
# of tokens that may see any number of entries, and in short contexts see few
MAX_UNBOUNDED_SPLITS = 4


@gluon.jit
def _position(item, num_items, positions_ptr, items_per_token):
    """Of an item's token; loaded one item ahead, so that nobody waits for it."""
    token = item // items_per_token
    return gl.load(positions_ptr + token, mask=item < num_items, other=-1).to(gl.int32)


@gluon.jit
def _span(
    item,
    position,
    num_splits,
    window,
    top_k,
    RATIO: gl.constexpr,
    HAS_PICKS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """How many keys the window has, and the item's part [low, high) of all keys."""
    num_window = gl.minimum(position + 1, window)
    num_keys = num_window
    if RATIO:
        num_entries = (position + 1) // RATIO
        if HAS_PICKS:
            num_entries = gl.minimum(num_entries, top_k)
        num_keys += num_entries
    per_split = gl.cdiv(gl.cdiv(num_keys, BLOCK_N), num_splits) * BLOCK_N
    low = item % num_splits * per_split
    return num_window, low, gl.minimum(low + per_split, num_keys)


@gluon.jit
def _gather(
    q_ptr, kv_ptr, ring_ptr, entries_ptr, picks_ptr,
    positions_ptr, sequences_ptr, firsts_ptr, slots_ptr, tables_ptr,
    q_smem, k_smem, q_ready, q_free, k_ready, k_free,
    num_items, num_blocks_h, num_splits, window, top_k,
    stride_q_token, stride_q_head, stride_picks_token, stride_tables_sequence,
    DIM: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr, BLOCKS: gl.constexpr,
    RATIO: gl.constexpr, ROWS_PER_BLOCK: gl.constexpr, HAS_PICKS: gl.constexpr,
    IS_SINGLE: gl.constexpr,
):  # fmt: skip
    """The producer: a token's queries, then its keys, tile by tile, as room becomes free."""
    # a warp copies whole rows, so that few addresses are kept
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    offs_d = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    offs_h = gl.arange(0, BLOCK_H, gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    # addresses are worked out by one thread a key, and then handed to the warp that copies it
    keys_layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    num_tiles = 0
    num_filled = 0
    items_per_token = num_blocks_h * num_splits
    position = _position(gl.program_id(0), num_items, positions_ptr, items_per_token)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        token = item // items_per_token
        block_h = item // num_splits % num_blocks_h
        num_window, low, high = _span(
            item, position, num_splits, window, top_k, RATIO, HAS_PICKS, BLOCK_N
        )
        sequence = token.to(gl.int64)
        first = token
        if not IS_SINGLE:
            sequence = gl.load(sequences_ptr + token)
            first = gl.load(firsts_ptr + sequence)
        ring_row = gl.load(slots_ptr + sequence).to(gl.int32) * window
        oldest = token - num_window + 1
        oldest_in_ring = (position - num_window + 1) % window
        # keys before this one are in the ring alone
        num_in_ring = first - oldest
        following = item + gl.num_programs(0)
        position = _position(following, num_items, positions_ptr, items_per_token)
        if low < high:
            mbarrier.wait(q_free, (num_filled & 1) ^ 1)
            heads = block_h * BLOCK_H + offs_h
            q_rows = q_ptr + token.to(gl.int64) * stride_q_token + heads * stride_q_head
            async_copy.async_copy_global_to_shared(q_smem, q_rows[:, None] + offs_d[None, :])
            async_copy.mbarrier_arrive(q_ready, increment_count=False)
            num_filled += 1
        for start in range(low, high, BLOCK_N):
            keys = start + gl.arange(0, BLOCK_N, keys_layout)
            in_ring = oldest_in_ring + keys
            in_ring = ring_row + gl.where(in_ring >= window, in_ring - window, in_ring)
            is_fresh = keys >= num_in_ring
            base = gl.where(is_fresh, kv_ptr, ring_ptr)
            row = gl.where(is_fresh, oldest + keys, in_ring)
            if RATIO:
                entry = keys - num_window
                is_entry = (entry >= 0) & (keys < high)
                if HAS_PICKS:
                    picked = picks_ptr + token.to(gl.int64) * stride_picks_token + entry
                    entry_row = gl.load(picked, mask=is_entry, other=0)
                else:
                    table = tables_ptr + sequence * stride_tables_sequence
                    block = gl.load(table + entry // ROWS_PER_BLOCK, mask=is_entry, other=0)
                    entry_row = block.to(gl.int32) * ROWS_PER_BLOCK + entry % ROWS_PER_BLOCK
                base = gl.where(is_entry, entries_ptr, base)
                row = gl.where(is_entry, entry_row, row)
            rows = gl.convert_layout(base + row.to(gl.int64) * DIM, gl.SliceLayout(1, layout))
            is_seen = start + offs_n < high
            slot = num_tiles % BLOCKS
            mbarrier.wait(k_free.index(slot), (num_tiles // BLOCKS & 1) ^ 1)
            async_copy.async_copy_global_to_shared(
                k_smem.index(slot), rows[:, None] + offs_d[None, :], mask=is_seen[:, None]
            )
            async_copy.mbarrier_arrive(k_ready.index(slot), increment_count=False)
            num_tiles += 1


@gluon.jit
def _turn_back(values, turn_ptr, PAIRS: gl.constexpr):
    """The last PAIRS pairs of channels turned by the rotation at turn_ptr."""
    rows: gl.constexpr = values.shape[0]
    dim: gl.constexpr = values.shape[1]
    a, b = values.reshape([rows, dim // 2, 2]).split()
    pair = gl.arange(0, dim // 2, gl.SliceLayout(0, a.type.layout)) - (dim // 2 - PAIRS)
    cos = gl.load(turn_ptr + pair * 2, mask=pair >= 0, other=1.0)[None, :]
    sin = gl.load(turn_ptr + pair * 2 + 1, mask=pair >= 0, other=0.0)[None, :]
    turned = gl.join(a * cos - b * sin, a * sin + b * cos).reshape([rows, dim])
    return gl.convert_layout(turned, values.type.layout, assert_trivial=True)


@gluon.jit
def _multiply(
    sink_ptr, inverse_ptr, positions_ptr, out_ptr, sums_ptr,
    q_smem, k_smem, weights_smem, q_ready, q_free, k_ready, k_free,
    scale, num_items, num_heads, num_blocks_h, num_splits, window, top_k,
    stride_inverse_token, stride_out_split, stride_out_token, stride_sums_split, stride_sums_token,
    DIM: gl.constexpr, PAIRS: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCKS: gl.constexpr, RATIO: gl.constexpr, HAS_PICKS: gl.constexpr, IS_SPLIT: gl.constexpr,
):  # fmt: skip
    """The consumer: scores, softmax and values of every item."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_N // 2, 16])
    values_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, DIM // 2, 16])
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
    num_tiles = 0
    num_filled = 0
    items_per_token = num_blocks_h * num_splits
    position = _position(gl.program_id(0), num_items, positions_ptr, items_per_token)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        token = item // items_per_token
        block_h = item // num_splits % num_blocks_h
        split = item % num_splits
        _, low, high = _span(item, position, num_splits, window, top_k, RATIO, HAS_PICKS, BLOCK_N)
        following = item + gl.num_programs(0)
        position = _position(following, num_items, positions_ptr, items_per_token)
        own_rows = block_h * BLOCK_H + gl.arange(0, BLOCK_H, rows_layout)
        largest = gl.full([BLOCK_H], float("-inf"), gl.float32, rows_layout)
        # of every column of tiles; added up at the end
        totals = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores_layout)
        values = gl.zeros([BLOCK_H, DIM], gl.float32, values_layout)
        if low < high:
            mbarrier.wait(q_ready, num_filled & 1)
            num_filled += 1
        for start in range(low, high, BLOCK_N):
            slot = num_tiles % BLOCKS
            mbarrier.wait(k_ready.index(slot), num_tiles // BLOCKS & 1)
            # copies are the generic proxy's writes, products the async proxy's reads
            fence_async_shared()
            k = k_smem.index(slot)
            scores = gl.zeros([BLOCK_H, BLOCK_N], gl.float32, scores_layout)
            scores = warpgroup_mma(q_smem, k.permute([1, 0]), scores, use_acc=False)
            gl.thread_barrier()
            mbarrier.arrive(q_free, count=1, pred=start + BLOCK_N >= high)
            is_seen = start + offs_n < high
            scores = gl.where(is_seen[None, :], scores * scale, float("-inf"))
            new_largest = gl.maximum(largest, gl.max(scores, 1))
            weights = gl.exp2(scores - new_largest[:, None])
            fade = gl.exp2(largest - new_largest)
            totals = totals * fade[:, None] + weights
            weights_smem.store(weights.to(gl.bfloat16))
            fence_async_shared()
            fade = gl.convert_layout(fade, gl.SliceLayout(1, values_layout), assert_trivial=True)
            values = warpgroup_mma(weights_smem, k, values * fade[:, None])
            largest = new_largest
            gl.thread_barrier()
            mbarrier.arrive(k_free.index(slot), count=1)
            num_tiles += 1
        total = gl.sum(totals, 1)
        if IS_SPLIT:
            offset = split.to(gl.int64) * stride_sums_split
            offset += token.to(gl.int64) * stride_sums_token
            gl.store(sums_ptr + offset + own_rows * 2, largest)
            gl.store(sums_ptr + offset + own_rows * 2 + 1, total)
            heads = block_h * BLOCK_H + gl.arange(0, BLOCK_H, gl.SliceLayout(1, values_layout))
            outs = out_ptr + token.to(gl.int64) * stride_out_token + heads * DIM
            outs += split.to(gl.int64) * stride_out_split
            offs_d = gl.arange(0, DIM, gl.SliceLayout(0, values_layout))
            gl.store(outs[:, None] + offs_d[None, :], values)
        else:
            sink = gl.load(sink_ptr + own_rows) * 1.4426950408889634
            shift = gl.maximum(largest, sink)
            fade = gl.exp2(largest - shift)
            fade = fade / (total * fade + gl.exp2(sink - shift))
            fade = gl.convert_layout(fade, gl.SliceLayout(1, values_layout), assert_trivial=True)
            turn_ptr = inverse_ptr + token.to(gl.int64) * stride_inverse_token
            values = _turn_back(values * fade[:, None], turn_ptr, PAIRS)
            # from pairs of channels a lane to 16 bytes, which the lanes of a row exchange
            out_layout: gl.constexpr = gl.DistributedLinearLayout(
                [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]],
                [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
                [[16, 0], [32, 0], [0, 256]],
                [],
                [BLOCK_H, DIM],
            )
            rounded = gl.convert_layout(values.to(gl.bfloat16), out_layout)
            heads = block_h * BLOCK_H + gl.arange(0, BLOCK_H, gl.SliceLayout(1, out_layout))
            outs = out_ptr + token.to(gl.int64) * stride_out_token + heads * DIM
            offs_d = gl.arange(0, DIM, gl.SliceLayout(0, out_layout))
            gl.store(outs[:, None] + offs_d[None, :], rounded)


@gluon.jit(do_not_specialize=["num_items", "num_splits", "stride_tables_sequence"])
def hopper_rows_kernel(
    # tensors
    q_ptr,
    kv_ptr,
    ring_ptr,
    entries_ptr,
    picks_ptr,
    sink_ptr,
    inverse_ptr,
    positions_ptr,
    sequences_ptr,
    firsts_ptr,
    slots_ptr,
    tables_ptr,
    out_ptr,
    sums_ptr,
    # sizes, strides in elements, meta-parameters
    scale,
    num_items,
    num_heads,
    num_splits,
    window,
    top_k,
    stride_q_token,
    stride_q_head,
    stride_picks_token,
    stride_inverse_token,
    stride_tables_sequence,
    stride_out_split,
    stride_out_token,
    stride_sums_split,
    stride_sums_token,
    DIM: gl.constexpr,
    PAIRS: gl.constexpr,
    BLOCK_H: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCKS: gl.constexpr,
    RATIO: gl.constexpr,
    ROWS_PER_BLOCK: gl.constexpr,
    HAS_PICKS: gl.constexpr,
    IS_SINGLE: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    GATHER_WARPS: gl.constexpr,
    GATHER_REGISTERS: gl.constexpr,
):
    """As sparse_rows_kernel; an item is a split of a block of heads of a token."""
    tiles_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, DIM], tiles_layout)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCKS, BLOCK_N, DIM], tiles_layout)
    weights_smem = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, BLOCK_N], tiles_layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [BLOCKS, 1], mbarrier.MBarrierLayout())
    # every copying thread arrives when its copies have
    mbarrier.init(q_ready, count=GATHER_WARPS * 32)
    mbarrier.init(q_free, count=1)
    for slot in gl.static_range(BLOCKS):
        mbarrier.init(k_ready.index(slot), count=GATHER_WARPS * 32)
        mbarrier.init(k_free.index(slot), count=1)
    fence_async_shared()
    num_blocks_h = num_heads // BLOCK_H
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    sink_ptr, inverse_ptr, positions_ptr, out_ptr, sums_ptr,
                    q_smem, k_smem, weights_smem, q_ready, q_free, k_ready, k_free,
                    scale, num_items, num_heads, num_blocks_h, num_splits, window, top_k,
                    stride_inverse_token, stride_out_split, stride_out_token,
                    stride_sums_split, stride_sums_token,
                    DIM, PAIRS, BLOCK_H, BLOCK_N, BLOCKS, RATIO, HAS_PICKS, IS_SPLIT,
                ),
            ),
            (
                _gather,
                (
                    q_ptr, kv_ptr, ring_ptr, entries_ptr, picks_ptr,
                    positions_ptr, sequences_ptr, firsts_ptr, slots_ptr, tables_ptr,
                    q_smem, k_smem, q_ready, q_free, k_ready, k_free,
                    num_items, num_blocks_h, num_splits, window, top_k,
                    stride_q_token, stride_q_head, stride_picks_token, stride_tables_sequence,
                    DIM, BLOCK_H, BLOCK_N, BLOCKS, RATIO, ROWS_PER_BLOCK, HAS_PICKS, IS_SINGLE,
                ),
            ),
        ],
        [GATHER_WARPS],
        [GATHER_REGISTERS],
    )  # fmt: skip


def is_faster(num_tokens: int, num_heads: int, dim: int) -> bool:
    """Than sparse_rows, and able to run: one token's keys are better spread over smaller tiles."""
    num_blocks = num_tokens * num_heads // BLOCK_H
    return dim == DIM and num_heads % BLOCK_H == 0 and num_blocks > MAX_FEW


def pick_splits(num_blocks: int, multiprocessors: int, max_keys: int | None) -> int:
    """Over how many items a token's keys are divided; max_keys None: any number of them."""
    if num_blocks > MAX_SPLIT_BLOCKS:
        return 1
    wanted = multiprocessors // num_blocks
    if max_keys is None:
        return max(1, min(wanted, MAX_UNBOUNDED_SPLITS))
    return max(1, min(wanted, -(-max_keys // BLOCK_N)))


def attend_rows(
    q: Tensor,
    kv: Tensor,
    ring: Tensor,
    window: int,
    entries: Tensor | None,
    picks: Tensor | None,
    ratio: int,
    sink: Tensor,
    scale: float,
    inverse: Tensor,
    places: Places,
    target: Target,
    num_splits: int | None = None,
) -> Tensor:
    """Of heads in multiples of BLOCK_H, of DIM channels; num_splits None: as many as pay."""
    num_tokens, num_heads, dim = q.shape
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    num_blocks = num_tokens * (num_heads // BLOCK_H)
    if num_splits is None:
        is_bounded = picks is not None or not ratio
        max_keys = window + (picks.shape[1] if picks is not None else 0) if is_bounded else None
        num_splits = pick_splits(num_blocks, multiprocessors, max_keys)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    is_split = num_splits > 1
    partials = out
    sums = q.new_empty(
        (num_splits if is_split else 0, num_tokens, num_heads, 2), dtype=torch.float32
    )
    if is_split:
        partials = q.new_empty((num_splits, num_tokens, num_heads, dim), dtype=torch.float32)
    # [num_tokens, pairs, 2]
    turns = torch.view_as_real(inverse)
    num_items = num_blocks * num_splits
    hopper_rows_kernel[(min(num_items, multiprocessors),)](
        q,
        kv,
        ring,
        # what is not there is never read
        entries if entries is not None else ring,
        picks if picks is not None else places.cu_seqlens,
        sink,
        turns,
        places.positions,
        places.sequences,
        places.cu_seqlens,
        places.slots,
        places.block_tables,
        partials,
        sums,
        scale * _LOG2_E,
        num_items,
        num_heads,
        num_splits,
        window,
        picks.shape[1] if picks is not None else 0,
        q.stride(0),
        q.stride(1),
        picks.stride(0) if picks is not None else 0,
        turns.stride(0),
        places.block_tables.stride(0),
        num_tokens * num_heads * dim,
        num_heads * dim,
        num_tokens * num_heads * 2,
        num_heads * 2,
        DIM=dim,
        PAIRS=turns.shape[1],
        BLOCK_H=BLOCK_H,
        BLOCK_N=BLOCK_N,
        BLOCKS=BLOCKS,
        RATIO=ratio,
        ROWS_PER_BLOCK=places.block_size // ratio if ratio else 0,
        HAS_PICKS=picks is not None,
        IS_SINGLE=places.is_single,
        IS_SPLIT=is_split,
        GATHER_WARPS=GATHER_WARPS,
        GATHER_REGISTERS=GATHER_REGISTERS,
        num_warps=NUM_WARPS,
    )
    if is_split:
        add_splits(partials, sums, sink, turns, out, target)
    return out
