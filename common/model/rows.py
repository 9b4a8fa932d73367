"""Where tokens' rows lie: in paged blocks, in rings, and in what a chunk can look back on.

Rows are numbers into a pool flattened to [rows, width]: a ring's is slot * ring_size + position %
ring_size, a paged component's block * rows_per_block + entry % rows_per_block. Everything is index
arithmetic over the batch's host numbers: nothing waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scission.common.model.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class RingWrites:
    """pool[rows[i]] = fresh[tokens[i]] for every ring of one size; tokens None: all, in order."""

    rows: Tensor
    tokens: Tensor | None


def is_single_token(batch: ForwardBatch) -> bool:
    return batch.num_tokens == len(batch.starts)


def plan_ring_writes(batch: ForwardBatch, size: int) -> RingWrites:
    """The last `size` tokens of every writer; a padded token (position -1) goes to slot 0."""
    if is_single_token(batch) and len(batch.writers) == len(batch.starts):
        return RingWrites(batch.slots * size + batch.positions % size, None)
    writers = [
        (sequence, slot, max(batch.starts[sequence], end - size), end)
        for sequence, slot, end in batch.writers
        if end > batch.starts[sequence]
    ]
    counts = [end - first for _, _, first, end in writers]
    positions = ragged_range([first for _, _, first, _ in writers], counts)
    offsets = first_rows(batch)
    # a token's row in the batch less its position
    shifts = [offsets[sequence] - batch.starts[sequence] for sequence, *_ in writers]
    tokens = positions + repeat_each(shifts, counts)
    rows = repeat_each([slot * size for _, slot, *_ in writers], counts) + positions % size
    device = batch.positions.device
    return RingWrites(rows.to(device), tokens.to(device))


def look_back_rows(batch: ForwardBatch, firsts: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Ring rows of the positions [firsts[i], starts[i]) of every sequence, and where each ends."""
    device = batch.positions.device
    counts = [max(start - first, 0) for start, first in zip(batch.starts, firsts, strict=True)]
    ends = torch.tensor(counts).cumsum(0).to(device)
    positions = ragged_range(firsts, counts).to(device)
    sequences = repeat_each(range(len(counts)), counts).to(device)
    return batch.slots[sequences] * size + positions % size, ends


def recent_rows(
    batch: ForwardBatch, positions: Tensor, sequences: Tensor, look_back: Tensor, ends: Tensor
) -> Tensor:
    """Where positions lie in (rows `look_back`, then the fresh tokens); `sequences` broadcasts."""
    device = positions.device
    starts = torch.tensor(batch.starts, device=device)[sequences]
    offsets = torch.tensor(first_rows(batch), device=device)[sequences]
    after = positions - starts
    fresh = look_back.shape[0] + offsets + after
    return torch.where(after >= 0, fresh, ends[sequences] + after)


def paged_rows(
    batch: ForwardBatch, sequences: Tensor, entries: Tensor, rows_per_block: int
) -> Tensor:
    blocks = batch.block_tables[sequences, entries // rows_per_block]
    return blocks * rows_per_block + entries % rows_per_block


def first_rows(batch: ForwardBatch) -> list[int]:
    """The row of every sequence's first token."""
    offsets = [0]
    for start, end in zip(batch.starts, batch.ends, strict=True):
        offsets.append(offsets[-1] + end - start)
    return offsets[:-1]


def ragged_range(firsts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """range(first, first + count) of every pair, end to end."""
    numbers = torch.tensor(counts, dtype=torch.int64)
    shifts = torch.tensor(firsts, dtype=torch.int64) - (numbers.cumsum(0) - numbers)
    return torch.arange(int(numbers.sum())) + torch.repeat_interleave(shifts, numbers)


def repeat_each(values: Sequence[int], counts: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(
        torch.tensor(values, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64)
    )
