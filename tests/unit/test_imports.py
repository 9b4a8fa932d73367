"""Imports that no linter sees: what a gateway really loads, whose `kernels` a bare import finds."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    """What `code` prints in a fresh interpreter that sees the package as an installed one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules_under(package: str) -> list[str]:
    folder = ROOT / "src" / package.replace(".", "/")
    return sorted(
        package + "." + ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    )


def test_gateway_loads_no_gpu_stack() -> None:
    modules = modules_under("scission.services.gateway")
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "heavy = {'torch', 'triton', 'transformers', 'numpy', 'scission.kernels'}\n"
        "print(*sorted(heavy & sys.modules.keys()))"
    )
    assert run_python(code) == ""


def test_bare_kernels_is_not_ours() -> None:
    """transformers probes for Hugging Face's `kernels`; it must never find our own folder."""
    code = (
        "import importlib.util\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(*(spec.submodule_search_locations if spec else []))"
    )
    assert str(ROOT) not in run_python(code)
