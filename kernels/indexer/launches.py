"""The launches of this folder's kernels, for `kernels.launch_table`."""

from collections.abc import Iterator, Mapping
from typing import Any

import triton.language as tl

from scission.kernels.indexer import narrow, score, select, selection
from scission.kernels.target import Target

# DeepSeek-V4's indexer
HEADS, DIM = 64, 128
PAGED = {"RATIO": 4, "ROWS_PER_BLOCK": 32}
WHOLE = {"RATIO": 0, "ROWS_PER_BLOCK": 0}
SCORED = {f"{name}_ptr": "*bf16" for name in ("q", "weights", "keys")} | {"weights_ptr": "*fp32"}
SCORED |= {f"{name}_ptr": "*i64" for name in ("positions", "sequences", "tables")}
SCORED |= {"scores_ptr": "*fp32"}
SCORED_SIZES = {"top_k": "i32:16", "stride_q_token": "i32:16", "stride_weights_token": "i32:16"}
SCORED_SIZES |= {"stride_keys_row": "i32:16", "stride_tables_sequence": "i32"}
SCORED_SIZES |= {"stride_scores_token": "i32:16"}


def launches(target: Target) -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps of each, at the shapes of DeepSeek-V4."""
    shape = {"HEADS": HEADS, "DIM": DIM} | PAGED
    dot_type = {"DOT_TYPE": getattr(tl, target.decoded)}
    tile = score.single_tile(target)
    yield (
        score.score_single_kernel,
        SCORED | SCORED_SIZES,
        shape | {"BLOCK_E": tile.block_e} | dot_type | {"NUM_STAGES": tile.num_stages},
        tile.num_warps,
    )
    for tile in sorted({score.chunk_tile(target, tokens) for tokens in (1, 8192)}, key=str):
        yield (
            score.score_chunk_kernel,
            SCORED | {"num_tokens": "i32"} | SCORED_SIZES,
            shape
            | {"BLOCK_E": tile.block_e, "BLOCK_T": tile.block_t}
            | dot_type
            | {"NUM_STAGES": tile.num_stages},
            tile.num_warps,
        )
    for paging in (PAGED, WHOLE):
        yield from _selections(target, paging)


def _selections(
    target: Target, paging: Mapping[str, int]
) -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    lengths = "*i64" if paging["RATIO"] else "*i32"
    narrowed = {
        selection.pick_tile(max_length, k, target)[0]
        for max_length in (1 << 15, 1 << 16, 1 << 18, 1 << 20)
        for k in (512, 1024, 2048)
    }
    types = {"scores_ptr": "*fp32", "lengths_ptr": lengths}
    for tile in selection.tiles(target):
        if tile in narrowed:
            yield (
                narrow.narrow_kernel,
                types
                | {f"{name}_ptr": "*i32" for name in ("words", "counts", "candidates")}
                | {"k": "i32:16", "max_words": "i32", "capacity": "i32:16"}
                | {"stride_scores_row": "i32:16"},
                {"SIZE": tile.size, "SAMPLE": selection.SAMPLE, "BLOCK": selection.NARROW_BLOCK}
                | {"RATIO": paging["RATIO"]},
                narrow.NUM_WARPS,
            )
        for log_parts in {0, selection.LOG_PARTS if tile in narrowed else 0}:
            parts = "*i32" if log_parts else lengths
            yield (
                select.select_kernel,
                types
                | {"counts_ptr": parts, "candidates_ptr": parts}
                | {"sequences_ptr": lengths, "tables_ptr": lengths, "out_ptr": "*i32"}
                | {"k": "i32:16", "num_parts": "i32", "capacity": "i32:16"}
                | {"stride_scores_row": "i32:16", "stride_tables_sequence": "i32"},
                {"SIZE": tile.size, "SHORT": tile.short, "LOG_PARTS": log_parts, **paging},
                tile.num_warps,
            )
