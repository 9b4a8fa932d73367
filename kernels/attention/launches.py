"""The signatures that sparse attention is launched with, of DeepSeek-V4's shapes."""

from collections.abc import Iterator
from typing import Any

from scission.kernels.attention import sparse_rows
from scission.kernels.target import Target

_DIM = 512
_PAIRS = 32
# ratio, rows of a block of 128 tokens, whether an indexer picks
_KINDS = ((0, 0, False), (4, 32, True), (128, 1, False))


def launches(target: Target) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Kernel, types of the run-time arguments, constants and warps of every launch."""
    types = {f"{name}_ptr": "*bf16" for name in ("q", "kv", "ring", "entries")}
    types |= {"picks_ptr": "*i32", "sink_ptr": "*fp32", "inverse_ptr": "*fp32"}
    types |= {"positions_ptr": "*i64", "sequences_ptr": "*i64", "firsts_ptr": "*i32"}
    types |= {"slots_ptr": "*i64", "tables_ptr": "*i64", "out_ptr": "*bf16", "sums_ptr": "*fp32"}
    types |= {"scale": "fp32", "num_heads": "i32:16", "window": "i32:16", "top_k": "i32:16"}
    for stride in ("q_token", "q_head", "picks_token", "inverse_token"):
        types[f"stride_{stride}"] = "i32:16"
    types["stride_tables_sequence"] = "i32"
    for stride in ("out_split", "out_token", "sums_split", "sums_token"):
        types[f"stride_{stride}"] = "i32:16"
    few, many = sparse_rows.tiles(target)
    cases = dict.fromkeys([(few, True), (many, True), (many, False)])
    for tile, is_split in cases:
        for ratio, rows_per_block, has_picks in _KINDS:
            for is_single in (False, True):
                constants = {
                    "DIM": _DIM,
                    "PAIRS": _PAIRS,
                    "BLOCK_H": tile.block_h,
                    "BLOCK_N": tile.block_n,
                    "RATIO": ratio,
                    "ROWS_PER_BLOCK": rows_per_block,
                    "HAS_PICKS": has_picks,
                    "IS_SINGLE": is_single,
                    "IS_SPLIT": is_split,
                    "NUM_STAGES": tile.num_stages,
                }
                out = {"out_ptr": "*fp32" if is_split else "*bf16"}
                yield sparse_rows.sparse_rows_kernel, types | out, constants, tile.num_warps
    adding = {f"{name}_ptr": "*fp32" for name in ("partials", "sums", "sink", "inverse")}
    adding |= {"out_ptr": "*bf16", "num_heads": "i32:16", "num_splits": "i32"}
    for stride in ("partials_split", "sums_split", "inverse_token"):
        adding[f"stride_{stride}"] = "i32:16"
    for splits in (2, 4, 8, 16, 32):
        constants = {"DIM": _DIM, "PAIRS": _PAIRS, "BLOCK_S": splits}
        yield sparse_rows.add_splits_kernel, adding, constants, sparse_rows.ADD_WARPS
