"""Where a batch's tokens and their state lie, as kernels on a device take it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Places:
    """A batch's positions and addresses; every tensor on the device, nothing asked of the host.

    A sequence's chunk begins at position context_len - (its number of tokens). Padding has
    position -1, context length 0, slot 0 and block 0: it sees no key, and what it writes nobody
    reads. Numbers on the host only bound shapes and launches: a captured graph is launched with
    them for whatever the tensors hold then.
    """

    positions: Tensor  # [num_tokens] int64; -1: padding
    sequences: Tensor  # [num_tokens] int64: row of the per-sequence tensors
    cu_seqlens: Tensor  # [num_seqs + 1] int32: first token of every sequence, then num_tokens
    context_lens: Tensor  # [num_seqs] int32: tokens with this chunk's
    block_tables: Tensor  # [num_seqs, max_blocks] int64: 0 past the end
    slots: Tensor  # [num_seqs] int64: whose rings are read
    # who writes slot state: a sequence itself, and snapshots of it that stop at `writer_ends`
    writer_sequences: Tensor  # [num_writers] int64
    writer_slots: Tensor  # [num_writers] int64
    writer_ends: Tensor  # [num_writers] int64
    block_size: int  # tokens
    is_single: bool  # every sequence has one token, and is its only writer
    max_tokens: int  # of a sequence in this batch, at most
    max_context: int  # bounds context_lens

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.slots.shape[0]
