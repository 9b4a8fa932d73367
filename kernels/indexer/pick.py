"""Scores and choice of entries, over as many queries at a time as bounded memory allows."""

import torch
from torch import Tensor

from scission.kernels.indexer.score import score_visible
from scission.kernels.indexer.select import select_columns
from scission.kernels.indexer.selection import Entries, plan_selection
from scission.kernels.places import Places
from scission.kernels.target import Target

# scores and candidates of one tile of queries
_SCRATCH_BYTES = 256 << 20
# rows of scores are read 16 bytes at a time
_ALIGN = 16


def pick_scored(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    top_k: int,
    ratio: int,
    places: Places,
    target: Target,
) -> Tensor:
    """As `pick_entries`; 2 launches where max_context bounds entries to 16384, else 3 a tile."""
    num_tokens = q.shape[0]
    weights = weights if weights.stride(1) == 1 else weights.contiguous()
    picks = torch.empty(num_tokens, top_k, dtype=torch.int32, device=q.device)
    max_entries = places.max_context // ratio
    width = -(-max(max_entries, 1) // _ALIGN) * _ALIGN
    tile = num_tokens
    while tile > 1 and _scratch_bytes(tile, width, top_k, target) > _SCRATCH_BYTES:
        tile = -(-tile // 2)
    scores = torch.empty(min(tile, num_tokens), width, dtype=torch.float32, device=q.device)
    for first in range(0, num_tokens, max(tile, 1)):
        part = slice(first, min(first + tile, num_tokens))
        own = scores[: part.stop - first]
        if max_entries > top_k:
            score_visible(q, weights, keys, own, top_k, ratio, places, first, target)
        entries = Entries(
            places.positions[part],
            places.sequences[part],
            places.block_tables,
            ratio,
            places.block_size // ratio,
        )
        select_columns(own, entries, top_k, picks[part], target)
    return picks


def _scratch_bytes(num_rows: int, width: int, top_k: int, target: Target) -> int:
    selection = plan_selection(num_rows, width, top_k, target)
    return 4 * num_rows * (width + selection.scratch_columns)
