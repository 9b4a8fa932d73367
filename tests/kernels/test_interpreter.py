"""The interpreter runs every kernel on the CPU, in a process of its own: it is chosen at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = (
    "test_linear.py",
    "test_fp4_experts.py",
    "test_attend_heads.py",
    "test_dense_rows.py",
    "test_coded_layers.py",
    "test_next_tokens.py",
    "test_decode_rows.py",
    "test_state.py",
    "test_sparse_attention.py",
    "test_indexer.py",
    "test_mixing.py",
)


@pytest.mark.parametrize("name", FILES)
def test_kernels_equal_their_references_in_the_interpreter(name: str) -> None:
    path = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=path.parents[2],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert "passed" in result.stdout and "skipped" not in result.stdout, result.stdout[-2000:]
