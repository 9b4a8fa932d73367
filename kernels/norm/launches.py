"""How the norm of residual sums is launched: rows of 4096 values."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from scission.kernels.linear.rows import Scaling
from scission.kernels.norm import add_rows
from scission.kernels.target import Target


def launches(target: Target) -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps of each."""
    types = {"x_ptr": "*bf16", "y_ptr": "*bf16", "weight_ptr": "*fp32", "static_scale_ptr": "*fp32"}
    types |= {"total_ptr": "*bf16", "normed_ptr": "*bf16"}
    cases = [(scaling, parts) for scaling in ("none", *get_args(Scaling)) for parts in (1, 4, 8)]
    for scaling, parts in cases:
        is_plain = scaling == "none"
        yield (
            add_rows.add_norm_kernel,
            types
            | {"y_ptr": "*fp32" if parts > 1 else "*bf16"}
            | {"codes_ptr": "*bf16" if is_plain else "*fp8e4nv", "scales_ptr": "*fp32"}
            | {"eps": "fp32", "num_blocks": "i32:16", "num_parts": "i32"}
            | {"stride_y_part": "i32:16"},
            {
                "BLOCKS": 32,
                "PARTS": parts,
                "KEEPS_VALUES": is_plain,
                "SCALING": scaling,
                "IS_DEPENDENT": target.has_ptx,
            },
            add_rows.num_warps(1),
        )
