"""Block pooling in plain PyTorch: the definition."""

from typing import Literal

import torch
from torch import Tensor

from scission.kernels.cache.reference import chunk_starts, paged_rows, write_ring_
from scission.kernels.latents.reference import round_index, round_kv_
from scission.kernels.norm.reference import rms_norm
from scission.kernels.places import Places
from scission.kernels.rope.reference import rotate_


def pool_blocks(kv: Tensor, score: Tensor, sources: Tensor) -> Tensor:
    rows = sources.flatten()
    shape = (*sources.shape, kv.shape[1])
    weights = score.index_select(0, rows).view(shape).softmax(1)
    return kv.index_select(0, rows).view(shape).mul_(weights).sum(1)


def compress_(
    kv: Tensor,
    score: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    eps: float,
    block_rotation: Tensor,
    ring_kv: Tensor,
    ring_score: Tensor,
    entries: Tensor,
    ratio: int,
    rounding: Literal["kv", "index"] | None,
    places: Places,
) -> None:
    width = entries.shape[1]
    num_halves = kv.shape[1] // width
    ring_size = ratio * num_halves
    score = score + ape[places.positions % ratio]
    is_last = (places.positions >= 0) & ((places.positions + 1) % ratio == 0)
    tokens = is_last.nonzero().squeeze(1)
    if tokens.shape[0]:
        slots = torch.arange(ring_size, device=kv.device)
        back = slots - (ring_size - 1)
        # [num_entries, ring_size]
        positions = places.positions[tokens].unsqueeze(1) + back
        rows = [
            _recent(fresh, ring, tokens.unsqueeze(1) + back, positions, initial, places)
            for fresh, ring, initial in ((kv, ring_kv, 0.0), (score, ring_score, float("-inf")))
        ]
        # the first half of a row serves the next block, the second half its own: cut in halves,
        # a row of the block before is even
        sources = torch.arange(positions.numel(), device=kv.device).view(positions.shape)
        sources = sources * num_halves + slots // ratio
        pooled = pool_blocks(rows[0].view(-1, width), rows[1].view(-1, width), sources)
        values = rms_norm(pooled.to(entries.dtype), norm_weight, eps)
        rotate_(values, block_rotation[tokens])
        if rounding == "kv":
            round_kv_(values, 2 * block_rotation.shape[-1])
        elif rounding == "index":
            values = round_index(values)
        numbers = places.positions[tokens] // ratio
        at = paged_rows(places.sequences[tokens], numbers, places.block_size // ratio, places)
        entries[at] = values
    write_ring_(ring_kv, kv, ring_size, places)
    write_ring_(ring_score, score, ring_size, places)


def _recent(
    fresh: Tensor, ring: Tensor, tokens: Tensor, positions: Tensor, initial: float, places: Places
) -> Tensor:
    """The rows of positions: this step's own, older ones from the ring, before the begin
    `initial`.

    Args:
        tokens: [num_entries, ring_size] int64: the positions' rows of `fresh`, where they are this
            step's.
        positions: [num_entries, ring_size] int64, the last one of each row this step's.

    Returns:
        [num_entries, ring_size, width].
    """
    size = positions.shape[1]
    # an entry's last token is always one of its sequence
    sequences = places.sequences[tokens[:, -1:]]
    is_fresh = positions >= chunk_starts(places)[sequences]
    kept = ring[places.slots[sequences] * size + positions % size]
    rows = torch.where(is_fresh.unsqueeze(2), fresh[tokens.clamp_min(0)], kept)
    return rows.masked_fill_((positions < 0).unsqueeze(2), initial)
