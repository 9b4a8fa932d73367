"""A model of one line of arithmetic over a real storage: exact, so that any wrong row shows.

h[p] = (31 h[p - 1] + 17 h[p - 2] + token[p] + 1) mod M        read through the ring
next token = (sum of all h so far, read through the block table) mod V
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scission.common.cache.block_pool import BlockPool, State
from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage
from scission.common.model.batch import ForwardBatch
from scission.common.model.deepseek_v4 import OnLayers

MODULUS = 65521  # sums of a few hundred stay exact in float32
VOCAB = 40
BLOCK = 4
RING = 4
NUM_LAYERS = 4


def make_layout() -> CacheLayout:
    return CacheLayout(
        components=(
            Component("tokens", Kind.PAGED, (0, 1), (1,), "float32"),
            Component("pairs", Kind.PAGED, (3,), (1,), "float32", tokens_per_row=2),
            Component(
                "recent", Kind.RING, (0, 2), (1,), "float32", ring_size=RING, live_lookback=2
            ),
        ),
        block_size=BLOCK,
    )


def chain(token_ids: Sequence[int]) -> list[int]:
    """h of every position."""
    states = [0, 0]
    for token_id in token_ids:
        states.append((31 * states[-1] + 17 * states[-2] + token_id + 1) % MODULUS)
    return states[2:]


def next_token(token_ids: Sequence[int]) -> int:
    return sum(chain(token_ids)) % VOCAB


class ChainModel:
    """Computes the chain; asserts that it writes only rows that one sequence alone holds."""

    layer_groups = ((0, 2), (2, NUM_LAYERS))

    def __init__(self) -> None:
        self.layout = make_layout()
        self.pool: BlockPool | None = None  # set: checked on every write
        self.failures = 0  # passes that will fail, from the next on
        self.passes: list[list[tuple[int, int]]] = []  # [start, end) of each sequence, by pass

    def forward(
        self, batch: ForwardBatch, storage: CacheStorage, on_layers: OnLayers | None = None
    ) -> Tensor:
        self.passes.append(list(zip(batch.starts, batch.ends, strict=True)))
        states = [self._compute(batch, storage, sequence) for sequence in range(len(batch.starts))]
        for sequence, slot, end in batch.writers:
            for position in range(batch.starts[sequence], end):
                value = states[sequence][position]
                storage.slots["recent"][:, slot, position % RING] = value
        for first, last in self.layer_groups:
            if on_layers is not None:
                on_layers(first, last)
            if self.failures:
                self.failures -= 1
                raise RuntimeError("the device has fallen off the bus")
        logits = torch.empty(len(batch.logits_at), VOCAB)
        for row, at in enumerate(batch.logits_at.tolist()):
            sequence = int(batch.sequences[at])
            wanted = self._sum(batch, storage, sequence, int(batch.positions[at]) + 1) % VOCAB
            logits[row] = -((torch.arange(VOCAB) - wanted) % VOCAB).float()
        return logits

    def _compute(self, batch: ForwardBatch, storage: CacheStorage, sequence: int) -> dict[int, int]:
        start, end = batch.starts[sequence], batch.ends[sequence]
        table = batch.block_tables[sequence].tolist()
        ring = storage.slots["recent"][0, int(batch.slots[sequence])]
        states = {p: int(ring[p % RING]) for p in range(max(0, start - 2), start)}
        tokens = batch.token_ids[int(batch.cu_seqlens[sequence]) :].tolist()
        for position, token_id in zip(range(start, end), tokens, strict=False):
            before, before_that = states.get(position - 1, 0), states.get(position - 2, 0)
            states[position] = (31 * before + 17 * before_that + token_id + 1) % MODULUS
            block, offset = table[position // BLOCK], position % BLOCK
            if self.pool is not None:
                assert self.pool.num_holders(block) == 1
                assert self.pool.num_holders(block, State.ACTIVE) == 1
            storage.paged["tokens"][0, block, offset] = states[position]
            storage.paged["tokens"][1, block, offset] = 2 * states[position]
            if position % 2:
                pair = states[position - 1] + states[position]
                storage.paged["pairs"][0, block, offset // 2] = pair
        return states

    def _sum(
        self, batch: ForwardBatch, storage: CacheStorage, sequence: int, num_tokens: int
    ) -> int:
        table = batch.block_tables[sequence].tolist()
        return sum(
            int(storage.paged["tokens"][0, table[p // BLOCK], p % BLOCK]) for p in range(num_tokens)
        )


def check_paged(
    storage: CacheStorage,
    token_ids: Sequence[int],
    block_ids: Sequence[int],
    layers: tuple[int, int],
    tokens: tuple[int, int],
) -> None:
    """Assert that these tokens' rows of these model layers hold what they should."""
    states = chain(token_ids)
    for position in range(*tokens):
        block, offset = block_ids[position // BLOCK], position % BLOCK
        for layer in (0, 1):
            if layers[0] <= layer < layers[1]:
                row = storage.paged["tokens"][layer, block, offset]
                assert int(row) == (layer + 1) * states[position], f"token {position}"
        if position % 2 and layers[0] <= 3 < layers[1]:
            pair = states[position - 1] + states[position]
            assert int(storage.paged["pairs"][0, block, offset // 2]) == pair, f"pair {position}"


def check_ring(storage: CacheStorage, token_ids: Sequence[int], slot: int) -> None:
    """Assert that the live rows of the ring hold what they should."""
    states = chain(token_ids)
    first = storage.layout.component("recent").first_live(len(token_ids))
    for position in range(first, len(token_ids)):
        rows = storage.slots["recent"][:, slot, position % RING, 0]
        assert rows.tolist() == [states[position]] * 2, f"ring {position}"
