"""Pool rows in plain PyTorch: the definition."""

import torch
from torch import Tensor

from scission.kernels.places import Places


def write_rows_(pool: Tensor, rows: Tensor, values: Tensor, tokens: Tensor | None) -> None:
    pool.index_copy_(0, rows, values if tokens is None else values.index_select(0, tokens))


def recent_rows(
    pool: Tensor | None, rows: Tensor | None, fresh: Tensor, initial: float | None
) -> Tensor:
    parts = [fresh]
    if pool is not None and rows is not None and rows.shape[0]:
        parts.insert(0, pool.index_select(0, rows))
    if initial is not None:
        parts.append(fresh.new_full((1, fresh.shape[1]), initial))
    return torch.cat(parts) if len(parts) > 1 else fresh


def chunk_starts(places: Places) -> Tensor:
    """[num_seqs] int64: the position of each sequence's first token; -1 for padding."""
    return places.context_lens - places.cu_seqlens.diff().long()


def write_ring_(ring: Tensor, values: Tensor, size: int, places: Places) -> None:
    starts = chunk_starts(places).tolist()
    offsets = places.cu_seqlens.tolist()
    writers = zip(
        places.writer_sequences.tolist(),
        places.writer_slots.tolist(),
        places.writer_ends.tolist(),
        strict=True,
    )
    for sequence, slot, end in writers:
        first = max(starts[sequence], end - size, 0)
        if end > first:
            positions = torch.arange(first, end, device=ring.device)
            tokens = positions - starts[sequence] + offsets[sequence]
            ring[slot * size + positions % size] = values[tokens]


def write_paged_(pool: Tensor, values: Tensor, places: Places) -> None:
    tokens = (places.positions >= 0).nonzero().squeeze(1)
    positions = places.positions[tokens]
    pool[paged_rows(places.sequences[tokens], positions, places.block_size, places)] = values[
        tokens
    ]


def paged_rows(sequences: Tensor, entries: Tensor, per_block: int, places: Places) -> Tensor:
    """The pool rows of entries of sequences; a block of the table has `per_block` rows."""
    blocks = places.block_tables[sequences, entries // per_block]
    return blocks * per_block + entries % per_block
