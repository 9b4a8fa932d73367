"""The pooling of a compressor: several tokens' projections folded into one entry, per channel."""

import torch
from torch import Tensor

from scission.kernels.compressor import reference

__all__ = ["pool_blocks"]


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
