"""The launches of this folder's kernels, for `kernels.launch_table`."""

from collections.abc import Iterator, Mapping
from typing import Any

from scission.kernels.cache.launches import WRITERS
from scission.kernels.compressor import compress
from scission.kernels.target import Target

ROPE_DIM = 64
# ratio, halves of a row, width, rounding: DeepSeek-V4's compressors
COMPRESSORS = ((4, 2, 512, "kv"), (4, 2, 128, "index"), (128, 1, 512, "kv"))


def launches(target: Target) -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps of each."""
    inputs = {f"{name}_ptr": "*fp32" for name in ("kv", "score", "ape")}
    rings = {"ring_kv_ptr": "*fp32", "ring_score_ptr": "*fp32"}
    strides = {"stride_kv_token": "i32:16", "stride_score_token": "i32:16"}
    for ratio, halves, width, rounding in COMPRESSORS:
        size = ratio * halves
        for is_single, num_tokens in ((True, 1), (False, 1), (False, 8192)):
            yield (
                compress.compress_kernel,
                inputs
                | {"norm_weight_ptr": "*fp32", "rotation_ptr": "*fp32"}
                | rings
                | {"entries_ptr": "*bf16", "positions_ptr": "*i64", "sequences_ptr": "*i64"}
                | {"cu_seqlens_ptr": "*i32", "block_tables_ptr": "*i64", "slots_ptr": "*i64"}
                | {"num_tokens": "i32", "eps": "fp32", "scale": "fp32", "entries_per_block": "i32"}
                | strides
                | {"stride_rotation_token": "i32:16", "stride_tables_seq": "i32"},
                {
                    "WIDTH": width,
                    "PADDED": width,
                    "ROPE_DIM": ROPE_DIM,
                    "RATIO": ratio,
                    "HALVES": halves,
                    "ROWS": compress.rows_at_once(size, target),
                    "GROUP": compress.tokens_of_group(ratio, num_tokens, is_single=is_single),
                    "ROUNDING": rounding,
                    "IS_SINGLE": is_single,
                },
                compress.num_warps(width),
            )
        yield (
            compress.keep_states_kernel,
            inputs | rings | WRITERS | strides,
            {
                "WIDTH": halves * width,
                "PADDED": halves * width,
                "RATIO": ratio,
                "SIZE": size,
                "ROWS": compress.STATE_ROWS,
            },
            compress.STATE_WARPS,
        )
