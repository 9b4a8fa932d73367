"""The launches of this folder's kernels, for `kernels.launch_table`."""

from collections.abc import Iterator, Mapping
from typing import Any

from scission.kernels.rope import turn_tables


def launches() -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps of each, at the shapes of DeepSeek-V4."""
    yield (
        turn_tables.turn_tables_kernel,
        {"positions_ptr": "*i64"}
        | {f"{name}_ptr": "*fp32" for name in ("plain", "compressed", "out")}
        | {"num_tokens": "i32"},
        {"PAIRS": 32, "PADDED": 32, "RATIOS": (4, 128), "TOKENS": turn_tables.TOKENS},
        turn_tables.NUM_WARPS,
    )
