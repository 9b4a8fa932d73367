"""The launches of this folder's kernels, for `kernels.launch_table`."""

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import triton.language as tl

from scission.kernels.linear import (
    block_fp8,
    decode_blocks,
    quantize_input,
    quantize_sums,
    split_sums,
    stream_bf16,
)
from scission.kernels.linear.rows import Scaling
from scission.kernels.target import Target


def launches(target: Target) -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps of each."""
    for scaling in get_args(Scaling):
        yield (
            quantize_input.quantize_input_kernel,
            {
                "x_ptr": "*bf16",
                "static_scale_ptr": "*fp32",
                "codes_ptr": "*fp8e4nv",
                "scales_ptr": "*fp32",
                "num_blocks": "i32:16",
                "stride_x_row": "i32:16",
            },
            {
                "BLOCKS": quantize_input.BLOCKS,
                "SCALING": scaling,
                "IS_DEPENDENT": target.has_ptx,
            },
            quantize_input.NUM_WARPS,
        )
        yield (
            quantize_sums.quantize_sums_kernel,
            {f"{name}_ptr": "*fp32" for name in ("parts", "static_scale")}
            | {"codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
            | {"num_rows": "i32", "num_blocks": "i32:16", "split": "i32"},
            {
                "MAX_SPLIT": split_sums.MAX_SPLIT,
                "BLOCKS": quantize_sums.BLOCKS,
                "SCALING": scaling,
                "IS_DEPENDENT": target.has_ptx,
            },
            quantize_sums.NUM_WARPS,
        )
    yield (
        decode_blocks.decode_blocks_kernel,
        {"codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "out_ptr": "*bf16"}
        | {"out_features": "i32:16", "num_blocks": "i32:16"},
        {},
        decode_blocks.NUM_WARPS,
    )
    quantized_type = block_fp8.dot_type(target, is_quantized=True)
    for tile in block_fp8.tiles(target):
        for kind in ("blocks", "static"):
            for num_stages in block_fp8.stages(target):
                yield from _block_fp8(tile, kind, quantized_type, num_stages, target)
    for tile in block_fp8.values_tiles():
        types = (block_fp8.dot_type(target), block_fp8.grouped_dot_type(target))
        for dot_type in dict.fromkeys(types):
            num_stages = block_fp8.values_stages(target)
            yield from _block_fp8(tile, "values", dot_type, num_stages, target)
    for out_type in ("*bf16", "*fp32"):
        yield (
            split_sums.add_splits_kernel,
            {"partials_ptr": "*fp32", "out_ptr": out_type, "num_values": "i32", "split": "i32"},
            {
                "MAX_SPLIT": split_sums.MAX_SPLIT,
                "BLOCK": split_sums.BLOCK,
                "IS_DEPENDENT": target.has_ptx,
            },
            4,
        )
        for rows in stream_bf16.row_tiles():
            yield (
                stream_bf16.stream_bf16_kernel,
                {"x_ptr": "*bf16", "w_ptr": "*bf16", "out_ptr": out_type}
                | {"num_rows": "i32", "out_features": "i32:16", "in_features": "i32:16"}
                | {"blocks_per_split": "i32", "stride_x_row": "i32:16"},
                {
                    "BLOCK_N": stream_bf16.BLOCK_N,
                    "BLOCK_M": rows,
                    "BLOCK_K": stream_bf16.BLOCK_K,
                    "DOT_TYPE": tl.bfloat16,
                    "NUM_STAGES": stream_bf16.num_stages(target),
                    "IS_DEPENDENT": target.has_ptx,
                },
                stream_bf16.NUM_WARPS,
            )


def _block_fp8(
    tile: block_fp8.Tile, kind: str, dot_type: tl.dtype, num_stages: int, target: Target
) -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    # whole sums are stored as bf16, partial ones as fp32
    for out_type in ("*bf16", "*fp32"):
        yield (
            block_fp8.block_fp8_kernel,
            {
                "x_ptr": "*bf16" if kind == "values" else "*fp8e4nv",
                "x_scales_ptr": "*fp32",
                "codes_ptr": "*fp8e4nv",
                "scales_ptr": "*fp32",
                "out_ptr": out_type,
                "num_rows": "i32",
                "out_features": "i32:16",
                "num_blocks": "i32:16",
                "blocks_per_split": "i32",
                "group_size": "i32:16",
                "stride_x_row": "i32:16",
                "stride_x_group": "i32:16",
            },
            {
                "BLOCK_N": tile.block_n,
                "BLOCK_M": tile.block_m,
                "IS_WEIGHT_LEFT": tile.is_weight_left,
                "INPUT": kind,
                "DOT_TYPE": dot_type,
                "NUM_STAGES": num_stages,
                "IS_DEPENDENT": target.has_ptx,
            },
            tile.num_warps,
        )
