"""Which device the options mean."""

from pathlib import Path

import pytest
import torch

from scission.common.config import ModelOptions
from scission.common.device import open_device
from scission.common.errors import ConfigError
from scission.kernels import overlap


def options(**fields: object) -> ModelOptions:
    return ModelOptions(Path("model"), **fields)  # type: ignore[arg-type]


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert open_device(options()) == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cpu"):
        open_device(options(device="cuda"))


def test_the_cpu_is_taken_when_asked_for_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    overlapping: list[bool] = []
    monkeypatch.setattr(overlap, "overlap_launches", lambda: overlapping.append(True))
    assert open_device(options(device="cpu")) == torch.device("cpu")
    assert not overlapping
    assert open_device(options()) == torch.device("cuda", 0)
    assert overlapping
