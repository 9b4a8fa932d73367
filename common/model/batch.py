"""What one forward pass takes: flat, ragged, the same for prefill, decode and mixes of both."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scission.kernels.places import Places

BLOCK_SIZE = 128  # tokens, where no storage says otherwise
_ALIGNMENT = 16  # bytes
_DTYPES = {"int64": torch.int64, "int32": torch.int32}


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

    The host's copies of lengths (`starts`, `ends`, `writers`) are plain ints, so that sizing never
    syncs. The batch of a captured graph has none: its lengths change from replay to replay.
    """

    token_ids: Tensor  # [num_tokens] int64
    places: Places
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

    @property
    def positions(self) -> Tensor:
        return self.places.positions

    @property
    def sequences(self) -> Tensor:
        return self.places.sequences

    @property
    def cu_seqlens(self) -> Tensor:
        return self.places.cu_seqlens

    @property
    def context_lens(self) -> Tensor:
        return self.places.context_lens

    @property
    def block_tables(self) -> Tensor:
        return self.places.block_tables

    @property
    def slots(self) -> Tensor:
        return self.places.slots

    def logit_rows(self, rows: Tensor) -> Tensor:
        """The rows [num_tokens, ..] whose logits are wanted: `rows` itself where all are."""
        if self.logits_at.shape[0] == self.num_tokens:
            return rows
        return rows.index_select(0, self.logits_at)


def build_batch(
    chunks: Sequence[SequenceChunk], device: torch.device, block_size: int = BLOCK_SIZE
) -> ForwardBatch:
    """Lay the chunks end to end. Every chunk holds at least one token."""
    assert chunks and all(len(chunk.token_ids) for chunk in chunks)
    lengths = [len(chunk.token_ids) for chunk in chunks]
    firsts = [0, *itertools.accumulate(lengths)]
    ends = [chunk.end for chunk in chunks]
    writers = tuple(
        writer
        for i, chunk in enumerate(chunks)
        for writer in (
            (i, chunk.slot, chunk.end),
            *((i, snapshot.slot, snapshot.end) for snapshot in chunk.snapshots),
        )
    )
    writer_sequences, writer_slots, writer_ends = zip(*writers, strict=True)
    tables = np.zeros((len(chunks), max(len(chunk.block_ids) for chunk in chunks)), np.int64)
    for table, chunk in zip(tables, chunks, strict=True):
        table[: len(chunk.block_ids)] = chunk.block_ids
    logits_at = [
        row
        for first, end, chunk in zip(firsts, firsts[1:], chunks, strict=False)
        for row in range(first if chunk.logits == "all" else end - 1, end)
        if chunk.logits != "none"
    ]
    tokens, logit_rows, *placed = send(
        (
            np.concatenate([np.asarray(chunk.token_ids, np.int64) for chunk in chunks]),
            np.array(logits_at, np.int64),
            np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks]),
            np.arange(len(chunks)).repeat(lengths),
            np.array(firsts, np.int32),
            np.array(ends, np.int32),
            tables,
            np.array([chunk.slot for chunk in chunks]),
            np.array(writer_sequences),
            np.array(writer_slots),
            np.array(writer_ends),
        ),
        device,
    )
    places = Places(
        *placed,  # type: ignore[arg-type, misc]
        block_size=block_size,
        is_single=firsts[-1] == len(chunks) == len(writers),
        max_tokens=max(lengths),
        max_context=max(ends),
    )
    return ForwardBatch(
        token_ids=tokens,
        places=places,
        logits_at=logit_rows,
        starts=tuple(chunk.start for chunk in chunks),
        ends=tuple(ends),
        writers=writers,
    )


def send(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays on the device, by one copy that nobody waits for."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed = torch.empty(packed_bytes(arrays), dtype=torch.uint8, pin_memory=True)
    pack_into(packed, arrays)
    return unpack(packed.to(device, non_blocking=True), arrays)


def packed_bytes(arrays: Sequence[NDArray[Any]]) -> int:
    return sum(_aligned(array.nbytes) for array in arrays)


def pack_into(packed: Tensor, arrays: Sequence[NDArray[Any]]) -> None:
    """Lay arrays of int64 and int32 one after another, each on a multiple of 16 bytes.

    Args:
        packed: [packed_bytes(arrays)] uint8 on the CPU.
    """
    host, at = packed.numpy(), 0
    for array in arrays:
        host[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
        at += _aligned(array.nbytes)


def unpack(packed: Tensor, like: Sequence[NDArray[Any]]) -> list[Tensor]:
    """Views into packed memory, on whatever device, with the arrays' shapes and dtypes."""
    tensors, at = [], 0
    for array in like:
        part = packed[at : at + array.nbytes].view(_DTYPES[array.dtype.name])
        tensors.append(part.view(array.shape))
        at += _aligned(array.nbytes)
    return tensors


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
