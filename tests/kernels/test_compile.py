"""Every launch of every kernel compiles for every target, without the hardware."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from scission.kernels.launch_table import Launch, launches
from scission.kernels.target import TARGETS, Target

CASES = [
    pytest.param(target, launch, id=f"{target.name}-{number}-{launch.name}")
    for target in TARGETS
    for number, launch in enumerate(launches(target))
]
MAX_SPILLED_REGISTERS = 16
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_launch(launch: Launch, target: Target) -> Any:
    types = {name: word.removesuffix(":16") for name, word in launch.types.items()}
    types |= dict.fromkeys(launch.constants, "constexpr")
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, word in enumerate(launch.types.values())
        if word.startswith("*") or word.endswith(":16")
    }
    source = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    return triton.compile(
        source(launch.kernel, types, dict(launch.constants), aligned),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": launch.num_warps},
    )


def spilled_registers(compiled: Any, folder: Path) -> int:
    if "amdgcn" in compiled.asm:
        counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert counts
        return sum(int(count) for count in counts)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    stacks = re.findall(r"STACK:(\d+)", usage)
    assert stacks, usage
    return sum(int(stack) for stack in stacks) // 4


@pytest.mark.parametrize(("target", "launch"), CASES)
def test_kernel_compiles_and_fits(target: Target, launch: Launch, tmp_path: Path) -> None:
    assert [*launch.types, *launch.constants] == launch.kernel.arg_names
    compiled = compile_launch(launch, target)
    assert compiled.metadata.shared <= target.shared_memory_bytes
    assert spilled_registers(compiled, tmp_path) <= MAX_SPILLED_REGISTERS
    # a kernel in Gluon, which has no such stage, is written for one target
    dots = re.findall(r"tt\.dot .* : (.*) ->", compiled.asm.get("ttir", ""))
    for dot in dots:
        assert target.has_fp8_dot or "f8" not in dot, dot
        sizes = [int(size) for tile in re.findall(r"<(\d+)x(\d+)x", dot) for size in tile]
        assert min(sizes) >= 16, dot
