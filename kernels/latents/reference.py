"""Queries, latents and index queries made ready, in plain PyTorch: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.kernels.cache.reference import write_ring_
from scission.kernels.indexer.reference import hadamard
from scission.kernels.linear.rows import QuantizedRows
from scission.kernels.norm.reference import rms_norm
from scission.kernels.places import Places
from scission.kernels.quant import FP8_BLOCK, FP8_MAX, round_trip_fp4, round_trip_fp8
from scission.kernels.quant.reference import ue8m0_round_up
from scission.kernels.rope.reference import rotate_

KV_BLOCK = 64  # values of a key-value row that share a scale
INDEX_BLOCK = 32  # likewise of an index query or key


def norm_latents(
    x: Tensor,
    q_weight: Tensor,
    kv_weight: Tensor,
    eps: float,
    rotation: Tensor,
    round_kv: bool,
    ring: Tensor | None,
    window: int,
    places: Places,
    keeps_values: bool,
) -> tuple[QuantizedRows, Tensor]:
    q, kv = x.split_with_sizes([q_weight.shape[0], kv_weight.shape[0]], dim=-1)
    q = rms_norm(q, q_weight, eps)
    kv = rotate_(rms_norm(kv, kv_weight, eps), rotation)
    if round_kv:
        kv = round_kv_(kv, 2 * rotation.shape[-1])
    if ring is not None and places.is_single:
        write_ring_(ring, kv, window, places)
    return _quantize(q, keeps_values), kv


def turn_heads_(q: Tensor, eps: float, rotation: Tensor) -> Tensor:
    q.copy_(rms_norm(q, None, eps))
    return rotate_(q, rotation)


def index_queries(q: Tensor, rotation: Tensor, rounds: bool) -> Tensor:
    q = rotate_(q.clone(memory_format=torch.contiguous_format), rotation)
    return round_index(q) if rounds else q


def round_kv_(kv: Tensor, rope_dim: int) -> Tensor:
    """The round trip of [n, dim] in place, but for the last rope_dim channels."""
    plain = kv[:, :-rope_dim]
    plain.copy_(round_trip_fp8(plain, KV_BLOCK))
    return kv


def round_index(x: Tensor) -> Tensor:
    """[.., dim]: the Hadamard transform, then the round trip."""
    return round_trip_fp4(hadamard(x), INDEX_BLOCK)


def _quantize(x: Tensor, keeps_values: bool) -> QuantizedRows:
    width = x.shape[1]
    blocks = F.pad(x.float(), (0, -width % FP8_BLOCK)).view(x.shape[0], -1, FP8_BLOCK)
    scales, _ = ue8m0_round_up(blocks.abs().amax(-1).clamp_min(1e-4) / FP8_MAX)
    codes = (blocks / scales.unsqueeze(-1)).view(x.shape[0], -1)[:, :width]
    return QuantizedRows(
        codes=codes.to(torch.float8_e4m3fn), scales=scales, values=x if keeps_values else None
    )
