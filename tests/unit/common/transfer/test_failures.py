"""Messages lost, doubled, damaged or late, and peers that stand still: each ends in the right
event, and no arena slot is lost.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scission.common.transfer.arena import Arena
from scission.common.transfer.events import (
    Closed,
    Committed,
    Failed,
    Granted,
    Ready,
    ReserveRequested,
)
from scission.common.transfer.wire import Header, Kind
from tests.unit.common.transfer.endpoints import SLOT_BYTES, make_pair
from tests.unit.common.transfer.faults import (
    FAST,
    NUM_TOKENS,
    PROXIED,
    SOURCE,
    TARGET,
    double,
    drop,
    flip,
    once,
    proxied,
)
from tests.unit.common.transfer.proxy import Direction, Frames

torch.set_num_threads(1)


@pytest.mark.parametrize("tier", PROXIED)
@pytest.mark.parametrize(
    "kind",
    [
        Kind.RESERVE,
        Kind.GRANT,
        Kind.CHUNK,
        Kind.CREDIT,
        Kind.MANIFEST,
        Kind.COMMIT,
        Kind.COMMIT_ACK,
        Kind.PING,
        Kind.PONG,
    ],
    ids=lambda kind: kind.name,
)
@pytest.mark.parametrize("change", [drop, double], ids=["dropped", "doubled"])
def test_a_dropped_or_doubled_message_does_no_harm(
    tier: str, kind: Kind, change: Callable[[Header, Frames], list[Frames]], tmp_path: Path
) -> None:
    with proxied(tier, tmp_path) as (pair, proxy):
        proxy.filter = once(kind, change)
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Closed)
        assert pair.sender_event(Committed) is not None
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)


@pytest.mark.parametrize("tier", PROXIED)
def test_flipped_row_byte_is_shipped_again(tier: str, tmp_path: Path) -> None:
    with proxied(tier, tmp_path) as (pair, proxy):

        def damage(header: Header, frames: Frames) -> list[Frames]:
            if tier == "tcp":
                return [[frames[0], flip(frames[1], len(frames[1]) // 2)]]
            arena_path = next((tmp_path / "s").glob("*.arena"))
            arena = Arena.open(arena_path.parent, arena_path.name, SLOT_BYTES, FAST.num_slots)
            arena.slot(header.slot, header.length)[header.length // 2] ^= 0x10
            arena.close()
            return [frames]

        proxy.filter = once(Kind.CHUNK, damage, at=1)
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Closed)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)
        assert pair.receiver.stats()["damaged"] == 1
        assert pair.sender.stats()["reships"] == 1


@pytest.mark.parametrize("at", [0, 4, 5, 6, 8, 16, 24, 26, 28, 32, 36, 40, 44, 48, 56, 63])
def test_flipped_header_byte_is_shipped_again(at: int, tmp_path: Path) -> None:
    with proxied("tcp", tmp_path) as (pair, proxy):
        proxy.filter = once(Kind.CHUNK, lambda _, f: [[flip(f[0], at), f[1]]], at=1)
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Closed)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_truncated_rows_are_shipped_again(keep: int, tmp_path: Path) -> None:
    with proxied("tcp", tmp_path) as (pair, proxy):
        proxy.filter = once(Kind.CHUNK, lambda _, f: [[f[0], f[1][:keep]]])
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Closed)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)
        assert pair.receiver.stats()["dropped_invalid"] == 1


def test_reordered_chunks_arrive_whole(tmp_path: Path) -> None:
    held: list[Frames] = []

    def reverse_pairs(direction: Direction, header: Header, frames: Frames) -> list[Frames]:
        if header.kind is not Kind.CHUNK:
            return [frames]
        held.append(frames)
        if len(held) < 2:
            return []
        out = held[::-1]
        held.clear()
        return out

    with proxied("tcp", tmp_path) as (pair, proxy):
        proxy.filter = reverse_pairs
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Closed)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)


def test_rows_that_never_come_whole_fail_as_corrupt_at_both_ends(tmp_path: Path) -> None:
    def damage(direction: Direction, header: Header, frames: Frames) -> list[Frames]:
        if header.kind is Kind.CHUNK and header.sequence == 0:
            return [[frames[0], flip(frames[1], 0)]]
        return [frames]

    with proxied("tcp", tmp_path) as (pair, proxy):
        proxy.filter = damage
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        failed = pair.expect_sender(Failed)
        assert isinstance(failed, Failed) and failed.reason == "corrupt"
        pair.expect_sender(Closed)
        assert [e.reason for e in pair.received if isinstance(e, Failed)] == ["corrupt"]
        assert pair.receiver_event(Ready) is None
        assert pair.receiver.stats()["damaged"] == FAST.max_reships + 1


def test_chunk_that_is_always_lost_fails_as_stalled(tmp_path: Path) -> None:
    with proxied("tcp", tmp_path) as (pair, proxy):
        proxy.filter = lambda direction, header, frames: (
            [] if header.kind is Kind.CHUNK and header.sequence == 1 else [frames]
        )
        started = time.monotonic()
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        failed = pair.expect_sender(Failed)
        assert time.monotonic() - started < 4 * FAST.decide_s
        assert isinstance(failed, Failed) and failed.reason in ("stalled", "corrupt")
        pair.expect_receiver(Failed)


@pytest.mark.parametrize("tier", PROXIED)
def test_lost_abort_is_repeated_until_it_is_acknowledged(tier: str, tmp_path: Path) -> None:
    for kind in (Kind.ABORT, Kind.ABORT_ACK):
        directory = tmp_path / kind.name
        directory.mkdir()
        with proxied(tier, directory) as (pair, proxy):
            proxy.filter = once(kind, drop)
            pair.grant_into(TARGET)
            pair.reserve(NUM_TOKENS, SOURCE)
            pair.expect_sender(Granted)
            (handle,) = pair.rooms
            assert pair.receiver.counts()["granted"] > 0
            pair.receiver.abort(handle, "cancelled")
            failed = pair.expect_sender(Failed)
            assert isinstance(failed, Failed) and failed.reason == "cancelled"
            pair.settle()


@pytest.mark.parametrize("tier", PROXIED)
def test_slots_of_a_silent_sender_stay_in_quarantine(tier: str, tmp_path: Path) -> None:
    with proxied(tier, tmp_path) as (pair, proxy):
        pair.grant_into(TARGET)
        pair.reserve(NUM_TOKENS, SOURCE)
        pair.expect_sender(Granted)
        is_silent = True
        proxy.filter = lambda direction, header, frames: [] if is_silent else [frames]
        failed = pair.expect_receiver(Failed)
        assert isinstance(failed, Failed) and failed.reason == "stalled"
        counts = pair.receiver.counts()
        assert counts["quarantined"] > 0 and counts["granted"] == 0
        # heard again, it says that it writes no more
        is_silent = False
        pair.settle()


@pytest.mark.parametrize("tier", PROXIED)
@pytest.mark.parametrize(
    "silent_from", [Kind.HELLO, Kind.RESERVE, Kind.CHUNK, Kind.MANIFEST], ids=lambda k: k.name
)
def test_silent_receiver_ends_the_transfer_in_time(
    tier: str, silent_from: Kind, tmp_path: Path
) -> None:
    options = replace(FAST, connect_timeout_s=0.5)
    with proxied(tier, tmp_path, options) as (pair, proxy):
        is_silent = False

        def silence(direction: Direction, header: Header, frames: Frames) -> list[Frames]:
            nonlocal is_silent
            is_silent |= header.kind is silent_from
            return [] if is_silent else [frames]

        proxy.filter = silence
        started = time.monotonic()
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        failed = pair.expect_sender(Failed)
        pair.expect_sender(Closed)
        assert time.monotonic() - started < 2.5
        expected = "unreachable" if silent_from is Kind.HELLO else "stalled"
        assert isinstance(failed, Failed) and failed.reason == expected
        pair.run_until(lambda: pair.receiver.counts()["granted"] == 0)
        proxy.filter = lambda direction, header, frames: [frames]


def test_sender_that_computes_for_long_is_no_stall(tmp_path: Path) -> None:
    with make_pair("tcp", tmp_path, options=FAST) as pair:
        pair.grant_into(TARGET)
        handle = pair.reserve(NUM_TOKENS, SOURCE)
        pair.expect_sender(Granted)
        until = time.monotonic() + 2 * FAST.decide_s
        pair.run_until(lambda: time.monotonic() > until)
        pair.sender.piece_ready(handle, (0, 4), (0, NUM_TOKENS))
        pair.finish(handle)
        pair.expect_sender(Closed)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)


@pytest.mark.parametrize("tier", PROXIED)
def test_engine_that_injects_nothing_holds_at_most_its_credit(tier: str, tmp_path: Path) -> None:
    options = replace(FAST, arena_bytes=3 * SLOT_BYTES, stall_s=0.1, decide_s=0.5)
    with make_pair(tier, tmp_path, options=options) as pair:
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        room = TARGET
        filled: list[int] = []
        deadline = time.monotonic() + 5
        while pair.sender_event(Failed) is None:
            assert time.monotonic() < deadline
            pair.sent += pair.sender.poll()
            for event in pair.receiver.poll():
                pair.received.append(event)
                if isinstance(event, ReserveRequested):
                    pair.receiver.grant(event.handle, room.block_ids, room.slot)
            filled.append(pair.receiver.counts()["filled"])
            time.sleep(0.002)
        failed = pair.sender_event(Failed)
        assert isinstance(failed, Failed) and failed.reason == "stalled"
        assert 1 <= max(filled) <= options.num_slots
