"""The receiver's arena: which slot belongs to whom, and the shared-memory file behind them.

The file's first page holds a nonce that proves who can read it; slots follow. Files in the
directory of shared memory carry the receiver's epoch in their names: `scission-<epoch>.arena`,
`.ipc` (socket), `-<n>.lease`. Locks (`flock`) tell the living from the dead, across containers too:
the kernel drops them with the process.
"""

import contextlib
import enum
import fcntl
import mmap
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from scission.common.cache.device_rows import pin, unpin
from scission.common.cache.storage import Bytes
from scission.common.errors import TransferError

HEADER_BYTES = 4096
NONCE_BYTES = 32
PREFIX = "scission-"


class SlotState(enum.StrEnum):
    FREE = "free"
    GRANTED = "granted"  # its transfer may fill it at any moment
    FILLED = "filled"  # holds a chunk that waits for injection
    QUARANTINED = "quarantined"  # its transfer has ended, but the peer may still write


class SlotTable:
    """Every slot in exactly one state; the last one freed is handed out first, while it is warm in
    the caches. One thread changes it, any may ask for the counts.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(reversed(range(num_slots)))
        self._held: dict[object, dict[int, SlotState]] = {}
        self._num_in = {state.value: 0 for state in SlotState}
        self._publish()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, owner: object) -> int | None:
        """Grant a free slot, or None when there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._held.setdefault(owner, {})[slot] = SlotState.GRANTED
        self._num_in[SlotState.GRANTED] += 1
        self._publish()
        return slot

    def state(self, owner: object, slot: int) -> SlotState | None:
        """The state of one of the owner's slots, None for anybody else's."""
        return self._held.get(owner, {}).get(slot)

    def mark(self, owner: object, slot: int, state: SlotState) -> None:
        """Move one of the owner's slots to another of the states it may hold."""
        assert state is not SlotState.FREE
        held = self._held[owner]
        self._num_in[held[slot]] -= 1
        self._num_in[state] += 1
        held[slot] = state
        self._publish()

    def granted(self, owner: object) -> list[int]:
        return [s for s, state in self._held.get(owner, {}).items() if state is SlotState.GRANTED]

    def num_held(self, owner: object) -> int:
        return len(self._held.get(owner, ()))

    def free(self, owner: object, slots: Iterable[int]) -> None:
        """Take slots from their owner."""
        held = self._held.get(owner, {})
        for slot in slots:
            self._num_in[held.pop(slot)] -= 1
            self._free.append(slot)
        if not held:
            self._held.pop(owner, None)
        self._publish()

    def free_all(self, owner: object) -> None:
        self.free(owner, list(self._held.get(owner, ())))

    def quarantine(self, owner: object) -> None:
        for slot in self._held.get(owner, {}):
            self.mark(owner, slot, SlotState.QUARANTINED)

    def counts(self) -> dict[str, int]:
        """Slots by state, and their total; from any thread."""
        return self._counts

    def check(self) -> None:
        """Assert that no slot is lost or doubled."""
        places = Counter([*self._free, *(slot for held in self._held.values() for slot in held)])
        assert places == Counter(range(self.num_slots)), places
        states = Counter(state for held in self._held.values() for state in held.values())
        assert all(states[SlotState(s)] == n for s, n in self._num_in.items()), (
            states,
            self._num_in,
        )

    def _publish(self) -> None:
        # one new dict, so that another thread never sees half a move
        self._counts = {**self._num_in, "free": len(self._free), "total": self.num_slots}


class Arena:
    """The slots' memory: made by a receiver, opened by senders on the same host."""

    def __init__(self, path: Path, descriptor: int, slot_bytes: int, num_slots: int) -> None:
        """Takes the file over, descriptor included."""
        self.path = path
        self._descriptor = descriptor
        size = HEADER_BYTES + slot_bytes * num_slots
        memory = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        self._pinned: Bytes | None = None
        self._memory = memory
        self._header = memory[:HEADER_BYTES]
        self._slots = memory[HEADER_BYTES:].reshape(num_slots, slot_bytes)

    @classmethod
    def create(cls, directory: Path, epoch: int, slot_bytes: int, num_slots: int) -> "Arena":
        """Raises OSError where the directory is missing, not ours to write, or too small."""
        path = directory / f"{PREFIX}{epoch:016x}.arena"
        unlocked = path.with_suffix(".new")
        descriptor = os.open(unlocked, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            # all pages now: a full file system is an error here and not a SIGBUS at the first write
            os.posix_fallocate(descriptor, 0, HEADER_BYTES + slot_bytes * num_slots)
            os.pwrite(descriptor, secrets.token_bytes(NONCE_BYTES), 0)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.rename(unlocked, path)
        except BaseException:
            os.close(descriptor)
            unlocked.unlink(missing_ok=True)
            raise
        return cls(path, descriptor, slot_bytes, num_slots)

    @classmethod
    def open(cls, directory: Path, name: str, slot_bytes: int, num_slots: int) -> "Arena":
        """A receiver's arena, by its file name. Raises OSError or TransferError where it is not
        what was said.
        """
        path = shared_file(directory, name)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        size = os.fstat(descriptor).st_size
        if size != HEADER_BYTES + slot_bytes * num_slots:
            os.close(descriptor)
            raise TransferError(f"{name} has {size} bytes, not {num_slots} slots of {slot_bytes}")
        return cls(path, descriptor, slot_bytes, num_slots)

    @property
    def nonce(self) -> bytes:
        return self._header[:NONCE_BYTES].tobytes()

    def slot(self, number: int, num_bytes: int) -> Bytes:
        view: Bytes = self._slots[number, :num_bytes]
        return view

    def pin(self) -> None:
        """Let devices copy from and to it by themselves. Raises RuntimeError where they cannot."""
        pin(self._memory)
        self._pinned = self._memory

    def close(self) -> None:
        """Let the file go; the mapping goes with its last view."""
        if self._pinned is not None:
            unpin(self._pinned)
            self._pinned = None
        os.close(self._descriptor)
        empty = np.empty((0, 0), np.uint8)
        self._memory = empty.reshape(-1)
        self._header, self._slots = empty[:0].reshape(-1), empty

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class Lease:
    """A sender's lock that says: this process may still write to the arena."""

    def __init__(self, directory: Path, name: str) -> None:
        """Raises OSError where the file cannot be made or somebody else holds it."""
        path = shared_file(directory, name)
        self._descriptor = os.open(
            path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        os.close(self._descriptor)


def shared_file(directory: Path, name: str) -> Path:
    """The path of a file that a peer named; raises TransferError for a name that leads anywhere
    else.
    """
    if not name.startswith(PREFIX) or "/" in name or "\0" in name:
        raise TransferError(f"not a file of the shared directory: {name!r}")
    return directory / name


def is_locked(path: Path) -> bool:
    """Whether a living process holds the file; a missing file is held by nobody."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def remove_stale(directory: Path) -> None:
    """Remove what receivers that died left behind."""
    for arena in directory.glob(f"{PREFIX}*.arena"):
        with contextlib.suppress(OSError):
            if not is_locked(arena):
                for path in _family(arena):
                    path.unlink(missing_ok=True)


def _family(arena: Path) -> Iterator[Path]:
    yield from arena.parent.glob(f"{arena.stem}*")
