"""Changing rows of a running batch in plain PyTorch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scission.kernels.decode_rows import DecodeRows


def write_rows_(rows: "DecodeRows", changes: Tensor, block_ids: Tensor) -> None:
    """See the public function of the same name."""
    to = rows.next_tokens
    row, token, position, slot, first, count, seed, choice, num_drawn, top_k = changes.T[:10]
    floats = changes.T[10:].int().view(torch.float32)
    sources = torch.where(token < 0, -1 - token, 0)
    to.token_ids[row] = torch.where(token < 0, to.token_ids[sources], token)
    to.positions[row] = position
    to.context_lens[row] = (position + 1).int()
    to.writer_ends[row] = position + 1
    to.seeds[row], to.choices[row], to.counts[row], to.top_k[row] = seed, choice, num_drawn, top_k
    to.temperatures[row], to.top_p[row], to.min_p[row] = floats[:3]
    to.presence[row], to.frequency[row], to.repetition[row] = floats[3:]
    rows.slots[row] = slot
    for r, start, length in zip(row.tolist(), first.tolist(), count.tolist(), strict=True):
        rows.block_tables[r] = 0
        rows.block_tables[r, :length] = block_ids[start : start + length]
