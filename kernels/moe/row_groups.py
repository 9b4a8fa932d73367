"""Pairs (token, expert) in order of expert, cut into blocks of one expert."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Rows are the pairs in order of expert; the number of blocks is an upper bound.

    block_experts: [num_blocks] int32, -1 past the last; block_rows: [num_blocks, 2] int32, each
    block's first row and the row after its last. row_tokens: [num_pairs] int32 and row_weights
    [num_pairs] float32, of each row; row_of: [num_tokens, k + shared] int32, the rows of each
    token, -1 where an expert is not here; those of shared experts come after all pairs.
    """

    block_m: int
    block_experts: Tensor
    block_rows: Tensor
    row_tokens: Tensor
    row_weights: Tensor
    row_of: Tensor

    @property
    def num_blocks(self) -> int:
        return self.block_experts.shape[0]

    @property
    def num_pairs(self) -> int:
        return self.row_tokens.shape[0]


def max_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Each expert's last block may be partial."""
    return min(num_pairs, num_experts + num_pairs // block_m)
