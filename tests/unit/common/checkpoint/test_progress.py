"""How far a load is, where no terminal shows a bar."""

import io
import logging
import re
import sys

import pytest

from scission.common.checkpoint.progress import WATCHED_BYTES, LoadProgress


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())


def test_each_tenth_is_said_once_with_its_rate(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        progress = LoadProgress(500 * WATCHED_BYTES, "loading weights")
        for _ in range(500):
            progress.add(WATCHED_BYTES, WATCHED_BYTES // 2)
        progress.close()
    lines = [record.getMessage() for record in caplog.records]
    said = [int(m[1]) for line in lines if (m := re.match(r"loading weights: (\d+) %", line))]
    assert said == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    # a rank that copies half of what it passes says so
    assert re.match(r"loading weights: done in [\d.]+ s, 268.44 GB at [\d.]+ GB/s", lines[-1])


def test_tensors_larger_than_a_tenth_skip_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        progress = LoadProgress(10 * WATCHED_BYTES, "loading")
        progress.add(7 * WATCHED_BYTES, 0)
        progress.add(3 * WATCHED_BYTES, 0)
    assert [record.getMessage()[:13] for record in caplog.records] == ["loading: 70 %"]


def test_a_small_load_says_only_that_it_is_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        progress = LoadProgress(1000, "loading")
        for _ in range(10):
            progress.add(100, 100)
        progress.close()
    assert [record.getMessage()[:13] for record in caplog.records] == ["loading: done"]


def test_an_empty_checkpoint_is_no_division_by_zero() -> None:
    progress = LoadProgress(0, "loading")
    progress.add(0, 0)
    progress.close()
