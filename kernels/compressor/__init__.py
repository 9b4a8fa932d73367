"""A compressor: several tokens' projections folded into one entry, per channel."""

from typing import Literal

import torch
from torch import Tensor

from scission.kernels.compressor import reference
from scission.kernels.places import Places
from scission.kernels.target import target_of

__all__ = ["compress_", "pool_blocks"]


def pool_blocks(kv: Tensor, score: Tensor, sources: Tensor) -> Tensor:
    """Softmax over each entry's source rows, per channel, then the weighted sum. All fp32.

    With overlap a token's row holds two halves, of which the first serves the next block's entry
    and the second its own block's: pass the rows cut in halves, and half row numbers.

    Args:
        kv, score: [num_rows, width] float32; a score of -inf takes a row out.
        sources: [num_entries, rows per entry] int64, at least one of a finite score.

    Returns:
        [num_entries, width] float32.
    """
    if kv.shape != score.shape or kv.dtype != torch.float32 or score.dtype != torch.float32:
        raise ValueError(
            f"kv and score must be alike and float32, got {list(kv.shape)} {kv.dtype}, "
            f"{list(score.shape)} {score.dtype}"
        )
    return reference.pool_blocks(kv, score, sources)


def compress_(
    kv: Tensor,
    score: Tensor,
    ape: Tensor,
    norm_weight: Tensor,
    eps: float,
    block_rotation: Tensor,
    ring_kv: Tensor,
    ring_score: Tensor,
    entries: Tensor,
    ratio: int,
    rounding: Literal["kv", "index"] | None,
    rope_dim: int,
    places: Places,
) -> None:
    """Write the entries that this step completes, and the rings, in place.

    An entry is complete with the last token of its block of `ratio` tokens, whether the others are
    this step's or the ring's. It is pooled in fp32, cast to the entries' dtype, normalised, turned
    by the position of its block's first token and rounded. Rows that are twice as wide as an entry
    overlap: the first half serves the next block's entry, which then pools the block before as
    well.

    Args:
        kv, score: [num_tokens, w] float32 projections, w once or twice the entries' width; views
            with a stride between rows. `score` is without `ape`.
        ape: [ratio, w] float32, added to scores by position in the block.
        norm_weight: [width] float32.
        block_rotation: [num_tokens, rope_dim / 2] complex64, of the first position of each token's
            block.
        ring_kv, ring_score: [num_slots * w / width * ratio, w] float32; scores with `ape`.
        entries: [num_blocks * places.block_size / ratio, width].
        rounding: "kv": FP8 in blocks of 64 of all but the last rope_dim channels; "index": the
            Hadamard transform, then FP4 in groups of 32.
    """
    width = entries.shape[1]
    if (
        kv.shape != score.shape
        or kv.shape != (places.num_tokens, ape.shape[1])
        or ape.shape not in ((ratio, width), (ratio, 2 * width))
    ):
        raise ValueError(
            f"kv {list(kv.shape)}, score {list(score.shape)} and ape {list(ape.shape)} do not fit "
            f"{places.num_tokens} tokens and entries {list(entries.shape)} of {ratio} tokens"
        )
    tensors = (kv, score, ape, norm_weight, ring_kv, ring_score)
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        raise ValueError(
            f"tensors must be float32, got {[str(tensor.dtype) for tensor in tensors]}"
        )
    if block_rotation.shape != (places.num_tokens, rope_dim // 2):
        raise ValueError(f"block_rotation {list(block_rotation.shape)} does not fit {rope_dim}")
    if rounding == "index" and width & (width - 1):
        raise ValueError(f"the Hadamard transform needs a power of two, got {width}")
    arguments = (
        kv, score, ape, norm_weight, eps, block_rotation, ring_kv, ring_score, entries, ratio,
        rounding, places,
    )  # fmt: skip
    target = target_of(kv.device)
    if target is None or entries.dtype != torch.bfloat16:
        reference.compress_(*arguments)
        return
    # only where a kernel is launched is Triton needed
    from scission.kernels.compressor import compress

    compress.compress_(*arguments, target)
