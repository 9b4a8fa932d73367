"""What attention's projections become before they are multiplied further: the query latent, the
key-value row, the query heads and the indexer's queries.
"""

import torch
from torch import Tensor

from scission.kernels.latents import reference
from scission.kernels.linear.rows import QuantizedRows
from scission.kernels.places import Places
from scission.kernels.target import target_of

__all__ = ["index_queries", "norm_latents", "turn_heads_"]


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
    *,
    keeps_values: bool = False,
) -> tuple[QuantizedRows, Tensor]:
    """Normalise the query latent and the key-value row that lie side by side in x.

    Where every sequence has one token, its key-value row is written into the ring as well: it
    overwrites the position that has just left the window. Otherwise early queries still see what
    late tokens overwrite, and the ring is written by `write_ring_` after them.

    Args:
        x: [num_tokens, q_lora + dim] float32 or bfloat16.
        q_weight, kv_weight: [q_lora], [dim] float32.
        rotation: [num_tokens, rope_dim / 2] complex64, of the last channels of kv.
        round_kv: the FP8 round trip, in blocks of 64, of the other channels of kv.
        ring: [num_slots * window, dim] of x's dtype; None: nothing is kept.
        keeps_values: the normalised latent is wanted in x's dtype as well.

    Returns:
        The query latent as codes with a power-of-two scale per 128 values, and kv
        [num_tokens, dim].
    """
    q_lora, dim = q_weight.shape[0], kv_weight.shape[0]
    if x.shape != (places.num_tokens, q_lora + dim):
        raise ValueError(
            f"x {list(x.shape)} does not fit {places.num_tokens} tokens and {q_lora} + {dim}"
        )
    if rotation.shape[0] != x.shape[0] or 2 * rotation.shape[1] > dim:
        raise ValueError(f"rotation {list(rotation.shape)} does not fit x {list(x.shape)}")
    if ring is not None and (ring.shape[1] != dim or ring.dtype != x.dtype):
        raise ValueError(f"ring {list(ring.shape)} {ring.dtype} does not fit {dim} of {x.dtype}")
    arguments = (
        x, q_weight, kv_weight, eps, rotation, round_kv, ring, window, places, keeps_values,
    )  # fmt: skip
    if target_of(x.device) is None or x.dtype != torch.bfloat16:
        return reference.norm_latents(*arguments)
    # only where a kernel is launched is Triton needed
    from scission.kernels.latents import latent_rows

    return latent_rows.norm_latents(*arguments)


def turn_heads_(q: Tensor, eps: float, rotation: Tensor) -> Tensor:
    """Normalise every head without weight, then rotate its last channels, in place.

    Args:
        q: [num_tokens, num_heads, dim] float32 or bfloat16.
        rotation: [num_tokens, rope_dim / 2] complex64.

    Returns:
        q.
    """
    _check_heads(q, rotation)
    if target_of(q.device) is None or q.dtype != torch.bfloat16:
        return reference.turn_heads_(q, eps, rotation)
    from scission.kernels.latents import query_heads

    return query_heads.turn_heads_(q, eps, rotation)


def index_queries(q: Tensor, rotation: Tensor, rounds: bool) -> Tensor:
    """Rotate the last channels of the indexer's queries; Hadamard transform and FP4 round trip.

    Args:
        q: [num_tokens, num_heads, dim] float32 or bfloat16.
        rotation: [num_tokens, rope_dim / 2] complex64.
        rounds: without the round trip the (orthogonal) transform cancels out and is left away.

    Returns:
        A new tensor like q.
    """
    _check_heads(q, rotation)
    dim = q.shape[-1]
    if rounds and dim & (dim - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, got {dim}")
    target = target_of(q.device)
    if target is None or q.dtype != torch.bfloat16 or dim < 32 or dim & (dim - 1):
        return reference.index_queries(q, rotation, rounds)
    from scission.kernels.latents import query_heads

    return query_heads.index_queries(q, rotation, rounds, target)


def _check_heads(q: Tensor, rotation: Tensor) -> None:
    if q.dim() != 3 or q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"q must be [tokens, heads, dim] float32 or bfloat16, got {q.dtype}")
    if rotation.shape[0] != q.shape[0] or 2 * rotation.shape[1] > q.shape[2]:
        raise ValueError(f"rotation {list(rotation.shape)} does not fit q {list(q.shape)}")
