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
        for pending in (None, "*bf16", "*fp32"):
            yield (
                mix_streams.score_streams_kernel,
                {
                    "h_ptr": "*bf16",
                    "y_ptr": pending or "*bf16",
                    "row_of_ptr": "*i32",
                    **pointers,
                    "out_ptr": "*bf16",
                    "fn_ptr": "*fp32",
                    "partials_ptr": "*fp32",
                    "num_tokens": "i32",
                    "d": "i32:16",
                    **dict.fromkeys(("num_rows", "num_parts", "num_choices"), "i32"),
                    "slices_per_split": "i32",
                    "stride_h_token": "i32:16",
                    "stride_h_stream": "i32:16",
                },
                {
                    "NUM_COEFFICIENTS": num_coefficients,
                    "COLUMNS": columns,
                    "HAS_PENDING": pending is not None,
                    "IS_SUMMED": pending != "*fp32",
                    "DOT_TYPE": mix_streams.dot_type(target),
                    "BLOCK_T": mix_streams.BLOCK_T,
                    "BLOCK_D": mix_streams.block_d(target),
                    "NUM_STAGES": mix_streams.num_stages(target),
                },
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
                    },
                    mix_streams.READ_WARPS,
                )
