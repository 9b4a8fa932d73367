"""A small model that finds its state by a batch's places alone, as a captured graph must.

Every token is written into its block and into the ring of its slot. Logits are sums of table rows
picked by the last tokens, read back through block table and ring: a wrong block, slot or position
changes them.
"""

import torch
from torch import Tensor

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage
from scission.common.model.architecture import OnLayers
from scission.common.model.batch import ForwardBatch

VOCAB = 389
BLOCK = 8
WINDOW = 4
LAYOUT = CacheLayout(
    (
        Component("tokens", Kind.PAGED, (0,), (1,), "float32"),
        Component(
            "window", Kind.RING, (0,), (1,), "float32", ring_size=WINDOW, live_lookback=WINDOW - 1
        ),
    ),
    block_size=BLOCK,
)


class PlacedModel:
    layout = LAYOUT
    layer_groups = ((0, 1),)
    captures = True

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        # whole numbers: sums are exact in any order
        table = torch.randint(-99, 99, (2 * WINDOW, VOCAB, VOCAB), generator=generator)
        self._table = table.float().to(device)

    def forward(
        self, batch: ForwardBatch, storage: CacheStorage, on_layers: OnLayers | None = None
    ) -> Tensor:
        places = batch.places
        pages = storage.paged["tokens"].view(-1)
        ring = storage.slots["window"].view(-1)
        slots = places.slots[places.sequences]
        block_tables = places.block_tables[places.sequences]
        values = batch.token_ids.float()
        logits = torch.zeros(batch.num_tokens, VOCAB, device=values.device)

        def rows_of(positions: Tensor) -> Tensor:
            blocks = block_tables.gather(1, (positions // BLOCK).unsqueeze(1))[:, 0]
            return blocks * BLOCK + positions % BLOCK

        positions = places.positions.clamp(min=0)
        pages.index_copy_(0, rows_of(positions), values)
        if places.is_single:
            ring.index_copy_(0, slots * WINDOW + positions % WINDOW, values)
        for back in range(WINDOW):
            at = (positions - back).clamp(min=0)
            paged = pages[rows_of(at)].long().clamp(0, VOCAB - 1)
            logits += self._table[back, paged]
            # a chunk's tokens see its start through the ring, and each other through blocks
            kept = ring[slots * WINDOW + at % WINDOW].long().clamp(0, VOCAB - 1)
            logits += self._table[WINDOW + back, kept if places.is_single else paged]
        if not places.is_single:
            for token in range(batch.num_tokens):
                ring[slots[token] * WINDOW + positions[token] % WINDOW] = values[token]
        return batch.logit_rows(logits) / 64
