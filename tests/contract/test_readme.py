"""The README against the tree: what it names is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
NAMED = sorted(
    set(re.findall(r"`([\w./-]+(?:\.py|/))`", README))
    | set(re.findall(r"\]\(([\w./-]+)\)", README))
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", NAMED)
def test_a_named_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_a_requests_path_is_there() -> None:
    assert sum(path.endswith(".py") for path in NAMED) > 15


def test_every_page_is_named() -> None:
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert pages <= set(NAMED)


def test_the_make_targets_that_are_told_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks("bash")), re.MULTILINE))
    assert told == {"up", "test"} and told <= targets


def test_the_python_example_is_python() -> None:
    (example,) = blocks("python")
    ast.parse(example)
