"""Injection beside a device's steps, on rows in host memory that are written when a test lets them:
what its threads meet ends no transfer in silence, and steps wait for no more than they must.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scission.common.cache.device_rows import Bytes, DeviceRows
from scission.common.transfer import device_injector
from scission.common.transfer.events import Closed, Failed
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.wire import start_hash
from tests.unit.common.transfer.endpoints import SLOT_BYTES, Room, make_pair

SOURCE, TARGET = Room([3, 1, 7], 2), Room([5, 6, 2], 1)
NUM_TOKENS = 21
OPTIONS = TransferOptions(slot_bytes=SLOT_BYTES, arena_bytes=8 * SLOT_BYTES, copy_threads=1)


class HostRows(DeviceRows):
    """Writes when it is waited for and `may_write` is set, except those that fail."""

    def __init__(self, num_failures: int = 0) -> None:
        self.num_failures = num_failures
        self.num_begun = 0
        self.num_waits = 0  # of steps for writes
        self.may_write = threading.Event()
        self.may_write.set()

    def write(self, rows: Tensor, index: Tensor, data: Bytes) -> Callable[[], None]:
        self.num_begun += 1

        def wait() -> None:
            assert self.may_write.wait(10.0)
            if self.num_failures:
                self.num_failures -= 1
                raise RuntimeError("the device failed")
            target = rows.view(torch.uint8)
            values = torch.from_numpy(data).view(target.shape[0], -1, target.shape[2])
            target.index_copy_(1, index, values)

        return wait

    def write_after_steps(self) -> None:
        pass

    def step_after_writes(self) -> None:
        self.num_waits += 1


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are pinned for devices alone."""
    monkeypatch.setattr(device_injector, "pinned_bytes", lambda count: np.empty(count, np.uint8))


@pytest.mark.parametrize("tier", ["inproc", "shared"])
def test_rows_that_were_not_written_come_again(tier: str, tmp_path: Path) -> None:
    rows = HostRows(num_failures=1)
    with make_pair(tier, tmp_path, options=OPTIONS, target_rows=rows) as pair:
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Closed)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)
        assert pair.receiver.stats()["damaged"] == 1


def test_a_chunk_that_was_not_checked_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [MemoryError()]

    def failing(packed: bytes) -> object:
        if failures:
            raise failures.pop()
        return start_hash(packed)

    monkeypatch.setattr(device_injector, "start_hash", failing)
    with make_pair("shared", tmp_path, options=OPTIONS, target_rows=HostRows()) as pair:
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Closed)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)


def test_a_device_that_writes_nothing_fails_its_transfers_and_keeps_no_buffer(
    tmp_path: Path,
) -> None:
    rows = HostRows(num_failures=10**9)
    options = replace(OPTIONS, max_reships=20)
    with make_pair("shared", tmp_path, options=options, target_rows=rows) as pair:
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        failed = pair.expect_receiver(Failed)
        assert isinstance(failed, Failed)
        assert failed.reason == "corrupt"
        pair.expect_sender(Closed)
        rows.num_failures = 0
        pair.sent.clear()
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Closed)
        pair.assert_arrived(NUM_TOKENS, SOURCE, TARGET)


def test_steps_wait_for_writes_under_way_when_their_rows_are_given_up(tmp_path: Path) -> None:
    rows = HostRows()
    rows.may_write.clear()
    with make_pair("shared", tmp_path, options=OPTIONS, target_rows=rows) as pair:
        handle = pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.run_until(lambda: rows.num_begun > 0)
        pair.sender.abort(handle, "cancelled")
        pair.run_until(lambda: rows.num_waits == 1)
        rows.may_write.set()
        pair.expect_sender(Closed)


def test_steps_wait_for_nothing_when_all_is_written(tmp_path: Path) -> None:
    rows = HostRows()
    with make_pair("shared", tmp_path, options=OPTIONS, target_rows=rows) as pair:
        pair.ship(NUM_TOKENS, SOURCE, TARGET)
        pair.expect_sender(Closed)
        assert rows.num_waits == 0
