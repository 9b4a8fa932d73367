"""The launches of hyper-connections: for the table of what is compiled without the hardware."""

from collections.abc import Iterator, Mapping
from typing import Any

from scission.kernels.hyper_connections import mix_streams
from scission.kernels.target import Target


def launches(target: Target) -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps of each (`launch_table.Launch`)."""
    pointers = {f"{name}_ptr": "*fp32" for name in ("post", "comb")}
    for num_coefficients in (24, 4):
        columns = mix_streams.columns_of(num_coefficients)
        # a tensor, rows of experts that are whole (as of the models' shapes they are), nothing
        for y_type, parts, choices in (
            ("*bf16", 1, 0),
            ("*fp32", 1, 8),
            (None, 1, 0),
        ):
            pending = {
                "HAS_PENDING": y_type is not None,
                "NUM_PARTS": parts,
                "NUM_CHOICES": choices,
            }
            streams = {
                "h_ptr": "*bf16",
                "y_ptr": y_type or "*bf16",
                "row_of_ptr": "*i32" if choices else "*fp32",
                **pointers,
                "out_ptr": "*bf16",
            }
            sizes = {"d": "i32:16", "num_rows": "i32"}
            strides = {"stride_h_token": "i32:16", "stride_h_stream": "i32:16"}
            scored = {"fn_ptr": "*fp32", "partials_ptr": "*fp32", "num_tokens": "i32"}
            coefficients = {"NUM_COEFFICIENTS": num_coefficients, "COLUMNS": columns}
            size_d = {"BLOCK_D": mix_streams.block_d(target)}
            yield (
                mix_streams.score_tokens_kernel,
                streams | scored | sizes | strides,
                coefficients | pending | size_d,
                mix_streams.SCORE_WARPS,
            )
            yield (
                mix_streams.score_streams_kernel,
                streams | scored | sizes | {"slices_per_split": "i32"} | strides,
                coefficients
                | pending
                | {"DOT_TYPE": mix_streams.dot_type(target), "BLOCK_T": mix_streams.BLOCK_T}
                | size_d
                | {"NUM_STAGES": mix_streams.num_stages(target)},
                mix_streams.SCORE_WARPS,
            )
            yield (
                mix_streams.write_streams_kernel,
                streams | {"squares_ptr": "*fp32"} | sizes | strides | {"stride_squares": "i32:16"},
                pending | {"BLOCK_D": mix_streams.WRITE_BLOCK},
                mix_streams.SCORE_WARPS,
            )
        # d 4096 and 7168
        for blocks in (32, 64):
            for splits in (1, 128):
                yield (
                    mix_streams.read_streams_kernel,
                    {
                        "h_ptr": "*bf16",
                        **{
                            f"{name}_ptr": "*fp32"
                            for name in ("partials", "scale", "base", "weight")
                        },
                        "values_ptr": "*bf16",
                        "codes_ptr": "*fp8e4nv" if num_coefficients == 24 else "*bf16",
                        "scales_ptr": "*fp32" if num_coefficients == 24 else "*bf16",
                        **dict.fromkeys(pointers, "*fp32" if num_coefficients == 24 else "*bf16"),
                        "num_tokens": "i32",
                        "d": "i32:16",
                        "split": "i32",
                        "num_writers": "i32",
                        "stride_h_token": "i32:16",
                        "stride_h_stream": "i32:16",
                        **dict.fromkeys(("mean_eps", "eps", "norm_eps"), "fp32"),
                        "num_iterations": "i32",
                    },
                    {
                        "NUM_COEFFICIENTS": num_coefficients,
                        "COLUMNS": columns,
                        "SPLITS": splits,
                        "LANES": mix_streams.LANES,
                        "BLOCKS": blocks,
                        "QUANTIZES": num_coefficients == 24,
                        "HAS_PTX": target.has_ptx,
                    },
                    mix_streams.read_warps(blocks),
                )
