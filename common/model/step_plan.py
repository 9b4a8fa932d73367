"""What one step's batch means for the caches, worked out once and shared by all layers.

Which rows a query sees, which ring rows a chunk looks back on and overwrites, which compressed
entries the step completes and from which rows. Everything is made from the batch's host numbers
and index arithmetic on the device: no layer asks again, and nothing waits for the device.

How rows are numbered is in `rows`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scission.common.model.batch import ForwardBatch
from scission.common.model.rows import (
    RingWrites,
    is_single_token,
    look_back_rows,
    paged_rows,
    plan_ring_writes,
    ragged_range,
    recent_rows,
    repeat_each,
)
from scission.kernels.rope import rotations

_ABSENT = float("-inf")


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The sliding window of every query.

    Where every sequence has one token, it is written first and `rows` are ring rows: it overwrites
    the position that has just left the window. In a longer chunk early queries still see what late
    tokens overwrite, so `rows` point into (ring rows `look_back`, then the fresh tokens), and the
    ring is written last.
    """

    rows: Tensor  # [num_tokens, width] int64, the query's own position first
    bias: Tensor  # [num_tokens, width] float32: 0, or -inf before the sequence's begin
    look_back: Tensor | None  # [n] int64 ring rows; None: `rows` are ring rows


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """The entries of one ratio that this step completes.

    `sources` are half rows (with overlap; whole rows without) of (ring rows `look_back`, then the
    fresh tokens, then one initial row).
    """

    num_entries: int
    phases: Tensor  # [num_tokens] int64: position in the token's own block
    look_back: Tensor  # [n] int64 ring rows
    sources: Tensor  # [num_entries, rows per entry] int64
    rows: Tensor  # [num_entries] int64: where the entries go in the paged pool
    rotation: Tensor  # [num_entries, rope_dim / 2] complex64, of the blocks' first positions


@dataclass(frozen=True, slots=True)
class EntryPlan:
    """The compressed entries of one ratio that queries see.

    Rows of entries that are not complete name a complete one of some sequence, so that whatever is
    gathered is finite; the bias takes them out.
    """

    rows: Tensor  # [num_seqs, max_entries] int64
    bias: Tensor  # [num_tokens, max_entries] float32: -inf where not (yet) visible
    attended: Tensor | None  # [num_tokens, max_entries] int64; None: a choice of them is
    attention_bias: Tensor  # [num_tokens, window and attended entries] float32


@dataclass(frozen=True, slots=True)
class Rotation:
    """[num_tokens, rope_dim / 2] complex64: of the positions, and back."""

    forward: Tensor
    inverse: Tensor


@dataclass(frozen=True, slots=True)
class PlanGeometry:
    """What of a model the plan depends on."""

    window: int
    block_size: int
    overlaps: Mapping[int, bool]  # by compression ratio
    limits: Mapping[int, int | None]  # by compression ratio: entries attended to; None: all
    plain_frequencies: Tensor  # [rope_dim / 2] float32, on the device
    compressed_frequencies: Tensor


@dataclass(frozen=True, slots=True)
class StepPlan:
    token_ids: Tensor
    positions: Tensor
    sequences: Tensor
    plain_rotation: Rotation
    compressed_rotation: Rotation
    window: WindowPlan
    ring_writes: Mapping[int, RingWrites]  # by ring size
    compressions: Mapping[int, CompressionPlan]  # by ratio
    entries: Mapping[int, EntryPlan | None]  # by ratio; None: no query sees any


def plan_step(
    batch: ForwardBatch, geometry: PlanGeometry, *, keeps_window: bool = True
) -> StepPlan:
    """Plan a batch; without `keeps_window` every window is the chunk's own tokens."""
    ring_sizes = {geometry.window} | {
        ratio * (1 + overlap) for ratio, overlap in geometry.overlaps.items()
    }
    is_in_place = keeps_window and is_single_token(batch)
    window = _plan_window(batch, geometry.window, is_in_place=is_in_place)
    plain, compressed = _plan_rotations(batch.positions, geometry)
    return StepPlan(
        token_ids=batch.token_ids,
        positions=batch.positions,
        sequences=batch.sequences,
        plain_rotation=plain,
        compressed_rotation=compressed,
        window=window,
        ring_writes={size: plan_ring_writes(batch, size) for size in ring_sizes},
        compressions={
            ratio: _plan_compression(batch, geometry, ratio, overlap)
            for ratio, overlap in geometry.overlaps.items()
        },
        entries={
            ratio: _plan_entries(batch, geometry, ratio, window.bias) for ratio in geometry.overlaps
        },
    )


def _plan_rotations(positions: Tensor, geometry: PlanGeometry) -> tuple[Rotation, Rotation]:
    """By plain frequencies, and by those of layers with compressed entries."""
    frequencies = torch.cat([geometry.plain_frequencies, geometry.compressed_frequencies])
    forward = rotations(positions, frequencies)
    inverse = forward.conj_physical()
    num_pairs = geometry.plain_frequencies.shape[0]
    return (
        Rotation(forward[:, :num_pairs], inverse[:, :num_pairs]),
        Rotation(forward[:, num_pairs:], inverse[:, num_pairs:]),
    )


def _plan_window(batch: ForwardBatch, size: int, *, is_in_place: bool) -> WindowPlan:
    device = batch.positions.device
    width = max(min(size, batch.max_context_len), 1)
    # [num_tokens, width], the query's own position first
    positions = batch.positions.unsqueeze(1) - torch.arange(width, device=device)
    is_absent = positions < 0
    bias = torch.zeros(is_absent.shape, device=device).masked_fill_(is_absent, _ABSENT)
    if is_in_place:
        rows = (batch.slots * size).unsqueeze(1) + positions % size
        return WindowPlan(torch.where(is_absent, rows[:, :1], rows), bias, None)
    look_back, ends = look_back_rows(
        batch, [max(0, start - size + 1) for start in batch.starts], size
    )
    rows = recent_rows(batch, positions, batch.sequences.unsqueeze(1), look_back, ends)
    return WindowPlan(torch.where(is_absent, rows[:, :1], rows), bias, look_back)


def _plan_compression(
    batch: ForwardBatch, geometry: PlanGeometry, ratio: int, overlap: bool
) -> CompressionPlan:
    device = batch.positions.device
    phases = batch.positions % ratio
    starts = [max(start, 0) for start in batch.starts]
    firsts = [start // ratio for start in starts]
    counts = [max(end, 0) // ratio - first for end, first in zip(batch.ends, firsts, strict=True)]
    num_entries = sum(counts)
    if not num_entries:
        none = phases[:0]
        return CompressionPlan(0, phases, none, none, none, geometry.compressed_frequencies[:0])
    per_entry, halves = (2 * ratio, 2) if overlap else (ratio, 1)
    ring_size = per_entry
    needed = [
        max(0, (first - overlap) * ratio) if count else start
        for first, count, start in zip(firsts, counts, starts, strict=True)
    ]
    look_back, ends = look_back_rows(batch, needed, ring_size)
    entries = ragged_range(firsts, counts).to(device)
    sequences = repeat_each(range(len(counts)), counts).to(device)
    slots = torch.arange(per_entry, device=device)
    # [num_entries, per_entry]
    positions = ((entries - int(overlap)) * ratio).unsqueeze(1) + slots
    rows = recent_rows(batch, positions, sequences.unsqueeze(1), look_back, ends)
    initial_row = look_back.shape[0] + batch.num_tokens
    rows = torch.where(positions < 0, initial_row, rows)
    if overlap:
        # the first half of a row serves the next block, the second half its own
        rows = rows * halves + slots // ratio
    return CompressionPlan(
        num_entries=num_entries,
        phases=phases,
        look_back=look_back,
        sources=rows,
        rows=paged_rows(batch, sequences, entries, geometry.block_size // ratio),
        rotation=rotations(entries * ratio, geometry.compressed_frequencies),
    )


def _plan_entries(
    batch: ForwardBatch, geometry: PlanGeometry, ratio: int, window_bias: Tensor
) -> EntryPlan | None:
    device = batch.positions.device
    counts = [max(end, 0) // ratio for end in batch.ends]
    max_entries = max(counts)
    if not max_entries:
        return None
    numbers = torch.arange(max_entries, device=device)
    sequences = torch.arange(len(counts), device=device).unsqueeze(1)
    rows_per_block = geometry.block_size // ratio
    rows = paged_rows(batch, sequences, numbers.unsqueeze(0), rows_per_block)
    if min(counts) < max_entries:
        num_complete = (batch.context_lens // ratio).unsqueeze(1)
        some_complete = rows[counts.index(max_entries), 0]
        rows = torch.where(numbers < num_complete, rows, some_complete)
    num_visible = (batch.positions + 1) // ratio
    is_hidden = numbers >= num_visible.unsqueeze(1)
    bias = torch.zeros(is_hidden.shape, device=device).masked_fill_(is_hidden, _ABSENT)
    limit = geometry.limits[ratio]
    if limit is not None and max_entries > limit:
        # as many of the best entries are visible as of the first
        attention_bias = torch.cat([window_bias, bias[:, :limit]], dim=1)
        return EntryPlan(rows, bias, None, attention_bias)
    attended = rows.index_select(0, batch.sequences)
    return EntryPlan(rows, bias, attended, torch.cat([window_bias, bias], dim=1))
