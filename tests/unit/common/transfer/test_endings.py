"""Every other way in which a transfer between two living endpoints ends: refused, aborted, late,
superseded; and no arena slot is lost.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

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
from scission.common.transfer.receiver import Receiver
from scission.common.transfer.wire import Header, Kind
from tests.unit.common.transfer.endpoints import DIGEST, SLOT_BYTES, Room, make_pair
from tests.unit.common.transfer.faults import (
    FAST,
    NUM_TOKENS,
    PROXIED,
    SOURCE,
    TARGET,
    proxied,
)
from tests.unit.common.transfer.proxy import Direction, Frames

torch.set_num_threads(1)


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
