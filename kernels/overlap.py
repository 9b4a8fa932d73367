"""Kernels that are launched while the one before them still ends: NVIDIA's programmatic dependent
launch, for every kernel that Triton compiles.

Setting up a launch then hides behind the end of the kernel before. The first thing a kernel does is
to wait until all that was launched before it is done and seen, so the order stays that of the
stream. On an H200 a captured step of 165 launches (DeepSeek-V4-Flash, 6 layers, one sequence) took
1.209 instead of 1.287 ms. Letting the next kernel in still earlier, before a kernel has done its
work, cost more than it gave (1.450 ms): programs that wait take room from those that work.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton import knobs

_Stages = dict[str, Callable[[Any, dict[str, Any]], Any]]

# what comes before a kernel's first instruction
_BEGIN = re.compile(r"\.visible \.entry .*?// %bb\.0:[^\n]*\n", re.DOTALL)
_MIN_CAPABILITY = 90
_NAMES = ("waits first", "waits first")


def overlap_launches() -> None:
    """Compile and launch kernels so from here on, in this process; elsewhere than on NVIDIA's
    Hopper and later nothing changes.
    """
    if knobs.runtime.add_stages_inspection_hook is _wait_first:
        return
    knobs.runtime.add_stages_inspection_hook = _wait_first
    # in triton 3.6 the hook is no part of what names a compiled kernel
    knobs.cache.dir = str(Path(knobs.cache.dir) / "overlapping")


def _wait_first(
    backend: Any = None,
    stages: _Stages | None = None,
    options: Any = None,
    language: Any = None,
    capability: int | None = None,
) -> tuple[str, str]:
    """Triton's hook: gets a compilation's stages by name, of AMD's backend without capability.

    Without arguments later versions ask it for what names the kernels that come of it, a key
    and its hash.
    """
    make_ptx = stages.get("ptx") if stages is not None else None
    if stages is None or make_ptx is None or capability is None or capability < _MIN_CAPABILITY:
        return _NAMES

    def make_waiting_ptx(source: Any, metadata: dict[str, Any]) -> str:
        text = make_ptx(source, metadata)
        begin = _BEGIN.search(text)
        # a kernel that does not wait is launched as ever
        if begin is None:
            return str(text)
        metadata["launch_pdl"] = True
        return f"{text[: begin.end()]}\tgriddepcontrol.wait;\n{text[begin.end() :]}"

    stages["ptx"] = make_waiting_ptx
    return _NAMES
