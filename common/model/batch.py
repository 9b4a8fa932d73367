"""What one forward pass takes: flat, ragged, the same for prefill, decode and mixes of both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A second writer of the slot state: `slot` gets what the rings hold after `end` tokens.

    The caller copies the sequence's slot to `slot` before the pass; the pass adds the positions
    below `end`.
    """

    slot: int
    end: int


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """The tokens [start, start + len(token_ids)) of one sequence, and where its state lies."""

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]  # covers every token up to the chunk's end
    slot: int
    logits: str = "last"  # "none", "last" or "all": the tokens whose logits are wanted
    snapshots: tuple[Snapshot, ...] = ()

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """A batch on the device. Padding changes nothing that is read: its position is -1, its slot
    and block 0. A padded sequence is the chunk of one token with start -1.

    The host's copies of lengths (`starts`, `ends`) are plain ints, so that sizing never syncs.
    """

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    sequences: Tensor  # [num_tokens] int64: row of the per-sequence tensors
    cu_seqlens: Tensor  # [num_seqs + 1] int32
    context_lens: Tensor  # [num_seqs] int32: tokens attended to, this chunk included
    block_tables: Tensor  # [num_seqs, max_blocks] int64; 0 past the end
    slots: Tensor  # [num_seqs] int64
    logits_at: Tensor  # [num_logits] int64: rows of token_ids
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    writers: tuple[
        tuple[int, int, int], ...
    ]  # (sequence, slot, end): who writes slot state, snapshots included

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def max_context_len(self) -> int:
        return max(self.ends)


def build_batch(chunks: Sequence[SequenceChunk], device: torch.device) -> ForwardBatch:
    """Lay the chunks end to end. Every chunk holds at least one token."""
    assert chunks and all(len(chunk.token_ids) for chunk in chunks)
    lengths = [len(chunk.token_ids) for chunk in chunks]
    cu_seqlens = [0]
    for length in lengths:
        cu_seqlens.append(cu_seqlens[-1] + length)
    logits_at: list[int] = []
    for i, chunk in enumerate(chunks):
        if chunk.logits == "last":
            logits_at.append(cu_seqlens[i + 1] - 1)
        elif chunk.logits == "all":
            logits_at.extend(range(cu_seqlens[i], cu_seqlens[i + 1]))
    max_blocks = max(len(chunk.block_ids) for chunk in chunks)
    tables = [[*chunk.block_ids, *[0] * (max_blocks - len(chunk.block_ids))] for chunk in chunks]
    positions = [p for chunk in chunks for p in range(chunk.start, chunk.end)]
    sequences = [i for i, length in enumerate(lengths) for _ in range(length)]

    def ints(
        values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype = torch.int64
    ) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

    return ForwardBatch(
        token_ids=ints([token for chunk in chunks for token in chunk.token_ids]),
        positions=ints(positions),
        sequences=ints(sequences),
        cu_seqlens=ints(cu_seqlens, torch.int32),
        context_lens=ints([chunk.end for chunk in chunks], torch.int32),
        block_tables=ints(tables),
        slots=ints([chunk.slot for chunk in chunks]),
        logits_at=ints(logits_at),
        starts=tuple(chunk.start for chunk in chunks),
        ends=tuple(chunk.end for chunk in chunks),
        writers=tuple(
            writer
            for i, chunk in enumerate(chunks)
            for writer in (
                (i, chunk.slot, chunk.end),
                *((i, snapshot.slot, snapshot.end) for snapshot in chunk.snapshots),
            )
        ),
    )
