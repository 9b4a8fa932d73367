"""The launches of this folder's kernels, for `kernels.launch_table`."""

from collections.abc import Iterator, Mapping
from typing import Any

import triton.language as tl

from scission.kernels.latents import latent_rows, query_heads
from scission.kernels.target import Target

Q_LORAS = (1024, 1536)
DIM, ROPE_DIM, INDEX_DIM = 512, 64, 128
TURNED = {"rotation_ptr": "*fp32"}


def launches(target: Target) -> Iterator[tuple[Any, Mapping[str, str], Mapping[str, Any], int]]:
    """Kernel, types, constants and warps of each, at the shapes of DeepSeek-V4."""
    dims = {"DIM": DIM, "DIM_PADDED": DIM, "ROPE_DIM": ROPE_DIM}
    for q_lora in Q_LORAS:
        for has_ring in (True, False):
            yield (
                latent_rows.norm_latents_kernel,
                {"x_ptr": "*bf16", "q_weight_ptr": "*fp32", "kv_weight_ptr": "*fp32"}
                | TURNED
                | {"positions_ptr": "*i64", "slots_ptr": "*i64", "codes_ptr": "*fp8e4nv"}
                | {"scales_ptr": "*fp32", "values_ptr": "*bf16", "kv_ptr": "*bf16"}
                | {"ring_ptr": "*bf16", "eps": "fp32", "window": "i32:16"}
                | {"stride_x_token": "i32:16", "stride_rotation_token": "i32:16"},
                {"Q_LORA": q_lora, "Q_PADDED": latent_rows.padded(q_lora, 128)}
                | dims
                | {"ROUNDS_KV": True, "HAS_RING": has_ring, "KEEPS_VALUES": False},
                latent_rows.NUM_WARPS,
            )
    strides = {f"stride_{name}": "i32:16" for name in ("q_token", "q_head", "rotation_token")}
    yield (
        query_heads.turn_heads_kernel,
        {"q_ptr": "*bf16"} | TURNED | {"eps": "fp32", "num_heads": "i32:16"} | strides,
        dims | {"HEADS": query_heads.HEADS},
        query_heads.HEADS_WARPS,
    )
    for num_tokens in (1, 1024):
        yield (
            query_heads.index_queries_kernel,
            {"q_ptr": "*bf16"}
            | TURNED
            | {"out_ptr": "*bf16", "num_tokens": "i32", "num_heads": "i32:16", "scale": "fp32"}
            | strides,
            {
                "DIM": INDEX_DIM,
                "ROPE_DIM": ROPE_DIM,
                "BLOCK_M": query_heads.tile_heads(num_tokens, target),
                "ROUNDS": True,
                "DOT_TYPE": getattr(tl, target.decoded),
            },
            query_heads.NUM_WARPS,
        )
