"""A pair of endpoints whose messages a test may lose, double or damage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scission.common.transfer.options import TransferOptions
from scission.common.transfer.wire import Header, Kind
from tests.unit.common.transfer.endpoints import SLOT_BYTES, Pair, Room, make_pair
from tests.unit.common.transfer.proxy import Direction, Filter, Frames, Proxy

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
