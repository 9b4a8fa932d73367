"""How the gate of feed-forward layers is launched."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from scission.kernels.activation import silu_rows
from scission.kernels.linear.rows import Scaling
from scission.kernels.target import Target


def launches(target: Target) -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps of each."""
    for scaling in ("none", *get_args(Scaling)):
        is_plain = scaling == "none"
        yield (
            silu_rows.silu_mul_kernel,
            {"gate_up_ptr": "*bf16", "static_scale_ptr": "*fp32"}
            | {"out_ptr": "*bf16" if is_plain else "*fp8e4nv", "scales_ptr": "*fp32"}
            | {"limit": "fp32", "num_blocks": "i32:16"},
            {
                "HAS_LIMIT": True,
                "CLAMPS_FIRST": scaling == "ue8m0",
                "BLOCKS": silu_rows.BLOCKS,
                "SCALING": scaling,
                "IS_DEPENDENT": target.has_ptx,
            },
            silu_rows.NUM_WARPS,
        )
