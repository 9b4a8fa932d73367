"""The pages of docs/ that are made from code are what the code says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["settings", "metrics"])
def test_committed_page_equals_the_code(make_docs: ModuleType, page: str) -> None:
    made = getattr(make_docs, f"{page}_page")()
    committed = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert made == committed, "run `make docs` and commit what it wrote"


def test_every_link_of_the_readme_leads_somewhere() -> None:
    import re

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
