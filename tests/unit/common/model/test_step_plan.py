"""A step's plan names the rows that the definitions name, for any mix of chunks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scission.common.model.batch import ForwardBatch, SequenceChunk, build_batch
from scission.common.model.step_plan import PlanGeometry, StepPlan, plan_step

WINDOW, BLOCK = 16, 128
FREQUENCIES = torch.tensor([1.0, 0.5])
GEOMETRY = PlanGeometry(
    WINDOW, BLOCK, {4: True, 128: False}, {4: 20, 128: None}, FREQUENCIES, FREQUENCIES
)
CPU = torch.device("cpu")
NEVER = float("-inf")

chunk_lengths = st.lists(
    st.tuples(st.integers(0, 300), st.one_of(st.just(1), st.integers(1, 160))),
    min_size=1,
    max_size=4,
)


def _batch(lengths: list[tuple[int, int]], num_padding: int = 0) -> ForwardBatch:
    chunks = [
        SequenceChunk([0] * count, start, [10 * i + b + 1 for b in range(5)], slot=i + 1)
        for i, (start, count) in enumerate(lengths)
    ]
    padding = SequenceChunk([0], start=-1, block_ids=[0], slot=0, logits="none")
    return build_batch([*chunks, *[padding] * num_padding], CPU)


def _tokens(lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(sequence, position) of every token."""
    return [(i, start + n) for i, (start, count) in enumerate(lengths) for n in range(count)]


def _ring_row(sequence: int, position: int, size: int) -> int:
    return (sequence + 1) * size + position % size


def _paged_row(sequence: int, entry: int, ratio: int) -> int:
    per_block = BLOCK // ratio
    return (10 * sequence + entry // per_block + 1) * per_block + entry % per_block


def _looked_up(look_back: torch.Tensor | None, row: int, fresh: list[object]) -> object:
    """What a row of (ring rows, fresh tokens, initial row) is."""
    rows = [] if look_back is None else look_back.tolist()
    return rows[row] if row < len(rows) else [*fresh, "initial"][row - len(rows)]


@settings(max_examples=60)
@given(chunk_lengths)
def test_every_query_sees_its_window(lengths: list[tuple[int, int]]) -> None:
    plan = plan_step(_batch(lengths), GEOMETRY).window
    tokens = _tokens(lengths)
    for row, bias, (sequence, position) in zip(
        plan.rows.tolist(), plan.bias.tolist(), tokens, strict=True
    ):
        wanted = range(position, max(-1, position - WINDOW), -1)
        assert [b == 0 for b in bias] == [n < len(wanted) for n in range(len(bias))]
        start = lengths[sequence][0]
        for seen, at in zip(row, wanted, strict=False):
            if plan.look_back is None:
                assert seen == _ring_row(sequence, at, WINDOW)
            elif at >= start:
                assert _looked_up(plan.look_back, seen, list(tokens)) == (sequence, at)
            else:
                found = _looked_up(plan.look_back, seen, list(tokens))
                assert found == _ring_row(sequence, at, WINDOW)


@settings(max_examples=60)
@given(chunk_lengths)
def test_every_completed_entry_is_made_from_its_tokens(lengths: list[tuple[int, int]]) -> None:
    step = plan_step(_batch(lengths), GEOMETRY)
    tokens = _tokens(lengths)
    for ratio, k in ((4, 2), (128, 1)):
        plan = step.compressions[ratio]
        completed = [(s, p // ratio) for s, p in tokens if (p + 1) % ratio == 0]
        assert plan.rows.tolist() == [_paged_row(s, c, ratio) for s, c in completed]
        for (sequence, entry), sources in zip(completed, plan.sources.tolist(), strict=True):
            for slot, half_row in enumerate(sources):
                row, half = divmod(half_row, k)
                position = (entry - (k - 1)) * ratio + slot
                assert half == (slot // ratio if k == 2 else 0)
                found = _looked_up(plan.look_back, row, list(tokens))
                if position < 0:
                    assert found == "initial"
                elif position >= lengths[sequence][0]:
                    assert found == (sequence, position)
                else:
                    assert found == _ring_row(sequence, position, k * ratio)


@settings(max_examples=60)
@given(chunk_lengths)
def test_entries_are_seen_from_the_token_that_completes_them(
    lengths: list[tuple[int, int]],
) -> None:
    step = plan_step(_batch(lengths), GEOMETRY)
    for ratio in (4, 128):
        plan = step.entries[ratio]
        counts = [(start + count) // ratio for start, count in lengths]
        if plan is None:
            assert not any(counts)
            continue
        complete = {_paged_row(s, c, ratio) for s, n in enumerate(counts) for c in range(n)}
        assert set(plan.rows.flatten().tolist()) <= complete
        for s, n in enumerate(counts):
            assert plan.rows[s, :n].tolist() == [_paged_row(s, c, ratio) for c in range(n)]
        for bias, (_, position) in zip(plan.bias.tolist(), _tokens(lengths), strict=True):
            visible = (position + 1) // ratio
            assert [b == 0 for b in bias] == [c < visible for c in range(len(bias))]


@settings(max_examples=60)
@given(chunk_lengths, st.integers(0, 2))
def test_a_ring_is_left_with_the_last_positions(
    lengths: list[tuple[int, int]], num_padding: int
) -> None:
    step = plan_step(_batch(lengths, num_padding), GEOMETRY)
    tokens: list[tuple[int, int]] = [*_tokens(lengths), *[(-1, -1)] * num_padding]
    for size in (WINDOW, 8, 128):
        writes = step.ring_writes[size]
        rows = writes.rows.tolist()
        fed = list(range(len(tokens))) if writes.tokens is None else writes.tokens.tolist()
        for row, token in zip(rows, fed, strict=True):
            sequence, position = tokens[token]
            assert row == _ring_row(sequence, position, size)
        own = [row for row, token in zip(rows, fed, strict=True) if tokens[token][0] >= 0]
        assert len(own) == len(set(own)) == sum(min(count, size) for _, count in lengths)


def test_padding_completes_and_sees_nothing() -> None:
    plan: StepPlan = plan_step(_batch([(3, 1)], num_padding=2), GEOMETRY)
    assert plan.compressions[4].num_entries == 1 and plan.compressions[128].num_entries == 0
    assert plan.window.bias[1:].eq(NEVER).all()
    entries = plan.entries[4]
    assert entries is not None and entries.bias[1:].eq(NEVER).all()
    assert plan.ring_writes[WINDOW].rows.tolist()[1:] == [WINDOW - 1] * 2
