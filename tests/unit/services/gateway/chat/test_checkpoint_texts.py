from pathlib import Path

import pytest

from scission.common.errors import CheckpointError
from scission.services.gateway.chat.checkpoint_texts import (
    CheckpointTexts,
    module_constants,
    read_checkpoint_texts,
)


def write(folder: Path, source: str) -> Path:
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv4.py").write_text(source, encoding="utf-8")
    return folder


def test_constants_concatenations_and_dicts_are_read() -> None:
    source = (
        'A: str = "a"\nB = ("b" "c"\n  "d")\nC = A + "!"\n'
        'D = {"k": B, "l": A + "x", "m": f(), 3: "n"}\nE = f"{A}"\nF = open("x")\n'
    )
    assert module_constants(source) == {
        "A": "a",
        "B": "bcd",
        "C": "a!",
        "D": {"k": "bcd", "l": "ax", 3: "n"},
    }


def test_the_file_is_never_executed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = write(
        tmp_path, f'open({str(canary)!r}, "w")\nTOOLS_TEMPLATE = "T"\nREASONING_EFFORT_MAX = "M"\n'
    )
    texts = read_checkpoint_texts(folder)
    assert texts == CheckpointTexts("T", None, {"max": "M"}, is_file_present=True)
    assert not canary.exists()


def test_the_july_dict_is_preferred(tmp_path: Path) -> None:
    source = (
        'REASONING_EFFORT_MAX = "m"\n'
        'REASONING_EFFORT_PROMPTS = {"low": "", "high": "H", "max": "M"}'
    )
    assert read_checkpoint_texts(write(tmp_path, source)).effort_prefixes == {
        "high": "H",
        "max": "M",
    }


def test_a_folder_without_the_file_has_no_texts(tmp_path: Path) -> None:
    assert read_checkpoint_texts(tmp_path) == CheckpointTexts()


@pytest.mark.parametrize("source", ["def (", "x = " + "(" * 500 + ")" * 500, "\0"])
def test_a_file_that_is_no_python_is_an_error_of_the_checkpoint(
    tmp_path: Path, source: str
) -> None:
    with pytest.raises(CheckpointError, match="cannot be parsed"):
        read_checkpoint_texts(write(tmp_path, source))
