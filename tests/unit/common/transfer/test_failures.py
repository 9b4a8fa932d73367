"""Everything that can go wrong between two living endpoints: each ends in the right event, and no
arena slot is lost.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scission.common.transfer.arena import Arena
from scission.common.transfer.events import (
    Aborted,
    Closed,
    Committed,
    Destination,
    Failed,
    Granted,
    Ready,
    Refused,
    ReserveRequested,
    Waiting,
)
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.receiver import Receiver
from scission.common.transfer.wire import Header, Kind
from tests.unit.common.transfer.endpoints import DIGEST, SLOT_BYTES, Pair, Room, make_pair
from tests.unit.common.transfer.proxy import Direction, Filter, Frames, Proxy

torch.set_num_threads(1)

FAST = TransferOptions(
    slot_bytes=SLOT_BYTES, arena_bytes=8 * SLOT_BYTES, stall_s=0.15, decide_s=0.9
)
SOURCE, TARGET = Room([3, 1, 7, 2, 10, 11], 2), Room([5, 6, 2, 9, 4, 8], 1)
NUM_TOKENS = 45
PROXIED = ("tcp", "shared")


@contextmanager
def proxied(
    tier: str, directory: Path, options: TransferOptions = FAST
) -> Iterator[tuple[Pair, Proxy]]:
    """A pair whose messages go through a proxy that passes them on, until a test says otherwise."""
    directory = directory / "s"
    directory.mkdir()
    with make_pair(tier, directory, options=options) as pair:
        proxy = Proxy(pair.receiver.address, directory)
        pair.through = proxy.address
        try:
            yield pair, proxy
            pair.settle()
        finally:
            pair.sender.close()
            proxy.close()


def once(kind: Kind, change: Callable[[Header, Frames], list[Frames]], at: int = 0) -> Filter:
    """Changes the `at`-th message of a kind, and passes all others on."""
    count = 0

    def filter(direction: Direction, header: Header, frames: Frames) -> list[Frames]:
        nonlocal count
        if header.kind is not kind:
            return [frames]
        count += 1
        return change(header, frames) if count == at + 1 else [frames]

    return filter


def drop(header: Header, frames: Frames) -> list[Frames]:
    return []


def double(header: Header, frames: Frames) -> list[Frames]:
    return [frames, frames]


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def drop_all(*kinds: Kind) -> Filter:
    return lambda direction, header, frames: [] if header.kind in kinds else [frames]


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


@pytest.mark.parametrize("tier", ("inproc", "tcp", "shared"))
def test_more_transfers_than_slots_all_finish(tier: str, tmp_path: Path) -> None:
    options = replace(FAST, arena_bytes=2 * SLOT_BYTES, decide_s=5.0)
    with make_pair(tier, tmp_path, options=options, num_slots=8) as pair:
        rooms = [Room([i + 1, i + 6], i + 1) for i in range(5)]
        pair.on_reserve = lambda event: pair.receiver.grant(
            event.handle,
            rooms[int(event.handle.request_id)].block_ids,
            rooms[int(event.handle.request_id)].slot,
        )
        for i, room in enumerate(rooms):
            handle = pair.reserve(13, room, request_id=str(i))
            pair.sender.piece_ready(handle, (0, 4), (0, 13))
            pair.finish(handle)
        pair.run_until(lambda: sum(isinstance(e, Committed) for e in pair.sent) == len(rooms))


@pytest.mark.parametrize("tier", ("inproc", "tcp", "shared"))
def test_layout_mismatch_names_the_field(tier: str, tmp_path: Path) -> None:
    with make_pair(tier, tmp_path, sender_digest={**DIGEST, "weights": "other"}) as pair:
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        refused = pair.expect_sender(Refused)
        pair.expect_sender(Closed)
        assert isinstance(refused, Refused)
        assert (refused.reason, refused.field) == ("layout_mismatch", "weights")
        assert pair.received == []


def test_waiting_reservation_is_granted_later(tmp_path: Path) -> None:
    with make_pair("tcp", tmp_path) as pair:
        pair.on_reserve = lambda event: pair.receiver.wait(event.handle, 3)
        handle = pair.reserve(NUM_TOKENS, SOURCE)
        waiting = pair.expect_sender(Waiting)
        assert isinstance(waiting, Waiting) and waiting.position == 3
        requested = pair.expect_receiver(ReserveRequested)
        pair.receiver.grant(requested.handle, TARGET.block_ids, TARGET.slot)
        granted = pair.expect_sender(Granted)
        assert isinstance(granted, Granted) and granted.wait_s > 0
        pair.sender.piece_ready(handle, (0, 4), (0, NUM_TOKENS))
        pair.finish(handle)
        pair.expect_sender(Closed)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)


def test_refusal_by_the_engine_reaches_the_sender(tmp_path: Path) -> None:
    with make_pair("tcp", tmp_path) as pair:
        pair.on_reserve = lambda event: pair.receiver.refuse(event.handle, "full")
        pair.reserve(NUM_TOKENS, SOURCE)
        refused = pair.expect_sender(Refused)
        assert isinstance(refused, Refused) and refused.reason == "full"
        pair.expect_sender(Closed)


def test_request_that_can_never_fit_is_refused_without_the_engine(tmp_path: Path) -> None:
    with make_pair("tcp", tmp_path) as pair:
        pair.reserve(10_000, SOURCE)
        refused = pair.expect_sender(Refused)
        assert isinstance(refused, Refused) and refused.reason == "too_large"
        assert pair.received == []


@pytest.mark.parametrize("tier", ("inproc", "tcp", "shared"))
@pytest.mark.parametrize("moment", ["before_grant", "granted", "mid_ship", "ready"])
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_abort_at_any_moment_frees_everything(
    tier: str, moment: str, side: str, tmp_path: Path
) -> None:
    with make_pair(tier, tmp_path, options=FAST) as pair:
        pair.is_committing = False
        if moment != "before_grant":
            pair.grant_into(TARGET)
        handle = pair.reserve(NUM_TOKENS, SOURCE)
        requested = pair.expect_receiver(ReserveRequested)
        if moment != "before_grant":
            pair.expect_sender(Granted)
        if moment in ("mid_ship", "ready"):
            pair.sender.piece_ready(handle, (0, 4), (0, NUM_TOKENS))
        if moment == "mid_ship":
            pair.run_until(lambda: pair.receiver.stats().get("injected_chunks", 0) > 0)
        if moment == "ready":
            pair.finish(handle)
            pair.expect_receiver(Ready)
        if side == "sender":
            pair.sender.abort(handle, "finished")
            aborted = pair.expect_receiver(Aborted)
            assert isinstance(aborted, Aborted) and aborted.reason == "finished"
            pair.expect_sender(Closed)
            assert pair.sender_event(Failed) is None
        else:
            pair.receiver.abort(requested.handle, "cancelled")
            failed = pair.expect_sender(Failed)
            assert isinstance(failed, Failed) and failed.reason == "cancelled"
            pair.expect_sender(Closed)


def test_abort_after_the_commit_changes_nothing(tmp_path: Path) -> None:
    with make_pair("tcp", tmp_path) as pair:
        handle = pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Closed)
        pair.sender.abort(handle, "finished")
        pair.receiver.abort(pair.received[0].handle, "cancelled")
        assert pair.sender_event(Failed) is None
        assert pair.receiver_event(Aborted) is None


def test_deadline_ends_a_transfer_at_both_ends(tmp_path: Path) -> None:
    with make_pair("tcp", tmp_path) as pair:
        pair.on_reserve = lambda event: pair.receiver.wait(event.handle, 1)
        pair.reserve(NUM_TOKENS, SOURCE, deadline_s=0.3)
        failed = pair.expect_sender(Failed)
        assert isinstance(failed, Failed) and failed.reason == "deadline"
        pair.run_until(
            lambda: any(
                isinstance(e, Failed | Aborted) and e.reason == "deadline" for e in pair.received
            )
        )


def test_higher_attempt_supersedes_and_a_lower_one_is_refused(tmp_path: Path) -> None:
    with make_pair("tcp", tmp_path) as pair:
        pair.on_reserve = lambda event: pair.receiver.wait(event.handle, 0)
        pair.reserve(NUM_TOKENS, SOURCE, attempt=1)
        pair.expect_sender(Waiting)
        newer = pair.reserve(NUM_TOKENS, SOURCE, attempt=2)
        failed = pair.expect_sender(Failed)
        assert isinstance(failed, Failed) and failed.reason == "superseded"
        pair.reserve(NUM_TOKENS, SOURCE, attempt=0)
        refused = pair.expect_sender(Refused)
        assert isinstance(refused, Refused) and refused.reason == "superseded"
        pair.sender.abort(newer, "finished")
        pair.expect_receiver(Aborted)


def test_nobody_listening_is_unreachable(tmp_path: Path) -> None:
    options = replace(FAST, connect_timeout_s=0.3)
    with make_pair("tcp", tmp_path, options=options) as pair:
        gone = Destination("decode-9", 9, "tcp://127.0.0.1:9")
        source = Room([1], 1)
        pair.through = gone.address
        pair.reserve(3, source)
        failed = pair.expect_sender(Failed)
        assert isinstance(failed, Failed) and failed.reason == "unreachable"
        pair.expect_sender(Closed)


@pytest.mark.parametrize("address", ["nonsense", "tcp://", "ipc://", ""])
def test_senseless_address_fails_the_transfer(address: str, tmp_path: Path) -> None:
    options = replace(FAST, connect_timeout_s=0.3)
    with make_pair("tcp", tmp_path, options=options) as pair:
        pair.through = address
        pair.reserve(3, Room([1], 1))
        failed = pair.expect_sender(Failed)
        assert isinstance(failed, Failed) and failed.reason == "unreachable"


@pytest.mark.parametrize("tier", PROXIED)
def test_restarted_decode_gets_nothing_of_the_old_life(tier: str, tmp_path: Path) -> None:
    with make_pair(tier, tmp_path, options=FAST) as pair:
        pair.grant_into(TARGET)
        old = pair.reserve(NUM_TOKENS, SOURCE)
        pair.expect_sender(Granted)
        pair.receiver.close()
        options = replace(
            FAST,
            bind=pair.receiver.address,
            arena_dir=tmp_path if tier == "shared" else None,
        )
        pair.receiver = Receiver(pair.target, DIGEST, "decode-2", 77, options, pair.wake)
        failed = pair.expect_sender(Failed)
        assert isinstance(failed, Failed) and failed.handle == old
        assert failed.reason in ("draining", "peer_lost")
        # addressed to the life that is over
        pair.sent.clear()
        pair.reserve(NUM_TOKENS, SOURCE, request_id="r2")
        refused = pair.expect_sender(Refused)
        assert isinstance(refused, Refused) and refused.reason == "old_epoch"
        pair.sent.clear()
        pair.received.clear()
        pair.receiver_epoch = 77
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Committed)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)


def test_late_chunks_of_an_ended_transfer_are_dropped_and_counted(tmp_path: Path) -> None:
    late: list[Frames] = []

    def hold_chunks(direction: Direction, header: Header, frames: Frames) -> list[Frames]:
        if header.kind is Kind.CHUNK:
            late.append(frames)
            return []
        if header.kind is Kind.ABORT_ACK:
            return [frames]
        return [frames]

    with proxied("tcp", tmp_path) as (pair, proxy):
        proxy.filter = hold_chunks
        pair.grant_into(TARGET)
        handle = pair.reserve(NUM_TOKENS, SOURCE)
        pair.sender.piece_ready(handle, (0, 4), (0, NUM_TOKENS))
        pair.run_until(lambda: len(late) > 0)
        pair.sender.abort(handle, "cancelled")
        pair.expect_receiver(Aborted)
        pair.settle()

        def release(direction: Direction, header: Header, frames: Frames) -> list[Frames]:
            if header.kind is Kind.CHUNK:
                return [*late, frames]
            return [frames]

        proxy.filter = release
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Committed)
        assert pair.receiver.stats()["dropped_late"] >= len(late)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)


@pytest.mark.parametrize("tier", PROXIED)
def test_endless_transfers_leave_no_socket_or_descriptor_behind(tier: str, tmp_path: Path) -> None:
    def num_descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = num_descriptors()
    for round in range(3):
        directory = tmp_path / str(round)
        directory.mkdir()
        with make_pair(tier, directory, options=FAST) as pair:
            for _ in range(5):
                pair.sent.clear()
                pair.ship(13, SOURCE, TARGET)
                pair.expect_sender(Closed)
    assert num_descriptors() <= before
