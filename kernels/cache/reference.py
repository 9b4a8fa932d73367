"""Pool rows in plain PyTorch: the definition."""

import torch
from torch import Tensor


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
