"""Picking entries: the definitions by hand, and the kernels against them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scission.kernels.indexer import (
    pick,
    pick_entries,
    pick_rows,
    reference,
    score_entries,
    select,
    selection,
    top_k,
    with_more_heads,
)
from scission.kernels.places import Places
from scission.kernels.target import TARGETS, Target, target_of

RATIO, BLOCK_SIZE = 4, 32
ROWS_PER_BLOCK = BLOCK_SIZE // RATIO


def places_of(
    chunks: list[tuple[int, int]], device: torch.device | str = "cpu", block_size: int = BLOCK_SIZE
) -> Places:
    """Of (tokens before, tokens now) of each sequence, -1 before: padding; blocks in any order."""
    contexts = [max(before + now, 0) if before >= 0 else 0 for before, now in chunks]
    positions = [p for before, now in chunks for p in _positions(before, now)]
    counts = torch.tensor([now for _, now in chunks])
    max_blocks = max(-(-context // block_size) for context in contexts) or 1
    # block 0 is padding's
    blocks = torch.randperm(len(chunks) * max_blocks) + 1
    tables = blocks.view(len(chunks), max_blocks)
    for table, context in zip(tables, contexts, strict=True):
        table[-(-context // block_size) :] = 0
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
        block_size=block_size,
        is_single=all(now == 1 for _, now in chunks),
        max_tokens=int(counts.max()),
        max_context=max(*contexts, 1),
    )


def _positions(before: int, now: int) -> list[int]:
    return list(range(before, before + now)) if before >= 0 else [-1] * now


def pool_of(places: Places, dim: int, dtype: torch.dtype) -> Tensor:
    """[rows, dim], NaN but where an entry of a sequence lies; values that bf16 products keep."""
    tables, per_block = places.block_tables.cpu(), places.block_size // RATIO
    pool = torch.full(((int(tables.max()) + 1) * per_block, dim), float("nan"))
    for table, context in zip(tables, places.context_lens.tolist(), strict=True):
        entries = torch.arange(context // RATIO)
        rows = table[entries // per_block] * per_block + entries % per_block
        pool[rows] = torch.randint(-6, 7, (len(rows), dim)).float()
    return pool.to(places.positions.device, dtype)


def target_on(device: torch.device) -> Target:
    # the interpreter multiplies the bits of bf16
    return target_of(device) or replace(TARGETS[0], decoded="float32")


CHUNKS = {
    "decode": [(400, 1), (0, 1), (-1, 1), (31, 1), (250, 1)],
    "prefill": [(0, 90)],
    "chunks": [(120, 20), (0, 5), (-1, 3), (301, 6), (64, 1)],
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


def test_heads_that_fill_a_tile_up_change_no_choice() -> None:
    places = places_of(CHUNKS["chunks"])
    keys = pool_of(places, 16, torch.float32)
    q, weights = torch.randn(places.num_tokens, 4, 16), torch.randn(places.num_tokens, 4)
    padded_q, padded_weights = with_more_heads(q, weights, 16)
    assert padded_q.shape[1] == padded_weights.shape[1] == 16
    assert torch.equal(
        pick_entries(padded_q, padded_weights, keys, 16, RATIO, places),
        pick_entries(q, weights, keys, 16, RATIO, places),
    )


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


# --- top-k --------------------------------------------------------------------------------------


def _ties(shape: tuple[int, int]) -> Tensor:
    scores = torch.randint(-3, 4, shape).float()
    return torch.where(torch.rand(shape) < 0.5, -scores, scores)


def _extremes(shape: tuple[int, int]) -> Tensor:
    scores = torch.randn(shape) * 1e-39
    scores[torch.rand(shape) < 0.2] = float("-inf")
    scores[torch.rand(shape) < 0.05] = float("inf")
    return torch.where(torch.rand(shape) < 0.3, torch.randn(shape) * 1e38, scores)


SCORES = {
    "normal": torch.randn,
    "ties": _ties,
    "equal": torch.zeros,
    "extremes": _extremes,
    "ascending": lambda shape: torch.arange(shape[0] * shape[1]).float().view(shape) - 500,
    "clustered": lambda shape: torch.randn(shape) + 9.0 * (torch.arange(shape[1]) // 97 % 13 == 5),
}


def _check_top_k(scores: Tensor, lengths: list[int], k: int, device: torch.device) -> None:
    """What lies past a row's length is NaN, which would be picked or spread."""
    bounds = torch.tensor(lengths, dtype=torch.int32)
    is_past = torch.arange(scores.shape[1]) >= bounds.unsqueeze(1)
    scores, bounds = scores.masked_fill(is_past, float("nan")).to(device), bounds.to(device)
    out = torch.full((len(lengths), k), -7, dtype=torch.int32, device=device)
    select.select_columns(scores, bounds, k, out, target_on(device))
    assert torch.equal(out, reference.top_k(scores, bounds, k))


@pytest.mark.parametrize("k", [1, 512])
@pytest.mark.parametrize("kind", SCORES)
def test_the_best_columns_of_short_rows_are_selected(
    kind: str, k: int, kernel_device: torch.device
) -> None:
    lengths = [1500, 0, 1, k, k + 1, 777]
    _check_top_k(SCORES[kind]((len(lengths), 1500)), lengths, k, kernel_device)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 512 are narrowed, by samples of 64."""
    small = (selection.Tile(256, 128, 4), selection.Tile(512, 128, 4))
    monkeypatch.setattr(selection, "tiles", lambda target: small)
    monkeypatch.setattr(selection, "SAMPLE", 64)
    monkeypatch.setattr(selection, "NARROW_BLOCK", 256)


@pytest.mark.usefixtures("narrow", "poisoned")
@pytest.mark.parametrize("k", [1, 20, 300])
@pytest.mark.parametrize("kind", SCORES)
def test_the_best_columns_of_long_rows_are_selected(
    kind: str, k: int, kernel_device: torch.device
) -> None:
    lengths = [1500, 256, 257, 100, k + 1]
    _check_top_k(SCORES[kind]((len(lengths), 1500)), lengths, k, kernel_device)


@pytest.mark.usefixtures("narrow")
def test_a_typical_row_is_read_once(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """The candidates hold all picks and fit: what the exact, slow way is for does not occur."""
    target, k, length = target_on(kernel_device), 40, 4000
    monkeypatch.setattr(selection, "SAMPLE", 512)
    kept = {}
    monkeypatch.setattr(select.select_kernel, "run", lambda *a, **_: kept.update(counts=a[2]))
    scores = torch.randn(5, length).to(kernel_device)
    lengths = torch.full((5,), length, dtype=torch.int32, device=kernel_device)
    select.select_columns(scores, lengths, k, torch.empty(5, k), target)
    totals = kept["counts"].sum(1)
    assert totals.min() >= k and totals.max() <= 256


# --- choice -------------------------------------------------------------------------------------


def _queries(num_tokens: int, heads: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Integers: scores are exact whatever the order of their sums."""
    q = torch.randint(-4, 5, (num_tokens, heads, dim)).to(device, torch.bfloat16)
    return q, (torch.randint(-8, 9, (num_tokens, heads)) / 4).to(device)


def _check_picks(places: Places, heads: int, dim: int, k: int, device: torch.device) -> None:
    keys = pool_of(places, dim, torch.bfloat16)
    q, weights = _queries(places.num_tokens, heads, dim, device)
    picks = pick.pick_scored(q, weights, keys, k, RATIO, places, target_on(device))
    assert torch.equal(picks, reference.pick_entries(q, weights, keys, k, RATIO, places))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("k", [16, 60])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_picks_equal_their_reference(
    chunks: list[tuple[int, int]], k: int, kernel_device: torch.device
) -> None:
    _check_picks(places_of(chunks, kernel_device), 16, 64, k, kernel_device)


@pytest.mark.usefixtures("poisoned")
def test_queries_in_tiles_pick_as_at_once(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    monkeypatch.setattr(pick, "_SCRATCH_BYTES", 20_000)
    _check_picks(places_of(CHUNKS["chunks"], kernel_device), 16, 64, 16, kernel_device)


@pytest.mark.usefixtures("narrow", "poisoned")
def test_entries_of_long_contexts_are_narrowed(kernel_device: torch.device) -> None:
    chunks = [(4000, 1), (1900, 1), (-1, 1), (900, 1)]
    _check_picks(places_of(chunks, kernel_device), 16, 64, 24, kernel_device)


# --- real shapes --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("k", [512, 1024, 2048])
@pytest.mark.parametrize("shape", [(1, 1 << 18), (17, 70_001), (128, 16_384), (300, 5000)], ids=str)
@pytest.mark.parametrize("kind", SCORES)
def test_rows_of_real_lengths_are_selected(
    kind: str, shape: tuple[int, int], k: int, kernel_device: torch.device
) -> None:
    lengths = torch.randint(0, shape[1] + 1, shape[:1])
    lengths[0] = shape[1]
    _check_top_k(SCORES[kind](shape), lengths.tolist(), k, kernel_device)


REAL = {
    "decode": [(4095, 1)] * 6 + [(65_535, 1), (-1, 1), (2047, 1), (100_000, 1)],
    "long decode": [(1_000_000, 1)],
    "prefill": [(0, 5000)],
    "later chunk": [(20_000, 2048)],
    "few tokens": [(9000, 3), (4001, 3), (0, 3), (70_000, 3)],
}


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("k", [512, 1024])
@pytest.mark.parametrize("chunks", REAL.values(), ids=REAL)
def test_picks_of_real_shapes_equal_their_reference(
    chunks: list[tuple[int, int]], k: int, kernel_device: torch.device
) -> None:
    _check_picks(places_of(chunks, kernel_device, 128), 64, 128, k, kernel_device)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("max_context", [60_000, 200_000])
def test_a_captured_choice_follows_the_contexts(
    max_context: int, kernel_device: torch.device
) -> None:
    """Captured with one set of contexts, replayed with others: as eagerly, bit for bit."""
    ends = [max_context - 1, 3000, 12_345, 0]
    places = replace(
        places_of([(end, 1) for end in ends], kernel_device, 128), max_context=max_context
    )
    keys = pool_of(places, 128, torch.bfloat16).nan_to_num()
    q, weights = torch.randn(4, 64, 128), torch.randn(4, 64).to(kernel_device)
    arguments = (q.to(kernel_device, torch.bfloat16), weights, keys, 512, RATIO, places)
    pick_entries(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picks = pick_entries(*arguments)
    for shift in (0, 5, 2000):
        places.positions.copy_((torch.tensor(ends) - shift).clamp_min(-1))
        graph.replay()
        assert torch.equal(picks, pick_entries(*arguments))
