"""Picking entries: the definitions by hand, and the kernels against them."""

import pytest
import torch
from torch import Tensor

from scission.kernels.indexer import pick_entries, pick_rows, score_entries, top_k
from scission.kernels.places import Places

RATIO, BLOCK_SIZE = 4, 32
ROWS_PER_BLOCK = BLOCK_SIZE // RATIO


def places_of(chunks: list[tuple[int, int]], device: torch.device | str = "cpu") -> Places:
    """Of (tokens before, tokens now) of each sequence, -1 before: padding; blocks in any order."""
    contexts = [max(before + now, 0) if before >= 0 else 0 for before, now in chunks]
    positions = [p for before, now in chunks for p in _positions(before, now)]
    counts = torch.tensor([now for _, now in chunks])
    max_blocks = max(-(-context // BLOCK_SIZE) for context in contexts) or 1
    # block 0 is padding's
    blocks = torch.randperm(len(chunks) * max_blocks) + 1
    tables = blocks.view(len(chunks), max_blocks)
    for table, context in zip(tables, contexts, strict=True):
        table[-(-context // BLOCK_SIZE) :] = 0
    sequences = torch.arange(len(chunks))
    cu_seqlens = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    return Places(
        positions=torch.tensor(positions).to(device),
        sequences=sequences.repeat_interleave(counts).to(device),
        cu_seqlens=cu_seqlens.to(device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slots=sequences.to(device),
        writer_sequences=sequences.to(device),
        writer_slots=sequences.to(device),
        writer_ends=torch.tensor(contexts, device=device),
        block_size=BLOCK_SIZE,
        is_single=all(now == 1 for _, now in chunks),
        max_tokens=int(counts.max()),
        max_context=max(*contexts, 1),
    )


def _positions(before: int, now: int) -> list[int]:
    return list(range(before, before + now)) if before >= 0 else [-1] * now


def pool_of(places: Places, dim: int, dtype: torch.dtype) -> Tensor:
    """[rows, dim], NaN but where an entry of a sequence lies; values that bf16 products keep."""
    tables = places.block_tables.cpu()
    pool = torch.full(((int(tables.max()) + 1) * ROWS_PER_BLOCK, dim), float("nan"))
    for table, context in zip(tables, places.context_lens.tolist(), strict=True):
        entries = torch.arange(context // RATIO)
        rows = table[entries // ROWS_PER_BLOCK] * ROWS_PER_BLOCK + entries % ROWS_PER_BLOCK
        pool[rows] = torch.randint(-6, 7, (len(rows), dim)).float()
    return pool.to(places.positions.device, dtype)


CHUNKS = {
    "decode": [(400, 1), (0, 1), (-1, 1), (31, 1), (250, 1)],
    "prefill": [(0, 300)],
    "chunks": [(120, 90), (0, 5), (-1, 3), (301, 40), (64, 1)],
    "few tokens": [(150, 2), (47, 2), (399, 2)],
}


@pytest.mark.parametrize("k", [1, 16, 60])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_the_definition_equals_the_ops_that_the_host_plans(
    chunks: list[tuple[int, int]], k: int
) -> None:
    places = places_of(chunks)
    keys, num_tokens = pool_of(places, 16, torch.float32), places.num_tokens
    q = torch.randn(num_tokens, 4, 16)
    weights = torch.randn(num_tokens, 4)
    picks = pick_entries(q, weights, keys, k, RATIO, places)
    numbers = torch.arange(places.block_tables.shape[1] * ROWS_PER_BLOCK)
    rows = places.block_tables[:, numbers // ROWS_PER_BLOCK] * ROWS_PER_BLOCK
    rows = rows + numbers % ROWS_PER_BLOCK
    visible = (places.positions + 1) // RATIO
    bias = torch.zeros(num_tokens, len(numbers))
    bias.masked_fill_(numbers >= visible.unsqueeze(1), float("-inf"))
    scores = score_entries(q, weights, keys.nan_to_num(), rows, places.sequences, bias)
    expected = pick_rows(scores, rows, places.sequences, min(k, len(numbers)))
    for token in range(num_tokens):
        count = min(int(visible[token]), k)
        assert set(picks[token, :count].tolist()) == set(expected[token, :count].tolist())
        assert picks[token, count:].eq(-1).all()


def test_the_best_columns_come_ascending_and_of_equals_the_lowest() -> None:
    nan = float("nan")
    scores = torch.tensor([[1.0, 3, 2, 3, 2, nan], [0, -0.0, 0, -1, 5, 0], [nan] * 6])
    lengths = torch.tensor([5, 6, 0], dtype=torch.int32)
    assert top_k(scores, lengths, 3).tolist() == [[1, 2, 3], [0, 1, 4], [-1, -1, -1]]
    assert top_k(scores, lengths, 7)[0].tolist() == [0, 1, 2, 3, 4, -1, -1]


def test_arguments_that_do_not_fit_are_refused() -> None:
    scores, lengths = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32)
    for bad in ((scores.double(), lengths, 1), (scores, lengths[:1], 1), (scores, lengths, 0)):
        with pytest.raises(ValueError, match="must be"):
            top_k(*bad)
    places = places_of([(40, 1)])
    q, weights, keys = torch.zeros(1, 2, 8), torch.zeros(1, 2), torch.zeros(99, 8)
    with pytest.raises(ValueError, match="do not fit"):
        pick_entries(q, weights[:, :1], keys, 2, RATIO, places)
    with pytest.raises(ValueError, match="keys must be"):
        pick_entries(q, weights, keys.bfloat16(), 2, RATIO, places)
    with pytest.raises(ValueError, match="must be positive"):
        pick_entries(q, weights, keys, 2, 5, places)
