"""The residual streams between sublayers, with what the last sublayer adds still to be written."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scission.kernels.moe.outputs import ExpertOutputs


@dataclass(frozen=True, slots=True)
class Mix:
    """How a sublayer's output goes into the streams: from `hc_read`, for `hc_write`."""

    post: Tensor  # [num_tokens, n] float32
    comb: Tensor  # [num_tokens, n, n] float32, from stream, to stream


@dataclass(frozen=True, slots=True)
class Pending:
    """A sublayer's output on its way: h'_k = post_k y + sum_j comb[j, k] h_j."""

    y: Tensor | ExpertOutputs  # [num_tokens, d]
    mix: Mix

    def summed(self, dtype: torch.dtype) -> Tensor:
        """y [num_tokens, d], rounded as every sublayer's output is."""
        return self.y.sum(dtype) if isinstance(self.y, ExpertOutputs) else self.y

    def select(self, tokens: Tensor) -> "Pending":
        y, mix = self.y, self.mix
        return Pending(
            y.select(tokens) if isinstance(y, ExpertOutputs) else y.index_select(0, tokens),
            Mix(mix.post.index_select(0, tokens), mix.comb.index_select(0, tokens)),
        )


@dataclass(slots=True)
class Streams:
    """n streams of width d for every token.

    Writing is put off to the next read, which has to read the streams in any case: `hc_read` and
    `hc_read_head` bring `values` up to date and leave nothing pending.
    """

    values: Tensor  # [num_tokens, n, d] float32 or bfloat16
    pending: Pending | None = None

    @classmethod
    def of(cls, x: Tensor, n: int) -> "Streams":
        """n times [num_tokens, d]; nothing is copied, and x is never written."""
        return cls(x.unsqueeze(1).expand(-1, n, -1))

    def select(self, tokens: Tensor) -> "Streams":
        """The streams of some tokens, [n] int64; a copy."""
        pending = self.pending.select(tokens) if self.pending is not None else None
        return Streams(self.values.index_select(0, tokens), pending)
