"""The launches of this folder's kernels, for `kernels.launch_table`."""

from collections.abc import Iterator, Mapping
from typing import Any

from scission.kernels.cache import write_rows

PLACES = ("cu_seqlens", "context_lens", "writer_sequences", "writer_slots", "writer_ends")
WRITERS = {f"{name}_ptr": "*i64" if "writer" in name else "*i32" for name in PLACES}


def launches() -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps of each: rows of 512 channels."""
    rows = {"WIDTH": 512, "PADDED": 512, "ROWS": write_rows.ROWS}
    yield (
        write_rows.write_ring_kernel,
        {"ring_ptr": "*bf16", "values_ptr": "*bf16"}
        | WRITERS
        | {"size": "i32:16", "stride_values_token": "i32:16"},
        rows,
        write_rows.NUM_WARPS,
    )
    yield (
        write_rows.write_paged_kernel,
        {"pool_ptr": "*bf16", "values_ptr": "*bf16"}
        | {f"{name}_ptr": "*i64" for name in ("positions", "sequences", "block_tables")}
        | {"num_tokens": "i32", "block_size": "i32:16", "stride_values_token": "i32:16"}
        | {"stride_tables_seq": "i32"},
        rows,
        write_rows.NUM_WARPS,
    )
