"""Triton: changes of a running batch's rows."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from scission.kernels.decode_rows import DecodeRows

BLOCK = 512
NUM_WARPS = 4
_NUM_FIELDS = tl.constexpr(16)


@triton.jit
def _float_of(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def write_rows_kernel(
    # tensors
    changes_ptr,
    block_ids_ptr,
    token_ids_ptr,
    positions_ptr,
    context_lens_ptr,
    writer_ends_ptr,
    temperatures_ptr,
    seeds_ptr,
    choices_ptr,
    counts_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    presence_ptr,
    frequency_ptr,
    repetition_ptr,
    slots_ptr,
    block_tables_ptr,
    # sizes, meta-parameters
    max_blocks,
    BLOCK: tl.constexpr,
):
    """One program, one changed row: all of it, in the order of CHANGE_FIELDS."""
    change_ptr = changes_ptr + tl.program_id(0).to(tl.int64) * _NUM_FIELDS
    row = tl.load(change_ptr)
    token = tl.load(change_ptr + 1)
    position = tl.load(change_ptr + 2)
    # a row whose token stays is not written: another one may be reading it
    if token != -1 - row:
        source = tl.where(token < 0, -1 - token, row)
        known = tl.load(token_ids_ptr + source)
        tl.store(token_ids_ptr + row, tl.where(token < 0, known, token))
    tl.store(positions_ptr + row, position)
    tl.store(context_lens_ptr + row, (position + 1).to(tl.int32))
    tl.store(writer_ends_ptr + row, position + 1)
    tl.store(slots_ptr + row, tl.load(change_ptr + 3))
    tl.store(seeds_ptr + row, tl.load(change_ptr + 6))
    tl.store(choices_ptr + row, tl.load(change_ptr + 7))
    tl.store(counts_ptr + row, tl.load(change_ptr + 8))
    tl.store(top_k_ptr + row, tl.load(change_ptr + 9))
    tl.store(temperatures_ptr + row, _float_of(tl.load(change_ptr + 10)))
    tl.store(top_p_ptr + row, _float_of(tl.load(change_ptr + 11)))
    tl.store(min_p_ptr + row, _float_of(tl.load(change_ptr + 12)))
    tl.store(presence_ptr + row, _float_of(tl.load(change_ptr + 13)))
    tl.store(frequency_ptr + row, _float_of(tl.load(change_ptr + 14)))
    tl.store(repetition_ptr + row, _float_of(tl.load(change_ptr + 15)))
    ids_ptr = block_ids_ptr + tl.load(change_ptr + 4)
    num_blocks = tl.load(change_ptr + 5)
    for start in range(0, max_blocks, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + offs, mask=offs < num_blocks, other=0)
        tl.store(block_tables_ptr + row * max_blocks + offs, ids, mask=offs < max_blocks)


def write_rows(rows: "DecodeRows", changes: Tensor, block_ids: Tensor) -> None:
    """See the package's function of the same name."""
    to = rows.next_tokens
    write_rows_kernel[(changes.shape[0],)](
        changes,
        block_ids,
        to.token_ids,
        to.positions,
        to.context_lens,
        to.writer_ends,
        to.temperatures,
        to.seeds,
        to.choices,
        to.counts,
        to.top_k,
        to.top_p,
        to.min_p,
        to.presence,
        to.frequency,
        to.repetition,
        rows.slots,
        rows.block_tables,
        rows.block_tables.shape[1],
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
