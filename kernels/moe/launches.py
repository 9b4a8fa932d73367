"""The launches of experts: for the table of what is compiled without the hardware."""

from collections.abc import Iterator, Mapping
from typing import Any

from scission.kernels.linear.block_fp8 import dot_type
from scission.kernels.moe import choose_experts, group_rows, grouped_experts, many_fp4, sum_rows
from scission.kernels.target import Target

_Launch = tuple[Any, Mapping[str, str], Mapping[str, Any], int]


def launches(target: Target) -> Iterator[_Launch]:
    """Kernel, types, constants and warps of each (`launch_table.Launch`)."""
    yield from _choices(target)
    yield from _groups(target)
    yield from _products(target)
    for scaling, clamps_first in (("ue8m0", True), ("dynamic", False)):
        yield (
            grouped_experts.activate_rows_kernel,
            {
                "gate_up_ptr": "*bf16",
                "row_weights_ptr": "*fp32",
                "inner_ptr": "*fp8e4nv",
                "inner_scales_ptr": "*fp32",
                "num_blocks": "i32",
                "limit": "fp32",
            },
            {
                "CLAMPS_FIRST": clamps_first,
                "SCALING": scaling,
                # FP4 experts are DeepSeek-V4's
                "IS_ORDERED": scaling == "ue8m0",
                "BLOCKS": grouped_experts.ACTIVATE_BLOCKS,
            },
            4,
        )
    for rows_type, plus_type, out_type in (
        ("*bf16", "*bf16", "*bf16"),
        ("*fp32", None, "*bf16"),
        ("*bf16", None, "*fp32"),
    ):
        yield (
            sum_rows.sum_rows_kernel,
            {
                "rows_ptr": rows_type,
                "row_of_ptr": "*i32",
                "plus_ptr": plus_type or rows_type,
                "out_ptr": out_type,
                "num_rows": "i32",
                "width": "i32:16",
                "num_choices": "i32",
                "num_parts": "i32",
            },
            {"HAS_PLUS": plus_type is not None, "BLOCK": sum_rows.BLOCK},
            4,
        )


def _choices(target: Target) -> Iterator[_Launch]:
    """DeepSeek-V4 Flash (256 experts) and Pro (384) by score and by table, Step (288)."""
    block_m = grouped_experts.tiles(target)[0].block_m
    cases = {
        (choose_experts.expert_lanes(num_experts), score, is_hashed, gate_type)
        for num_experts, score, is_hashed, gate_type in (
            (256, "sqrtsoftplus", False, "*bf16"),
            (256, "sqrtsoftplus", True, "*bf16"),
            (384, "sqrtsoftplus", False, "*bf16"),
            (384, "sqrtsoftplus", True, "*bf16"),
            (288, "sigmoid", False, "*fp32"),
        )
    }
    ints = ("experts", "bits", "first_rows", "block_experts", "block_rows", "row_tokens")
    for lanes, score, is_hashed, gate_type in sorted(cases):
        most = 8 if lanes <= 256 else 4
        for rows, pairs, split in ((1, 64, 16), (16, 64, most), (16, 1024, most), (16, 1024, 2)):
            yield (
                choose_experts.choose_experts_kernel,
                {
                    "x_ptr": "*bf16",
                    "gate_ptr": gate_type,
                    "bias_ptr": gate_type if is_hashed else "*fp32",
                    **dict.fromkeys(
                        ("table_ptr", "token_ids_ptr"), "*i64" if is_hashed else "*i32"
                    ),
                    "positions_ptr": "*i64",
                    "partials_ptr": "*fp32",
                    "experts_ptr": "*i32",
                    "weights_ptr": "*fp32",
                    **{f"{name}_ptr": "*i32" for name in ints[1:]},
                    "row_weights_ptr": "*fp32",
                    "row_of_ptr": "*i32",
                    "counters_ptr": "*i32",
                    "num_tokens": "i32",
                    "d": "i32:16",
                    "num_experts": "i32:16",
                    "top_k": "i32",
                    "scaling": "fp32",
                    "first_expert": "i32",
                    "num_local": "i32:16",
                    "blocks_per_split": "i32",
                    "num_slots": "i32",
                    "num_shared_rows": "i32",
                },
                {
                    "SCORE": score,
                    "HAS_BIAS": not is_hashed,
                    "IS_HASHED": is_hashed,
                    "HAS_POSITIONS": True,
                    "DOT_TYPE": choose_experts.dot_type(target),
                    "GROUP_M": block_m,
                    "ROWS": rows,
                    "EXPERT_LANES": lanes,
                    "PAIR_LANES": pairs,
                    "BLOCK_T": choose_experts.BLOCK_T,
                    "BLOCK_E": choose_experts.BLOCK_E,
                    "BLOCK_K": 256 if gate_type == "*bf16" else 128,
                    "NUM_SPLITS": split,
                },
                choose_experts.num_warps(rows, lanes, target),
            )


def _groups(target: Target) -> Iterator[_Launch]:
    sizes = {tile.block_m for tile in grouped_experts.tiles(target)}
    sizes.add(many_fp4.tile_of(target).block_m)
    for block_m in sorted(sizes):
        for num_experts in (64, 256):
            yield (
                group_rows.group_rows_kernel,
                {
                    "sorted_ptr": "*i64",
                    "pairs_ptr": "*i64",
                    "block_experts_ptr": "*i32",
                    "block_rows_ptr": "*i32",
                    "weights_ptr": "*fp32",
                    "row_tokens_ptr": "*i32",
                    "row_weights_ptr": "*fp32",
                    "row_of_ptr": "*i32",
                    "num_pairs": "i32",
                    "num_experts": "i32:16",
                    "num_steps": "i32",
                    "top_k": "i32",
                },
                {"BLOCK_M": block_m, "BLOCK_E": group_rows.expert_lanes(num_experts)},
                group_rows.NUM_WARPS,
            )


def _products(target: Target) -> Iterator[_Launch]:
    few, *many = grouped_experts.tiles(target)
    # DeepSeek-V4 has FP4 experts beside an FP8 one, Step FP8 ones
    for codes, activation in (("fp4", (True, "ue8m0")), ("fp8", (False, "dynamic"))):
        for has_shared in (True, False):
            for split in (1, 2):
                yield _product(
                    target, few, codes, has_shared, activation, "*fp32", split, by_token=True
                )
                out_type = "*fp32" if has_shared or split > 1 else "*bf16"
                yield _product(
                    target, few, codes, has_shared, None, out_type, split, by_token=False
                )
        for tile in many if codes == "fp8" else ():
            for by_token in (True, False):
                yield _product(target, tile, codes, False, None, "*bf16", 1, by_token=by_token)
    for by_token in (True, False):
        yield _many_fp4(target, by_token=by_token)


def _many_fp4(target: Target, *, by_token: bool) -> _Launch:
    tile = many_fp4.tile_of(target)
    ints = {f"{name}_ptr": "*i32" for name in ("scales", "block_experts", "block_rows")}
    return (
        many_fp4.many_fp4_kernel,
        {"x_ptr": "*fp8e4nv", "x_scales_ptr": "*fp32", "codes_ptr": "*u8"}
        | ints
        | {"row_tokens_ptr": "*i32", "out_ptr": "*bf16"}
        | {"out_features": "i32:16", "num_blocks": "i32:16"},
        {
            "BY_TOKEN": by_token,
            "BLOCK_N": tile.block_n,
            "BLOCK_M": tile.block_m,
            "DOT_TYPE": dot_type(target, is_quantized=True),
            "HAS_PTX": target.has_ptx,
            "NUM_STAGES": tile.num_stages,
        },
        tile.num_warps,
    )


def _product(
    target: Target,
    tile: grouped_experts.Tile,
    codes: str,
    has_shared: bool,
    activation: tuple[bool, str] | None,
    out_type: str,
    split: int,
    *,
    by_token: bool,
) -> _Launch:
    clamps_first, scaling = activation if activation is not None else (False, "ue8m0")
    return (
        grouped_experts.grouped_experts_kernel,
        {
            "x_ptr": "*fp8e4nv",
            "x_scales_ptr": "*fp32",
            "codes_ptr": "*u8" if codes == "fp4" else "*fp8e4nv",
            "scales_ptr": "*i32" if codes == "fp4" else "*fp32",
            "shared_codes_ptr": "*fp8e4nv",
            "shared_scales_ptr": "*fp32",
            "block_experts_ptr": "*i32",
            "block_rows_ptr": "*i32",
            "row_tokens_ptr": "*i32",
            "row_weights_ptr": "*fp32",
            "out_ptr": out_type,
            "counters_ptr": "*i32",
            "inner_ptr": "*fp8e4nv",
            "inner_scales_ptr": "*fp32",
            "num_tokens": "i32",
            "num_rows": "i32",
            "out_features": "i32:16",
            "num_blocks": "i32:16",
            "num_shared_slots": "i32",
            "limit": "fp32",
            "shared_limit": "fp32",
        },
        {
            "FORMAT": codes,
            "HAS_SHARED": has_shared,
            "BY_TOKEN": by_token,
            "ACTIVATES": activation is not None,
            "CLAMPS_FIRST": clamps_first,
            "SCALING": scaling,
            "SHARED_SPLIT": grouped_experts.SHARED_SPLIT,
            "BLOCK_N": tile.block_n,
            "BLOCK_M": tile.block_m,
            "DOT_TYPE": dot_type(target, is_quantized=True),
            "HAS_PTX": target.has_ptx,
            "NUM_STAGES": tile.num_stages,
            "NUM_FP8_STAGES": tile.num_fp8_stages,
            "NUM_SPLITS": split,
        },
        tile.num_warps,
    )
