"""The GPU architectures that kernels are compiled for, and what each can do."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Target:
    """One architecture, as Triton names it."""

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    shared_memory_bytes: int  # that one program may take
    has_fp8_dot: bool  # of OCP e4m3; gfx942 has the FNUZ variant only
    # what FP8 codes are decoded to where they are not multiplied as they are
    decoded: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def has_ptx(self) -> bool:
        return self.backend == "cuda"

    def num_stages(self, wanted: int) -> int:
        """Of a loop's pipeline: AMD's copies pass through registers, where two are enough."""
        return wanted if self.backend == "cuda" else min(wanted, 2)


TARGETS = (
    Target("sm_90", "cuda", 90, 32, 227 * 1024, has_fp8_dot=True),
    Target("gfx942", "hip", "gfx942", 64, 64 * 1024, has_fp8_dot=False),
    Target("gfx950", "hip", "gfx950", 64, 160 * 1024, has_fp8_dot=True),
    Target("gfx1201", "hip", "gfx1201", 32, 64 * 1024, has_fp8_dot=False),
)


@cache
def target_of(device: torch.device) -> Target | None:
    """None: no kernel is compiled for this device, and the references run there."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        arch: int | str = properties.major * 10 + properties.minor
    else:
        arch = properties.gcnArchName.partition(":")[0]
    return next((target for target in TARGETS if target.arch == arch), None)
