"""Who may speak to a receiver, and what a peer may name."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from scission.common.errors import ConfigError, TransferError
from scission.common.transfer import connection
from scission.common.transfer.arena import Arena, Lease, is_locked, shared_file
from scission.common.transfer.events import Closed, Committed, Failed
from scission.common.transfer.options import CurveKeys, TransferOptions
from scission.common.transfer.sender import Sender
from tests.unit.common.transfer.endpoints import DIGEST, SLOT_BYTES, Room, make_pair

OPTIONS = TransferOptions(slot_bytes=SLOT_BYTES, arena_bytes=8 * SLOT_BYTES, connect_timeout_s=0.5)
SOURCE, TARGET = Room([3, 1, 7], 2), Room([5, 6, 2], 1)


def keys(*, allowed: set[str] | None = None, server: CurveKeys | None = None) -> CurveKeys:
    """A pair of its own; without more it is also the server's and the only one let in."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    return CurveKeys(
        public,
        secret,
        server.public if server is not None else public,
        frozenset({public} if allowed is None else allowed),
    )


@pytest.mark.parametrize("tier", ["tcp", "shared"])
def test_state_arrives_under_curve(tier: str, tmp_path: Path) -> None:
    with make_pair(tier, tmp_path, options=replace(OPTIONS, curve=keys())) as pair:
        pair.ship(21, SOURCE, TARGET)
        pair.expect_sender(Closed)
        assert pair.sender_event(Committed) is not None
        pair.assert_arrived(21, SOURCE, TARGET)


@pytest.mark.parametrize("kind", ["stranger", "plain", "wrong_server"])
def test_sender_without_the_right_keys_gets_nowhere(kind: str, tmp_path: Path) -> None:
    ours = keys()
    theirs = {
        "stranger": keys(server=ours),
        "plain": None,
        "wrong_server": replace(ours, server=keys().public),
    }[kind]
    with make_pair("tcp", tmp_path, options=replace(OPTIONS, curve=ours)) as pair:
        pair.sender.close()
        options = replace(OPTIONS, curve=theirs, arena_dir=None)
        pair.sender = Sender(pair.source, DIGEST, "prefill-2", 8, options, pair.wake)
        pair.reserve(21, SOURCE)
        failed = pair.expect_sender(Failed)
        assert isinstance(failed, Failed) and failed.reason in ("unreachable", "peer_lost")
        pair.expect_sender(Closed)
        assert pair.received == []


@pytest.mark.parametrize("name", ["", "other", "../scission-x", "scission-/x", "scission-\0"])
def test_peer_names_only_files_of_the_shared_directory(name: str, tmp_path: Path) -> None:
    with pytest.raises(TransferError):
        shared_file(tmp_path, name)


def test_arena_is_its_owners_alone_and_of_the_size_it_says(tmp_path: Path) -> None:
    arena = Arena.create(tmp_path, 5, 4096, 3)
    try:
        assert arena.path.stat().st_mode & 0o777 == 0o600
        assert len(set(arena.nonce)) > 1
        with pytest.raises(TransferError):
            Arena.open(tmp_path, arena.path.name, 4096, 4)
        opened = Arena.open(tmp_path, arena.path.name, 4096, 3)
        opened.slot(2, 4096)[:] = 7
        assert (arena.slot(2, 4096) == 7).all() and opened.nonce == arena.nonce
        opened.close()
    finally:
        arena.remove()
        arena.close()


def test_arena_that_does_not_fit_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Arena.create(tmp_path, 5, 1 << 40, 1 << 10)
    assert list(tmp_path.iterdir()) == []


def test_receiver_without_room_for_an_arena_takes_messages(tmp_path: Path) -> None:
    options = replace(OPTIONS, arena_dir=tmp_path / "missing")
    with make_pair("tcp", tmp_path) as pair:
        pair.receiver.close()
        receiver = type(pair.receiver)
        pair.receiver = receiver(pair.target, DIGEST, "decode-2", 3, options, pair.wake)
        pair.receiver_epoch = 3
        pair.ship(21, SOURCE, TARGET)
        pair.expect_sender(Closed)
        pair.assert_arrived(21, SOURCE, TARGET)


def test_sender_without_a_lease_ships_in_messages_and_lets_the_arena_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(directory: Path, name: str) -> Lease:
        raise OSError("the folder is not ours to write")

    monkeypatch.setattr(connection, "Lease", refuse)
    with make_pair("shared", tmp_path, options=OPTIONS) as pair:
        num_of_receiver = _num_open(tmp_path, ".arena")
        pair.ship(21, SOURCE, TARGET)
        committed = pair.expect_sender(Committed)
        assert isinstance(committed, Committed)
        assert committed.tier == "tcp"
        assert _num_open(tmp_path, ".arena") == num_of_receiver


def _num_open(directory: Path, suffix: str) -> int:
    """Descriptors of this process that are files of the directory."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            path = link.readlink()
            count += path.parent == directory and path.suffix == suffix
    return count


def test_lease_is_held_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "scission-1-1.lease"
    assert not is_locked(path)
    lease = Lease(tmp_path, path.name)
    assert is_locked(path)
    with pytest.raises(OSError):
        Lease(tmp_path, path.name)
    lease.close()
    assert not is_locked(path)


@pytest.mark.parametrize(
    "change",
    [
        {"bind": "0.0.0.0:5"},
        {"slot_bytes": 5000},
        {"arena_bytes": 4096},
        {"window_slots": 0},
        {"stall_s": 3.0},
        {"curve": ("short", "short", "short")},
    ],
    ids=str,
)
def test_senseless_options_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        if "curve" in change:
            CurveKeys("short", "short", "short", frozenset())
        TransferOptions(**change)  # type: ignore[arg-type]
