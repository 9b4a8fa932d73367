"""Kernels that are launched while the one before them ends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scission.kernels.overlap import overlap_launches

SM_80, SM_90, GFX942 = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("hip", "gfx942", 64),
)


@triton.jit
def add_one_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs) + 1.0)


@pytest.fixture
def overlapping(tmp_path: Path) -> Iterator[None]:
    with knobs.cache.scope(), knobs.runtime.scope():
        knobs.cache.dir = str(tmp_path)
        overlap_launches()
        yield


def _compile(target: GPUTarget) -> object:
    types = {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"}
    return triton.compile(ASTSource(add_one_kernel, types, {"BLOCK": 128}), target=target)


@pytest.mark.skipif(knobs.runtime.interpret, reason="compiles")
@pytest.mark.usefixtures("overlapping")
def test_a_kernel_waits_before_it_reads_and_is_launched_early() -> None:
    compiled = _compile(SM_90)
    ptx = compiled.asm["ptx"]  # type: ignore[attr-defined]
    assert ptx.count("griddepcontrol.wait;") == 1
    assert ptx.index("griddepcontrol.wait;") < ptx.index("ld.global")
    assert compiled.metadata.launch_pdl  # type: ignore[attr-defined]


@pytest.mark.skipif(knobs.runtime.interpret, reason="compiles")
@pytest.mark.usefixtures("overlapping")
@pytest.mark.parametrize("target", [SM_80, GFX942], ids=["sm_80", "gfx942"])
def test_kernels_of_other_devices_stay_as_they_are(target: GPUTarget) -> None:
    compiled = _compile(target)
    assert "griddepcontrol" not in "".join(map(str, compiled.asm.values()))  # type: ignore[attr-defined]
    assert not getattr(compiled.metadata, "launch_pdl", False)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("overlapping")
def test_overlapping_kernels_are_kept_apart_and_asked_for_once() -> None:
    first = knobs.cache.dir
    overlap_launches()
    assert knobs.cache.dir == first
    assert Path(first).name == "overlapping"
    # as later versions of Triton ask
    hook: Any = knobs.runtime.add_stages_inspection_hook
    key, digest = hook()
    assert key and digest


@pytest.mark.gpu
@pytest.mark.usefixtures("overlapping")
def test_a_captured_chain_of_overlapping_kernels_keeps_its_order() -> None:
    device = torch.device("cuda", 0)
    x = torch.zeros(264 * 1024, device=device)
    y = torch.empty_like(x)

    def chain() -> None:
        for _ in range(50):
            for source, target in ((x, y), (y, x)):
                add_one_kernel[(264,)](source, target, BLOCK=1024)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    x.zero_()
    graph.replay()
    assert bool((x == 100).all())
