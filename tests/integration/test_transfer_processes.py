"""A transfer whose other end is a process that dies or stands still: the right event in time, and
no arena slot is reused while that process may still write to it.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from scission.common.cache.storage import CacheStorage
from scission.common.transfer.arena import Arena
from scission.common.transfer.events import (
    Closed,
    Committed,
    Destination,
    Failed,
    ReserveRequested,
    StateSource,
    TransferHandle,
)
from scission.common.transfer.receiver import Receiver
from scission.common.transfer.sender import Sender
from scission.protos import transfer_pb2
from tests.integration.transfer_peer import EPOCH, options
from tests.unit.common.transfer.endpoints import DIGEST, LAYOUT, fill_noise

TIERS = ("tcp", "shared")
NUM_TOKENS = 45


@contextmanager
def peer(
    role: str, directory: Path | None, *rest: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the line it printed."""
    command = [sys.executable, "-m", "tests.integration.transfer_peer", role]
    command += [str(directory or "-"), *rest]
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def shared_directory(tier: str, tmp_path: Path) -> Path | None:
    return tmp_path if tier == "shared" else None


def storage() -> CacheStorage:
    made = CacheStorage(LAYOUT, 12, 4, torch.device("cpu"))
    fill_noise(made)
    return made


def ship(sender: Sender, address: str) -> TransferHandle:
    destination = Destination("decode-1", EPOCH, address)
    source = StateSource([1, 2, 3, 4, 5, 6], 1)
    handle = sender.reserve("r1", 0, destination, NUM_TOKENS, 1, time.monotonic() + 60, source)
    sender.piece_ready(handle, (0, 4), (0, NUM_TOKENS))
    sender.finish(handle, [transfer_pb2.Sequence()], time.monotonic())
    return handle


def wait_for_close(sender: Sender, timeout_s: float = 10) -> list[object]:
    """All events up to the first Closed."""
    events: list[object] = []
    deadline = time.monotonic() + timeout_s
    while not any(isinstance(event, Closed) for event in events):
        assert time.monotonic() < deadline, events
        events += sender.poll()
        time.sleep(0.002)
    return events


@contextmanager
def granted_sender(tier: str, tmp_path: Path) -> Iterator[tuple[Receiver, subprocess.Popen[str]]]:
    """A receiver of ours, and a process that holds slots of it."""
    directory = shared_directory(tier, tmp_path)
    receiver = Receiver(storage(), DIGEST, "decode-1", EPOCH, options(directory), lambda: None)
    try:
        command = ("decode-1", str(EPOCH), receiver.address)
        with grant_in_background(receiver), peer("sender", directory, *command) as (process, line):
            assert line == "granted"
            yield receiver, process
    finally:
        receiver.close()


@contextmanager
def grant_in_background(receiver: Receiver) -> Iterator[None]:
    """The engine of a receiver, until the block is entered by a sender that has its grant."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(0.005):
            for event in receiver.poll():
                if isinstance(event, ReserveRequested):
                    receiver.grant(event.handle, [1, 2, 3, 4, 5, 6], 1)
                    return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def wait_for_failure(receiver: Receiver, timeout_s: float = 5) -> Failed:
    deadline = time.monotonic() + timeout_s
    while True:
        for event in receiver.poll():
            if isinstance(event, Failed):
                return event
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_until_free(receiver: Receiver, timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while receiver.counts()["free"] != receiver.counts()["total"]:
        assert time.monotonic() < deadline, receiver.counts()
        time.sleep(0.002)
    receiver.check()


@pytest.mark.parametrize("tier", TIERS)
def test_state_reaches_another_process(tier: str, tmp_path: Path) -> None:
    directory = shared_directory(tier, tmp_path)
    with peer("receiver", directory) as (_, address):
        sender = Sender(storage(), DIGEST, "prefill-1", 1, options(directory), lambda: None)
        try:
            ship(sender, address)
            assert any(isinstance(event, Committed) for event in wait_for_close(sender))
        finally:
            sender.close()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_lost_receiver_ends_the_transfer_in_time(
    tier: str, how: signal.Signals, tmp_path: Path
) -> None:
    directory = shared_directory(tier, tmp_path)
    with peer("deaf", directory) as (process, address):
        sender = Sender(storage(), DIGEST, "prefill-1", 1, options(directory), lambda: None)
        try:
            ship(sender, address)
            deadline = time.monotonic() + 5
            while not sender.stats().get("chunks"):
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(how)
            lost_at = time.monotonic()
            events = wait_for_close(sender)
            assert time.monotonic() - lost_at < 2.5
            (failed,) = [event for event in events if isinstance(event, Failed)]
            assert failed.reason == ("peer_lost" if how == signal.SIGKILL else "stalled")
            assert sender.stats()["errors"] == 0
        finally:
            sender.close()


@pytest.mark.parametrize("tier", TIERS)
def test_slots_of_a_killed_sender_come_back(tier: str, tmp_path: Path) -> None:
    with granted_sender(tier, tmp_path) as (receiver, process):
        assert receiver.counts()["granted"] > 0
        process.kill()
        killed_at = time.monotonic()
        assert wait_for_failure(receiver).reason == "peer_lost"
        wait_until_free(receiver)
        assert time.monotonic() - killed_at < 2.5
        assert receiver.stats()["errors"] == 0


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGCONT], ids=["dies", "goes_on"])
def test_slots_of_a_stopped_sender_are_quarantined_until_it_cannot_write(
    end: signal.Signals, tmp_path: Path
) -> None:
    with granted_sender("shared", tmp_path) as (receiver, process):
        process.send_signal(signal.SIGSTOP)
        assert wait_for_failure(receiver).reason == "stalled"
        for _ in range(20):
            assert receiver.counts()["quarantined"] > 0
            time.sleep(0.05)
        process.send_signal(end)
        wait_until_free(receiver)
        assert receiver.stats()["errors"] == 0


def test_what_a_killed_receiver_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with peer("receiver", tmp_path) as (process, _):
        living = Arena.create(tmp_path, 1, 4096, 1)
        process.kill()
        process.wait()
        names = {path.suffix for path in tmp_path.iterdir()}
        assert names == {".arena", ".ipc"}
        receiver = Receiver(storage(), DIGEST, "decode-2", 2, options(tmp_path), lambda: None)
        receiver.close()
        assert [path.name for path in tmp_path.iterdir()] == [living.path.name]
        living.remove()
        living.close()
