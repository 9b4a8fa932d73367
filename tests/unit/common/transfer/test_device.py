"""Hand-offs from and to a device, beside what the device does meanwhile."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scission.common.transfer.events import Closed, Ready
from scission.common.transfer.options import TransferOptions
from tests.unit.common.transfer.endpoints import SLOT_BYTES, TIERS, Room, make_pair

pytestmark = pytest.mark.gpu


@pytest.fixture
def directory() -> Iterator[Path]:
    """Of shared memory: a device copies by itself to no file on a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _keep_busy(device: torch.device) -> None:
    """Some tens of milliseconds of work on the current stream."""
    x = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        x = torch.mm(x, x).clamp_(-1, 1)


@pytest.mark.parametrize("tier", TIERS)
def test_state_arrives_whole_and_nothing_else_is_touched(
    tier: str, directory: Path, device: torch.device
) -> None:
    source, target = Room([3, 1, 7], 2), Room([5, 6, 2], 1)
    with make_pair(tier, directory, device=device) as pair:
        pair.ship(21, source, target)
        pair.expect_sender(Closed)
        torch.cuda.synchronize()
        pair.assert_arrived(21, source, target)


@pytest.mark.parametrize("tier", TIERS)
def test_what_a_step_still_writes_is_read_after_it(
    tier: str, directory: Path, device: torch.device
) -> None:
    source, target = Room([3, 1, 7], 2), Room([5, 6, 2], 1)
    with make_pair(tier, directory, device=device) as pair:
        pair.grant_into(target)
        handle = pair.reserve(21, source)
        _keep_busy(device)
        for tensor in (*pair.source.paged.values(), *pair.source.slots.values()):
            tensor.view(torch.uint8).add_(1)
        pair.sender.piece_ready(handle, (0, 4), (0, 21))
        pair.finish(handle)
        pair.expect_sender(Closed)
        torch.cuda.synchronize()
        pair.assert_arrived(21, source, target)


def test_rows_are_written_after_their_last_user_and_before_their_next(
    directory: Path, device: torch.device
) -> None:
    source, target = Room([3, 1, 7], 2), Room([5, 6, 2], 1)
    with make_pair("shared", directory, device=device) as pair:
        # the last user of the blocks is still at work when they are granted
        _keep_busy(device)
        for tensor in (*pair.target.paged.values(), *pair.target.slots.values()):
            tensor.view(torch.uint8).fill_(0xFF)
        pair.is_committing = False
        pair.ship(21, source, target)
        ready = pair.expect_receiver(Ready)
        assert isinstance(ready, Ready)
        torch.cuda.synchronize()
        pair.assert_arrived(21, source, target)
        # the transfer is withdrawn: what its next user writes from here on stays
        pair.receiver.abort(ready.handle, "cancelled")
        for tensor in (*pair.target.paged.values(), *pair.target.slots.values()):
            tensor.view(torch.uint8).fill_(0)
        pair.expect_sender(Closed)
        torch.cuda.synchronize()
        assert all(not t.view(torch.uint8).any() for t in pair.target.paged.values())


def test_a_request_larger_than_the_arena_passes_through_it(
    directory: Path, device: torch.device
) -> None:
    options = TransferOptions(slot_bytes=SLOT_BYTES, arena_bytes=2 * SLOT_BYTES, copy_threads=3)
    blocks = list(range(1, 65))
    with make_pair("shared", directory, num_blocks=65, options=options, device=device) as pair:
        source, target = Room(blocks, 1), Room(blocks[::-1], 1)
        pair.ship(512, source, target)
        pair.expect_sender(Closed)
        torch.cuda.synchronize()
        pair.assert_arrived(512, source, target)


def test_an_arena_that_cannot_be_pinned_is_used_by_way_of_the_host(
    tmp_path: Path, device: torch.device
) -> None:
    source, target = Room([3, 1, 7], 2), Room([5, 6, 2], 1)
    with make_pair("shared", tmp_path, device=device) as pair:
        pair.ship(21, source, target)
        pair.expect_sender(Closed)
        torch.cuda.synchronize()
        pair.assert_arrived(21, source, target)
