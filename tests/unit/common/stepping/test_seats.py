"""Rows of the running batch: everybody has one, nobody shares one, and few are needed."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scission.common.sampling import SequenceSampling
from scission.common.stepping.seats import Seats, bucket_sizes
from scission.common.stepping.sequences import DecodeSequence
from scission.common.types import SamplingParams


def sequence() -> DecodeSequence:
    return DecodeSequence(SequenceSampling(SamplingParams(max_tokens=1), 0, ()), [], 0, 0, [1])


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 7, 16, 100, 128, 129, 300])
def test_buckets_ascend_to_the_largest_batch_and_waste_less_than_half(max_rows: int) -> None:
    sizes = bucket_sizes(max_rows)
    assert sizes[-1] == max_rows
    assert list(sizes) == sorted(set(sizes))
    for small, large in itertools.pairwise(sizes):
        assert large <= 2 * small


SIZES = bucket_sizes(24)
ARRANGEMENTS = st.lists(st.sets(st.integers(0, 39), max_size=24), max_size=25)


@given(ARRANGEMENTS)
def test_any_arrangement_seats_all_in_the_smallest_batch(arrangements: list[set[int]]) -> None:
    everybody = [sequence() for _ in range(40)]
    seats: Seats[DecodeSequence] = Seats(SIZES)
    live: dict[int, DecodeSequence] = {}
    for numbers in arrangements:
        before = dict(seats.rows)
        wanted = [everybody[i] for i in sorted(numbers)]
        seating = seats.arrange(wanted)
        assert set(seats.rows) == set(wanted)
        assert seats.size == next(size for size in SIZES if size >= max(len(wanted), 1))
        # what the caller is told is all that it must do
        for row in seating.emptied:
            live.pop(row)
        for s, source in seating.moved.items():
            assert before[s] == source
            assert s not in seating.joined
        for s in (*seating.moved, *seating.joined):
            live[seats.rows[s]] = s
        assert {row: s for s, row in seats.rows.items()} == live
        # a row that another one takes its token from is left alone
        assert not {*seating.moved.values()} & {*seats.rows.values()}


def test_rows_stay_while_the_batch_stays() -> None:
    a, b, c = sequence(), sequence(), sequence()
    seats: Seats[DecodeSequence] = Seats(SIZES)
    seats.arrange([a, b, c])
    again = seats.arrange([c, a, b])
    assert not (again.emptied or again.joined or again.moved)
    fewer = seats.arrange([c])
    assert fewer.moved == {c: 2}
    assert sorted(fewer.emptied) == [1, 2]
    assert seats.rows == {c: 0}
