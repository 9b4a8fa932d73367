"""Where the keys of a ragged batch lie in a pool of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_QUERIES = 8  # of one sequence, that a program of the kernel takes together


@dataclass(frozen=True, slots=True)
class KeyRows:
    """Where the keys of every sequence of a ragged batch lie, in order of position.

    Column j of a sequence is position first + j. Columns that are no key of the sequence name a row
    with finite content all the same, so that whatever is gathered can be taken out by a mask.
    `spans` are the host's: the first query row, the queries and the keys of each sequence.
    """

    rows: Tensor  # [num_seqs, max_keys] int64, into the pool
    firsts: Tensor  # [num_seqs] int64
    positions: Tensor  # [num_tokens] int64, of the queries; -1 is padding
    spans: tuple[tuple[int, int, int], ...]
    tiles: Tensor | None = None  # [num_tiles, 4] int64, of `tiles_of`; None: no kernel runs


def tiles_of(spans: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """Sequence, first query row, queries and keys of each tile of up to TILE_QUERIES queries."""
    tiles = [
        (sequence, token + start, min(TILE_QUERIES, num_queries - start), num_keys)
        for sequence, (token, num_queries, num_keys) in enumerate(spans)
        for start in range(0, num_queries, TILE_QUERIES)
    ]
    return torch.tensor(tiles).to(device, non_blocking=True)
