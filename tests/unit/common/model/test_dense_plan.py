"""A dense step's plan names the rows that the definitions name, for any mix of chunks."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from scission.common.model.batch import SequenceChunk, build_batch
from scission.common.model.dense_plan import KindPlan, LayerKind, QueryScaling, plan_kinds

WINDOW, BLOCK = 16, 128
FREQUENCIES = torch.tensor([1.0, 0.5])
KINDS = {
    "full": LayerKind(None, FREQUENCIES, query_scaling=QueryScaling(0.1, 64)),
    "sliding": LayerKind(WINDOW, FREQUENCIES, rotation_scale=1.5),
}
CPU = torch.device("cpu")

chunk_lengths = st.lists(
    st.tuples(st.integers(0, 300), st.one_of(st.just(1), st.integers(1, 160))),
    min_size=1,
    max_size=4,
)


def _plan(
    lengths: list[tuple[int, int]], num_padding: int
) -> tuple[dict[str, KindPlan], list[SequenceChunk]]:
    chunks = [
        SequenceChunk([0] * count, start, [10 * i + b + 1 for b in range(5)], slot=i + 1)
        for i, (start, count) in enumerate(lengths)
    ]
    padding = SequenceChunk([0], start=-1, block_ids=[0], slot=0, logits="none")
    chunks += [padding] * num_padding
    return plan_kinds(build_batch(chunks, CPU), KINDS, BLOCK), chunks


def _blocks_row(chunk: SequenceChunk, position: int) -> int:
    return chunk.block_ids[position // BLOCK] * BLOCK + position % BLOCK


@given(chunk_lengths, st.integers(0, 2))
def test_keys_of_full_layers_are_every_token_in_its_block(
    lengths: list[tuple[int, int]], num_padding: int
) -> None:
    plans, chunks = _plan(lengths, num_padding)
    plan, token = plans["full"], 0
    assert plan.look_back is None and plan.writes.tokens is None
    for i, chunk in enumerate(chunks):
        written = plan.writes.rows[token : token + len(chunk.token_ids)].tolist()
        positions = range(max(chunk.start, 0), max(chunk.end, 1))
        assert written == [_blocks_row(chunk, p) for p in positions]
        first, num_queries, num_keys = plan.keys.spans[i]
        assert (first, num_queries, num_keys) == (token, len(chunk.token_ids), max(chunk.end, 0))
        rows = plan.keys.rows[i].tolist()
        assert rows[:num_keys] == [_blocks_row(chunk, p) for p in range(chunk.end)]
        # whatever lies beyond names a row that this step writes
        assert set(rows[num_keys:]) <= {written[-1]}
        token += num_queries


@given(chunk_lengths, st.integers(0, 2))
def test_keys_of_sliding_layers_are_the_window_wherever_it_lies(
    lengths: list[tuple[int, int]], num_padding: int
) -> None:
    plans, chunks = _plan(lengths, num_padding)
    plan, token = plans["sliding"], 0
    look_back = plan.look_back.tolist() if plan.look_back is not None else None
    for i, chunk in enumerate(chunks):
        _, num_queries, num_keys = plan.keys.spans[i]
        first = int(plan.keys.firsts[i])
        assert first == max(0, chunk.start - WINDOW + 1) and first + num_keys == max(chunk.end, 0)
        for column, row in enumerate(plan.keys.rows[i].tolist()):
            position = min(first + column, chunk.end - 1)
            ring_row = chunk.slot * WINDOW + position % WINDOW
            if look_back is None:
                assert row == ring_row
            elif position >= chunk.start:
                assert row == len(look_back) + token + position - chunk.start
            else:
                assert look_back[row] == ring_row
        token += num_queries


def test_queries_grow_at_every_border_of_the_trained_context() -> None:
    plans, _ = _plan([(0, 130)], 0)
    scale = plans["full"].turn.query_scale
    assert scale is not None
    steps = torch.tensor([0.0] * 64 + [1.0] * 64 + [2.0] * 2)
    torch.testing.assert_close(scale.flatten(), 1 + 0.1 * torch.log(1 + steps))
    assert plans["sliding"].turn.query_scale is None


def test_the_rotation_is_scaled_where_a_kind_says_so() -> None:
    plans, _ = _plan([(5, 3)], 0)
    torch.testing.assert_close(plans["sliding"].turn.rotation, 1.5 * plans["full"].turn.rotation)
