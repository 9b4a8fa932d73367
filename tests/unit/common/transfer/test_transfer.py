"""A request's state from one endpoint to the other, over every tier."""

import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.transfer.events import Closed, Committed, Granted, Ready
from scission.common.transfer.options import TransferOptions
from scission.protos import inference_pb2, transfer_pb2
from tests.unit.common.transfer.endpoints import (
    SLOT_BYTES,
    TIERS,
    Room,
    fill_noise,
    fill_poison,
    make_pair,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("tier", TIERS)
def test_state_arrives_whole_and_nothing_else_is_touched(tier: str, tmp_path: Path) -> None:
    source, target = Room([3, 1, 7], 2), Room([5, 6, 2], 1)
    with make_pair(tier, tmp_path) as pair:
        handle = pair.ship(21, source, target)
        pair.expect_sender(Closed)
        kinds = [type(event) for event in pair.sent]
        assert kinds == [Granted, Committed, Closed]
        assert all(event.handle == handle for event in pair.sent)
        pair.assert_arrived(21, source, target)


@pytest.mark.parametrize("tier", TIERS)
def test_manifest_carries_the_first_tokens(tier: str, tmp_path: Path) -> None:
    token = inference_pb2.Token(choice=1, index=0, token_id=42)
    with make_pair(tier, tmp_path) as pair:
        pair.grant_into(Room([1], 1))
        handle = pair.reserve(3, Room([1], 1))
        pair.sender.piece_ready(handle, (0, 4), (0, 3))
        sequences = [
            transfer_pb2.Sequence(choice=0),
            transfer_pb2.Sequence(choice=1, tokens=[token]),
        ]
        pair.sender.finish(handle, sequences, first_token_at=0.0)
        ready = pair.expect_receiver(Ready)
        assert isinstance(ready, Ready)
        assert list(ready.manifest.sequences) == sequences
        assert ready.tier == tier
        assert ready.num_bytes == pair.source.layout.shipped_bytes(3)
        pair.expect_sender(Closed)


@pytest.mark.parametrize("tier", TIERS)
def test_request_larger_than_the_arena_passes_through_it(tier: str, tmp_path: Path) -> None:
    options = TransferOptions(slot_bytes=SLOT_BYTES, arena_bytes=2 * SLOT_BYTES)
    layout = CacheLayout((Component("kv", Kind.PAGED, (0, 1, 2), (100,), "float32"),), block_size=8)
    blocks = list(range(1, 65))
    with make_pair(tier, tmp_path, layout=layout, num_blocks=65, options=options) as pair:
        assert layout.shipped_bytes(512) > 50 * options.arena_bytes
        source, target = Room(blocks, 1), Room(blocks[::-1], 1)
        pair.ship(512, source, target)
        pair.expect_sender(Closed)
        pair.assert_arrived(512, source, target)


@pytest.mark.parametrize("tier", TIERS)
def test_pieces_may_be_ready_before_the_grant_and_after_it(tier: str, tmp_path: Path) -> None:
    source, target = Room([1, 2, 3, 4], 1), Room([9, 8, 7, 6], 2)
    with make_pair(tier, tmp_path) as pair:
        handle = pair.reserve(30, source)
        pair.sender.piece_ready(handle, (0, 2), (0, 13))
        pair.run_until(lambda: bool(pair.received))
        event = pair.received[0]
        pair.receiver.grant(event.handle, target.block_ids, target.slot)
        pair.expect_sender(Granted)
        pair.sender.piece_ready(handle, (2, 4), (0, 13))
        pair.sender.piece_ready(handle, (0, 2), (13, 30))
        pair.run_until(lambda: pair.stats()["receiver"].get("injected_chunks", 0) > 0)
        pair.sender.piece_ready(handle, (2, 4), (13, 30))
        pair.finish(handle)
        pair.expect_sender(Closed)
        pair.assert_arrived(30, source, target)


@pytest.mark.parametrize("tier", TIERS)
def test_one_state_goes_to_two_destinations(tier: str, tmp_path: Path) -> None:
    source, rooms = Room([1, 2, 3], 1), [Room([4, 5, 6], 2), Room([9, 8, 7], 3)]
    with make_pair(tier, tmp_path) as pair:
        pair.on_reserve = lambda event: pair.receiver.grant(
            event.handle,
            rooms[event.handle.attempt].block_ids,
            rooms[event.handle.attempt].slot,
        )
        handles = [
            pair.reserve(20, source, request_id=f"r{i}", attempt=i) for i in range(len(rooms))
        ]
        for handle in handles:
            pair.sender.piece_ready(handle, (0, 4), (0, 20))
            pair.finish(handle)
        pair.run_until(lambda: sum(isinstance(e, Closed) for e in pair.sent) == len(handles))
        for component in pair.source.layout.components:
            rows = component.shipped_rows(20)
            views = [
                storage.rows(component).view(torch.uint8)[
                    :, storage.row_index(component, rows, room.block_ids, room.slot)
                ]
                for storage, room in (
                    (pair.source, source),
                    (pair.target, rooms[0]),
                    (pair.target, rooms[1]),
                )
            ]
            assert torch.equal(views[0], views[1])
            assert torch.equal(views[0], views[2])


class _Point:
    """A device's work that a test ends."""

    def __init__(self) -> None:
        self.is_passed = False

    def query(self) -> bool:
        return self.is_passed


def test_rows_are_not_read_before_the_device_has_written_them(tmp_path: Path) -> None:
    source, target = Room([3, 1, 7], 2), Room([5, 6, 2], 1)
    with make_pair("tcp", tmp_path) as pair:
        points: list[_Point] = []

        def mark() -> _Point:
            points.append(_Point())
            return points[-1]

        pair.source.mark = mark  # type: ignore[method-assign]
        pair.grant_into(target)
        handle = pair.reserve(21, source)
        pair.expect_sender(Granted)
        pair.sender.piece_ready(handle, (0, 4), (0, 16))
        pair.sender.piece_ready(handle, (0, 4), (16, 21))
        pair.finish(handle)
        until = time.monotonic() + 0.1
        pair.run_until(lambda: time.monotonic() > until)
        assert not pair.sender.stats().get("chunks")
        fill_noise(pair.source, seed=5)
        points[0].is_passed = True
        pair.run_until(lambda: pair.sender.stats().get("chunks", 0) > 0)
        assert pair.receiver_event(Ready) is None
        for point in points:
            point.is_passed = True
        pair.expect_sender(Closed)
        pair.assert_arrived(21, source, target)


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    block_size = draw(st.sampled_from([4, 8, 24]))
    num_layers = draw(st.integers(1, 5))
    components = []
    for i in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(list(Kind)))
        layers = draw(st.sets(st.integers(0, num_layers - 1), min_size=1))
        ring_size = draw(st.sampled_from([4, 8]))
        components.append(
            Component(
                f"{kind}_{i}",
                kind,
                tuple(sorted(layers)),
                tuple(draw(st.lists(st.integers(1, 30), max_size=2))),
                draw(st.sampled_from(["float32", "bfloat16", "uint8", "float8_e4m3fn"])),
                tokens_per_row=draw(st.sampled_from([1, 2, 4])) if kind is Kind.PAGED else 1,
                ring_size=ring_size if kind is Kind.RING else 0,
                live_align=draw(st.sampled_from([1, 2, 4])) if kind is Kind.RING else 1,
                live_lookback=draw(st.integers(0, 1)) if kind is Kind.RING else 0,
            )
        )
    return CacheLayout(tuple(components), block_size)


@st.composite
def cuts(draw: st.DrawFn, end: int) -> list[tuple[int, int]]:
    """[0, end) cut into ranges."""
    points = sorted(draw(st.sets(st.integers(0, end), max_size=4)) | {0, end})
    return list(pairwise(points))


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), layout=layouts())
def test_any_layout_and_any_cut_arrives_exactly(
    tier: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, layout: CacheLayout
) -> None:
    num_tokens = data.draw(st.integers(1, 60))
    num_blocks = layout.num_blocks(num_tokens)
    ids = st.permutations(range(1, 70)).map(lambda all_ids: list(all_ids)[:num_blocks])
    source, target = Room(data.draw(ids), 2), Room(data.draw(ids), 3)
    pieces = [
        (layers, tokens) for tokens in data.draw(cuts(num_tokens)) for layers in data.draw(cuts(5))
    ]
    num_early = data.draw(st.integers(0, len(pieces)))
    pieces = data.draw(st.permutations(pieces))
    options = TransferOptions(slot_bytes=SLOT_BYTES, arena_bytes=3 * SLOT_BYTES, window_slots=2)
    directory = tmp_path_factory.mktemp("shared")
    with make_pair(tier, directory, layout=layout, num_blocks=70, options=options) as pair:
        fill_noise(pair.source, seed=num_tokens)
        fill_poison(pair.target)
        handle = pair.reserve(num_tokens, source)
        for layers, tokens in pieces[:num_early]:
            pair.sender.piece_ready(handle, layers, tokens)
        pair.grant_into(target)
        pair.expect_sender(Granted)
        for layers, tokens in pieces[num_early:]:
            pair.sender.piece_ready(handle, layers, tokens)
        pair.finish(handle)
        pair.expect_sender(Closed)
        pair.assert_arrived(num_tokens, source, target)
