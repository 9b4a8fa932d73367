"""Block pooling in plain PyTorch: the definition."""

from torch import Tensor


def pool_blocks(kv: Tensor, score: Tensor, sources: Tensor) -> Tensor:
    rows = sources.flatten()
    shape = (*sources.shape, kv.shape[1])
    weights = score.index_select(0, rows).view(shape).softmax(1)
    return kv.index_select(0, rows).view(shape).mul_(weights).sum(1)
