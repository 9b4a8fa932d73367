"""The launches of this folder's kernels, for `kernels.launch_table`."""

from collections.abc import Iterator, Mapping
from typing import Any

from scission.kernels.decode_rows import write_rows


def launches() -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps."""
    types = dict.fromkeys(write_rows.write_rows_kernel.arg_names[:-2], "*i64")
    floats = ("temperatures", "top_p", "min_p", "presence", "frequency", "repetition")
    types |= {f"{name}_ptr": "*fp32" for name in floats}
    types |= {"context_lens_ptr": "*i32", "max_blocks": "i32"}
    yield write_rows.write_rows_kernel, types, {"BLOCK": write_rows.BLOCK}, write_rows.NUM_WARPS
