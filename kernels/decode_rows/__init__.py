"""The running batch on the device: which sequence each row is, changed between two steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scission.kernels.decode_rows import reference
from scission.kernels.sampling import NextTokens
from scission.kernels.target import target_of

__all__ = ["CHANGE_FIELDS", "DecodeRows", "new_rows", "write_rows_"]

# Of one changed row, in this order; the last six are float32 bits. A token of -1 - r is that of
# row r as the device has it. `first_block` and `num_blocks` say which block ids are the row's.
CHANGE_FIELDS = (
    "row",
    "token",
    "position",
    "slot",
    "first_block",
    "num_blocks",
    "seed",
    "choice",
    "count",
    "top_k",
    "temperature",
    "top_p",
    "min_p",
    "presence",
    "frequency",
    "repetition",
)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """`next_tokens` and where each row's state lies; padding has slot 0 and block 0."""

    next_tokens: NextTokens
    slots: Tensor  # [rows] int64
    block_tables: Tensor  # [rows, max_blocks] int64


def new_rows(num_rows: int, max_blocks: int, vocab_size: int, device: torch.device) -> DecodeRows:
    """Rows that are all padding."""

    def column(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device=device)

    return DecodeRows(
        NextTokens(
            token_ids=column(0),
            positions=column(-1),
            context_lens=column(0, torch.int32),
            writer_ends=column(0),
            temperatures=column(0, torch.float32),
            seeds=column(0),
            choices=column(0),
            counts=column(0),
            top_k=column(0),
            top_p=column(1, torch.float32),
            min_p=column(0, torch.float32),
            presence=column(0, torch.float32),
            frequency=column(0, torch.float32),
            repetition=column(1, torch.float32),
            seen=torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device),
        ),
        slots=column(0),
        block_tables=torch.zeros(num_rows, max_blocks, dtype=torch.int64, device=device),
    )


def write_rows_(rows: DecodeRows, changes: Tensor, block_ids: Tensor) -> None:
    """Make some rows other sequences, or padding, or give them new blocks. One launch.

    What rows with penalties have seen is left to the caller.

    Args:
        changes: [num_changes, len(CHANGE_FIELDS)] int64. A row that another one takes its token
            from keeps its token in this call.
        block_ids: [num_ids] int64: each row's whole table.
    """
    if changes.ndim != 2 or changes.shape[1] != len(CHANGE_FIELDS):
        raise ValueError(f"changes must be [n, {len(CHANGE_FIELDS)}], got {list(changes.shape)}")
    if target_of(changes.device) is None:
        reference.write_rows_(rows, changes, block_ids)
        return
    # only where a kernel is launched is Triton needed
    from scission.kernels.decode_rows.write_rows import write_rows

    write_rows(rows, changes, block_ids)
