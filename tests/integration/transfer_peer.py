"""One end of a transfer as a process of its own, to be killed or stopped by a test.

`python -m tests.integration.transfer_peer ROLE DIRECTORY [WORKER_ID EPOCH ADDRESS]`

ROLE is receiver (prints its address), deaf (a receiver whose engine never injects) or sender (is
granted room, then ships nothing). Prints one line when it is where the test wants it, then runs
until it is ended.
"""

import sys
import threading
import time
from pathlib import Path

import torch

from scission.common.cache.storage import CacheStorage
from scission.common.transfer.events import (
    Destination,
    Granted,
    Ready,
    ReserveRequested,
    StateSource,
)
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.receiver import Receiver
from scission.common.transfer.sender import Sender
from tests.unit.common.transfer.endpoints import DIGEST, LAYOUT, SLOT_BYTES

EPOCH = 4711


def options(directory: Path | None) -> TransferOptions:
    return TransferOptions(
        slot_bytes=SLOT_BYTES,
        arena_bytes=8 * SLOT_BYTES,
        arena_dir=directory,
        stall_s=0.3,
        decide_s=1.0,
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def receive(directory: Path | None, storage: CacheStorage, *, is_deaf: bool) -> None:
    woken = threading.Event()
    receiver = Receiver(storage, DIGEST, "decode-1", EPOCH, options(directory), woken.set)
    say(receiver.address)
    while True:
        woken.wait(0.05)
        woken.clear()
        for event in receiver.poll():
            if isinstance(event, ReserveRequested):
                receiver.grant(event.handle, [1, 2, 3, 4, 5, 6], 1)
            elif isinstance(event, Ready):
                receiver.commit(event.handle)
        if not is_deaf:
            receiver.inject(1 << 20)


def send(directory: Path | None, storage: CacheStorage, destination: Destination) -> None:
    sender = Sender(storage, DIGEST, "prefill-1", 1, options(directory), lambda: None)
    deadline = time.monotonic() + 60
    sender.reserve("r1", 0, destination, 45, 1, deadline, StateSource([1, 2, 3, 4, 5, 6], 1))
    while not any(isinstance(event, Granted) for event in sender.poll()):
        time.sleep(0.005)
    say("granted")
    while True:
        time.sleep(60)


if __name__ == "__main__":
    torch.set_num_threads(1)
    role, directory_name, *rest = sys.argv[1:]
    shared = Path(directory_name) if directory_name != "-" else None
    own = CacheStorage(LAYOUT, 12, 4, torch.device("cpu"))
    if role == "sender":
        send(shared, own, Destination(rest[0], int(rest[1]), rest[2]))
    receive(shared, own, is_deaf=role == "deaf")
