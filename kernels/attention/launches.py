"""The signatures that sparse attention is launched with, of DeepSeek-V4's shapes."""

from collections.abc import Iterator
from typing import Any

from scission.kernels.attention import hopper_rows, sparse_rows
from scission.kernels.target import Target

_DIM = 512
_PAIRS = 32
# ratio, rows of a block of 128 tokens, whether an indexer picks: not where all entries are seen
_KINDS = ((0, 0, False), (4, 32, False), (4, 32, True), (128, 1, False))

_POINTERS = {
    **{f"{name}_ptr": "*bf16" for name in ("q", "kv", "ring", "entries")},
    "picks_ptr": "*i32",
    "sink_ptr": "*fp32",
    "inverse_ptr": "*fp32",
    "positions_ptr": "*i64",
    "sequences_ptr": "*i64",
    "firsts_ptr": "*i32",
    "slots_ptr": "*i64",
    "tables_ptr": "*i64",
    "out_ptr": "*bf16",
    "sums_ptr": "*fp32",
}
_STRIDES = {
    **{f"stride_{name}": "i32:16" for name in ("q_token", "q_head", "picks_token")},
    "stride_inverse_token": "i32:16",
    "stride_tables_sequence": "i32",
    **{f"stride_{name}": "i32:16" for name in ("out_split", "out_token")},
    **{f"stride_{name}": "i32:16" for name in ("sums_split", "sums_token")},
}

Launch = tuple[Any, dict[str, str], dict[str, Any], int]


def launches(target: Target) -> Iterator[Launch]:
    """Kernel, types of the run-time arguments, constants and warps of every launch."""
    yield from _sparse_rows(target)
    if target.name == "sm_90":
        yield from _hopper_rows()
    types = {f"{name}_ptr": "*fp32" for name in ("partials", "sums", "sink", "inverse")}
    types |= {"out_ptr": "*bf16", "num_heads": "i32:16", "num_splits": "i32"}
    for stride in ("partials_split", "sums_split", "inverse_token"):
        types[f"stride_{stride}"] = "i32:16"
    for splits in (2, 4, 8, 16, 32):
        constants = {
            "DIM": _DIM,
            "PAIRS": _PAIRS,
            "BLOCK_S": splits,
            "BLOCK_D": sparse_rows.ADD_CHANNELS,
            "IS_DEPENDENT": target.has_ptx,
        }
        yield sparse_rows.add_splits_kernel, types, constants, sparse_rows.ADD_WARPS


def _sparse_rows(target: Target) -> Iterator[Launch]:
    sizes = {"num_heads": "i32:16", "window": "i32:16", "top_k": "i32:16"}
    types = {**_POINTERS, "scale": "fp32", **sizes, **_STRIDES}
    few, many = sparse_rows.tiles(target)
    cases = dict.fromkeys([(few, True), (many, True), (many, False)])
    for tile, is_split in cases:
        for kind in _kinds(is_split):
            constants = {
                "DIM": _DIM,
                "PAIRS": _PAIRS,
                "BLOCK_H": tile.block_h,
                "BLOCK_N": tile.block_n,
                **kind,
                "IS_DEPENDENT": target.has_ptx,
                "NUM_STAGES": tile.num_stages,
            }
            yield sparse_rows.sparse_rows_kernel, _out(types, is_split), constants, tile.num_warps


def _hopper_rows() -> Iterator[Launch]:
    sizes = {"num_items": "i32", "num_heads": "i32:16", "num_splits": "i32"}
    sizes |= {"window": "i32:16", "top_k": "i32:16"}
    types = {**_POINTERS, "scale": "fp32", **sizes, **_STRIDES}
    for is_split in (False, True):
        for kind in _kinds(is_split):
            constants = {
                "DIM": hopper_rows.DIM,
                "PAIRS": _PAIRS,
                "BLOCK_H": hopper_rows.BLOCK_H,
                "BLOCK_N": hopper_rows.BLOCK_N,
                "BLOCKS": hopper_rows.BLOCKS,
                **kind,
                "GATHER_WARPS": hopper_rows.GATHER_WARPS,
                "GATHER_REGISTERS": hopper_rows.GATHER_REGISTERS,
            }
            yield (
                hopper_rows.hopper_rows_kernel,
                _out(types, is_split),
                constants,
                hopper_rows.NUM_WARPS,
            )


def _kinds(is_split: bool) -> Iterator[dict[str, Any]]:
    for ratio, rows_per_block, has_picks in _KINDS:
        for is_single in (False, True):
            yield {
                "RATIO": ratio,
                "ROWS_PER_BLOCK": rows_per_block,
                "HAS_PICKS": has_picks,
                "IS_SINGLE": is_single,
                "IS_SPLIT": is_split,
            }


def _out(types: dict[str, str], is_split: bool) -> dict[str, str]:
    return types | {"out_ptr": "*fp32" if is_split else "*bf16"}
