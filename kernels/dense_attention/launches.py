"""How the kernels of `attend_heads` are launched: the shapes of Qwen3, Ministral 3 and Step-3.5."""

from collections.abc import Iterator, Mapping
from typing import Any

from scission.kernels.dense_attention import chunks, single_tokens
from scission.kernels.target import Target

_HEAD_DIM = 128
# query heads of a key-value head, rotated pairs, norms, scaled queries, window, gate and sink
_LAYERS = {
    "qwen3": (4, 64, True, False, False, False),
    "ministral3": (4, 64, False, True, False, False),
    "step, full": (8, 32, True, False, False, True),
    "step, sliding": (12, 64, True, False, True, True),
}
_SCALINGS = ("none", "dynamic", "static")


def launches(target: Target) -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, run-time arguments in Triton's words, constants, warps."""
    for group, pairs, has_norm, has_query_scale, has_window, has_gate in _LAYERS.values():
        layer = {
            "PAIRS": pairs,
            "HAS_NORM": has_norm,
            "HAS_QUERY_SCALE": has_query_scale,
        }
        scaling = "dynamic" if has_norm else "static"
        for num_splits, num_parts in ((1, 1), (1, 2), (2, 4), (32, 1), (32, 8)):
            is_last = num_splits == 1
            yield (
                single_tokens.single_tokens_kernel,
                _single_types("*fp32" if num_parts > 1 else "*bf16", scaling, is_last),
                {
                    "HEAD_DIM": _HEAD_DIM,
                    "GROUP": group,
                    "BLOCK_M": single_tokens.BLOCK_M,
                    "BLOCK_N": single_tokens.block_n(target),
                    "NUM_SPLITS": num_splits,
                    "PARTS": num_parts,
                    **layer,
                    "HAS_WINDOW": has_window,
                    "HAS_SINK": False,
                    "HAS_GATE": has_gate and is_last,
                    "SCALING": scaling,
                    "IS_DEPENDENT": target.has_ptx,
                    "NUM_STAGES": single_tokens.num_stages(target),
                },
                single_tokens.NUM_WARPS,
            )
        yield (
            chunks.turn_heads_kernel,
            _turn_types(),
            {
                "HEAD_DIM": _HEAD_DIM,
                "BLOCK_H": chunks.TURN_HEADS,
                **layer,
                "IS_PAGED": not has_window,
                "IS_DEPENDENT": target.has_ptx,
            },
            chunks.TURN_WARPS,
        )
        yield (
            chunks.chunks_kernel,
            _chunk_types(scaling),
            {
                "HEAD_DIM": _HEAD_DIM,
                "GROUP": group,
                "SEQUENCES": chunks.SEQUENCES,
                "BLOCK_M": chunks.block_m(target),
                "BLOCK_N": chunks.block_n(target),
                "HAS_WINDOW": has_window,
                "HAS_SINK": has_gate,
                "HAS_GATE": has_gate,
                "SCALING": scaling,
                "NUM_STAGES": chunks.num_stages(target),
            },
            chunks.num_warps(target),
        )
    for num_splits in (2, 32):
        for scaling in _SCALINGS:
            yield (
                single_tokens.add_parts_kernel,
                {
                    **{f"{name}_ptr": "*fp32" for name in ("parts", "sums", "sink")},
                    "gate_ptr": "*bf16",
                    **_out_types(scaling),
                    "num_heads": "i32:16",
                },
                {
                    "HEAD_DIM": _HEAD_DIM,
                    "NUM_SPLITS": num_splits,
                    "HAS_SINK": True,
                    "HAS_GATE": True,
                    "DTYPE": single_tokens.DTYPES[single_tokens.KERNEL_DTYPE],
                    "SCALING": scaling,
                    "IS_DEPENDENT": target.has_ptx,
                },
                single_tokens.add_warps(num_splits),
            )


def _out_types(scaling: str) -> dict[str, str]:
    is_plain = scaling == "none"
    return {
        "out_ptr": "*bf16" if is_plain else "*fp8e4nv",
        "scales_ptr": "*bf16" if is_plain else "*fp32",
    }


def _single_types(qkv: str, scaling: str, is_last: bool) -> dict[str, str]:
    types = {"qkv_ptr": qkv, "k_pool_ptr": "*bf16", "v_pool_ptr": "*bf16"}
    types |= {f"{name}_ptr": "*fp32" for name in ("q_weight", "k_weight", "rotation")}
    types |= {"query_scale_ptr": "*fp32", "sink_ptr": "*fp32", "gate_ptr": "*bf16"}
    types |= {f"{name}_ptr": "*i64" for name in ("positions", "block_tables", "slots")}
    types |= _out_types(scaling)
    if not is_last:
        types["out_ptr"] = "*fp32"
    types["sums_ptr"] = "*fp32"
    types |= {"eps": "fp32", "scale": "fp32", "window": "i32:16", "block_size": "i32:16"}
    types |= {"num_kv_heads": "i32", "max_blocks": "i32"}
    types |= {"num_parts": "i32", "stride_qkv_part": "i32:16"}
    return types | {"stride_qkv_token": "i32:16", "stride_tables_seq": "i32"}


def _turn_types() -> dict[str, str]:
    types = {"qkv_ptr": "*bf16"}
    types |= {f"{name}_ptr": "*fp32" for name in ("q_weight", "k_weight", "rotation")}
    types |= {"query_scale_ptr": "*fp32"}
    types |= {f"{name}_ptr": "*i64" for name in ("positions", "sequences", "block_tables")}
    types |= {f"{name}_ptr": "*bf16" for name in ("q", "k", "v_pool")}
    types |= {"eps": "fp32", "num_heads": "i32:16", "num_kv_heads": "i32", "block_size": "i32:16"}
    return types | {"stride_qkv_token": "i32:16", "stride_tables_seq": "i32"}


def _chunk_types(scaling: str) -> dict[str, str]:
    types = {f"{name}_ptr": "*bf16" for name in ("q", "k", "v", "k_pool", "v_pool")}
    types |= {"sink_ptr": "*fp32", "gate_ptr": "*bf16"}
    types |= {"cu_seqlens_ptr": "*i32", "context_lens_ptr": "*i32"}
    types |= {"block_tables_ptr": "*i64", "slots_ptr": "*i64"}
    types |= _out_types(scaling)
    types |= {"scale": "fp32", "window": "i32:16", "block_size": "i32:16", "num_seqs": "i32"}
    types |= {"num_kv_heads": "i32", "stride_v_token": "i32:16", "stride_tables_seq": "i32"}
    return types
