import json
from pathlib import Path

import pytest

from scission.common.checkpoint.bundled import write_bundled
from scission.common.ports import listen
from scission.common.settings import Settings, read_settings
from scission.services import doctor as doctor_module
from scission.services.doctor import Finding, Verdict, doctor, examine


def settings(**flags: str) -> Settings:
    return read_settings({"port": "0", **flags}, {})


def finding(about: str, **flags: str) -> Finding:
    return next(found for found in examine(settings(**flags)) if found.about == about)


def blockers(**flags: str) -> set[str]:
    return {found.about for found in examine(settings(**flags)) if found.verdict == "blocker"}


def test_nothing_blocks_on_a_machine_that_passes_the_tests() -> None:
    assert blockers() == set()
    assert doctor(settings()) == 0


def test_a_taken_port_is_a_blocker(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as listener:
        taken = settings(port=str(listener.getsockname()[1]))
        assert doctor(taken, as_json=True) == 1
    found = {entry["about"]: entry["verdict"] for entry in json.loads(capsys.readouterr().out)}
    assert found["http port"] == "blocker"


def test_too_little_shared_memory_is_a_blocker(tmp_path: Path) -> None:
    flags = {"transfer_arena_dir": str(tmp_path), "transfer_arena_bytes": "1000000G"}
    about = f"shared memory {tmp_path}"
    assert finding(about, **flags).verdict is Verdict.BLOCKER
    assert "--transfer-arena-bytes" in finding(about, **flags).detail


def test_no_shared_memory_is_only_a_warning() -> None:
    about = "shared memory /no/such/folder"
    assert finding(about, transfer_arena_dir="/no/such/folder").verdict is Verdict.WARNING
    assert finding("shared memory", transfer_arena_dir="none").verdict is Verdict.WARNING


@pytest.mark.parametrize("model", ["/no/such/folder", "."])
def test_a_folder_without_a_model_is_a_blocker(model: str, tmp_path: Path) -> None:
    folder = str(tmp_path) if model == "." else model
    assert "model" in blockers(model=folder)


def test_a_model_that_does_not_fit_is_a_blocker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundled(tmp_path / "model")
    model = str(tmp_path / "model")
    assert finding("fit", model=model).verdict is Verdict.OK
    monkeypatch.setattr(doctor_module, "available_memory_bytes", lambda: 1 << 20)
    assert finding("fit", model=model).verdict is Verdict.BLOCKER


def test_settings_that_do_not_go_together_are_told() -> None:
    found = finding("settings", numerics="exact", dtype="bfloat16")
    assert found.verdict is Verdict.BLOCKER and "float32" in found.detail


def test_an_old_package_is_a_blocker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "WORKER_NEEDS", (("torch", (99, 0)), ("no-such", (1,))))
    assert blockers() == {"torch", "no-such"}
