"""What attention over per-head K and V is asked for: a layer's constants, and a step's."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's heads; consecutive query heads share a key-value head."""

    num_kv_heads: int
    head_dim: int
    scale: float  # of the scores
    window: int | None = None  # keys that a query sees, its own included; None: all
    q_weight: Tensor | None = None  # [head_dim] float32, of an RMS norm of every query head
    k_weight: Tensor | None = None  # [head_dim] float32, of every key head
    eps: float = 0.0  # of both norms
    has_rope: bool = True
    sink: Tensor | None = None  # [num_heads] float32: one more logit of the denominator, unscaled

    def num_heads(self, width: int) -> int:
        """Query heads of projections [num_tokens, width], queries, keys and values side by side."""
        return width // self.head_dim - 2 * self.num_kv_heads


@dataclass(frozen=True, slots=True)
class Turn:
    """How a step's positions enter queries and keys."""

    rotation: Tensor  # [num_tokens, rope_dim / 2] complex64: by halves of the first channels
    query_scale: Tensor | None = None  # [num_tokens] float32, of turned queries
