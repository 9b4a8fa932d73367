"""What experts put out before it is summed by token."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ExpertOutputs:
    """Rows whose sums are the layer's output: y[t] = sum of rows[:, row_of[t, k]], over all k.

    Who reads y adds them up (`hc_write` takes it so), in fp32 and always in the same order, which
    saves a pass over them.

    rows: [num_parts, num_rows, d] float32 or bfloat16, parts of a row being added as well;
    row_of: [num_tokens, k] int32.
    """

    rows: Tensor
    row_of: Tensor

    @property
    def num_tokens(self) -> int:
        return self.row_of.shape[0]

    def sum(self, dtype: torch.dtype) -> Tensor:
        """[num_tokens, d] of `dtype`, summed in fp32."""
        chosen = self.rows[:, self.row_of.long()]  # [parts, tokens, k, d]
        return chosen.sum(2, dtype=torch.float32).sum(0).to(dtype)

    def select(self, tokens: Tensor) -> "ExpertOutputs":
        """Those of some tokens: [n] int64."""
        return ExpertOutputs(self.rows, self.row_of.index_select(0, tokens))
