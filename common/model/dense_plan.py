"""What one step's batch means for layers with per-head K and V, worked out once for all of them.

Full layers keep K and V of every token in blocks, sliding ones of the last `window` tokens in
rings. A layer kind's plan says where the step's tokens are written, where the keys of each
sequence lie, and how positions turn queries and keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scission.common.model.batch import ForwardBatch
from scission.common.model.rows import (
    RingWrites,
    first_rows,
    is_single_token,
    look_back_rows,
    paged_rows,
    plan_ring_writes,
    recent_rows,
)
from scission.kernels.dense_attention import KeyRows, Turn
from scission.kernels.rope import rotations


@dataclass(frozen=True, slots=True)
class QueryScaling:
    """Queries grow with their position: 1 + beta * ln(1 + floor(position / original))."""

    beta: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What the layers of one kind have in common."""

    window: int | None  # keys a query sees, its own included; None: all
    frequencies: Tensor  # [rotated channels / 2] float32, on the device
    rotation_scale: float = 1.0  # of cos and sin
    query_scaling: QueryScaling | None = None


@dataclass(frozen=True, slots=True)
class KindPlan:
    """One step for the layers of one kind.

    `look_back` None: fresh rows are written to the pool first and `keys` point into it. Otherwise
    they point into (ring rows `look_back`, then the fresh tokens), as early queries of a chunk
    still see what its late tokens overwrite, and the ring is written last.
    """

    turn: Turn
    keys: KeyRows
    window: int | None
    look_back: Tensor | None  # [n] int64
    writes: RingWrites


def plan_kinds(
    batch: ForwardBatch, kinds: Mapping[str, LayerKind], block_size: int
) -> dict[str, KindPlan]:
    """The plan of every kind of layer, by its name."""
    return {name: _plan_kind(batch, kind, block_size) for name, kind in kinds.items()}


def turn_of(positions: Tensor, kind: LayerKind) -> Turn:
    """How positions [num_tokens] enter the queries and keys of a kind."""
    rotation = rotations(positions, kind.frequencies)
    if kind.rotation_scale != 1.0:
        rotation = rotation * kind.rotation_scale
    if kind.query_scaling is None:
        return Turn(rotation)
    scaling = kind.query_scaling
    turns = (positions // scaling.original_max_positions).clamp(min=0)
    return Turn(rotation, 1 + scaling.beta * torch.log1p(turns.float()))


def _plan_kind(batch: ForwardBatch, kind: LayerKind, block_size: int) -> KindPlan:
    if kind.window is None:
        keys, look_back, writes = _plan_blocks(batch, block_size)
    else:
        keys, look_back, writes = _plan_window(batch, kind.window)
    return KindPlan(turn_of(batch.positions, kind), keys, kind.window, look_back, writes)


def _plan_blocks(batch: ForwardBatch, block_size: int) -> tuple[KeyRows, None, RingWrites]:
    """Written in place: a block holds what comes after as well as what came before."""
    writes = paged_rows(batch, batch.sequences, batch.positions.clamp(min=0), block_size)
    firsts = [0] * len(batch.ends)
    positions = _key_positions(batch, firsts)
    sequences = torch.arange(len(firsts), device=positions.device).unsqueeze(1)
    rows = paged_rows(batch, sequences, positions.clamp(min=0), block_size)
    return _key_rows(batch, rows, firsts), None, RingWrites(writes, None)


def _plan_window(batch: ForwardBatch, window: int) -> tuple[KeyRows, Tensor | None, RingWrites]:
    writes = plan_ring_writes(batch, window)
    firsts = [max(0, start - window + 1) for start in batch.starts]
    positions = _key_positions(batch, firsts)
    if is_single_token(batch):
        rows = (batch.slots * window).unsqueeze(1) + positions % window
        if writes.tokens is None:
            return _key_rows(batch, rows, firsts), None, writes
    look_back, ends = look_back_rows(batch, firsts, window)
    sequences = torch.arange(len(firsts), device=positions.device).unsqueeze(1)
    rows = recent_rows(batch, positions, sequences, look_back, ends)
    return _key_rows(batch, rows, firsts), look_back, writes


def _key_positions(batch: ForwardBatch, firsts: list[int]) -> Tensor:
    """[num_seqs, max_keys]: from `firsts` on, stopping at the sequence's last token.

    What lies beyond the end repeats the last position: its row is written by this very step.
    """
    device = batch.positions.device
    widths = [end - first for first, end in zip(firsts, batch.ends, strict=True)]
    columns = torch.arange(max(*widths, 1), device=device)
    lasts = torch.tensor(batch.ends, device=device) - 1
    positions = torch.tensor(firsts, device=device).unsqueeze(1) + columns
    return torch.minimum(positions, lasts.unsqueeze(1))


def _key_rows(batch: ForwardBatch, rows: Tensor, firsts: list[int]) -> KeyRows:
    spans = tuple(
        (token, end - start, max(end - first, 0))
        for token, start, end, first in zip(
            first_rows(batch), batch.starts, batch.ends, firsts, strict=True
        )
    )
    device = batch.positions.device
    return KeyRows(rows, torch.tensor(firsts, device=device), batch.positions, spans)
