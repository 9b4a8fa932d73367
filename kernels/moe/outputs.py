"""What experts put out before it is summed by token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scission.kernels.target import target_of


@dataclass(frozen=True, slots=True)
class ExpertOutputs:
    """Rows whose sums are the layer's output: y[t] = sum of rows[:, row_of[t, k]], over all k.

    Who reads y adds them up (`hc_write` takes it so), in fp32 and always in the same order, which
    saves a pass over them.

    rows: [num_parts, num_rows, d] float32 or bfloat16, parts of a row being added as well;
    row_of: [num_tokens, k] int32, -1: no row.
    """

    rows: Tensor
    row_of: Tensor

    @property
    def num_tokens(self) -> int:
        return self.row_of.shape[0]

    def sum(self, dtype: torch.dtype, plus: Tensor | None = None) -> Tensor:
        """[num_tokens, d] of `dtype`, summed in fp32; `plus` [num_tokens, d] is added last."""
        if target_of(self.rows.device) is not None:
            # only where a kernel is launched is Triton needed
            from scission.kernels.moe.sum_rows import sum_rows

            return sum_rows(self.rows, self.row_of, plus, dtype)
        is_row = (self.row_of >= 0).unsqueeze(-1)
        found = self.rows[:, self.row_of.clamp_min(0).long()]  # [parts, tokens, k, d]
        total = torch.where(is_row, found, 0).sum(2, dtype=torch.float32).sum(0)
        return (total if plus is None else total + plus).to(dtype)

    def select(self, tokens: Tensor) -> "ExpertOutputs":
        """Those of some tokens: [n] int64."""
        return ExpertOutputs(self.rows, self.row_of.index_select(0, tokens))
