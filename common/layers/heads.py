"""Query and key-value heads: how ranks divide them, and the projections to and from them."""

from dataclasses import dataclass

from scission.common.checkpoint.weights import Shard, Weights
from scission.common.errors import ConfigError
from scission.common.layers.linear import Linear
from scission.common.layers.numerics import Numerics
from scission.common.layers.row_input import RowInput, input_of
from scission.common.parallel.ranks import Axis
from scission.kernels.linear import Rows, Sums


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """One rank's heads: query heads stay with the key-value head that they share.

    With more ranks than key-value heads each of these is held by several ranks, and its query heads
    are divided among them.

    Raises:
        ConfigError: query heads that do not go by key-value heads, or ranks beyond the key-value
            heads that do not divide both evenly.
    """

    axis: Axis
    num_heads: int  # of all ranks
    num_kv_heads: int

    def __post_init__(self) -> None:
        size, heads, kv_heads = self.axis.size, self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            raise ConfigError(f"{heads} query heads cannot share {kv_heads} key-value heads")
        if size > kv_heads and (size % kv_heads or heads % size):
            raise ConfigError(
                f"tp_size is {size}; {heads} query and {kv_heads} key-value heads are divided over "
                f"at most {kv_heads} ranks, or a multiple of it that divides {heads}"
            )

    def queries(self, width: int, dim: int = 0) -> Shard | None:
        """This rank's part of a dimension that has `width` channels for every query head."""
        if self.axis.size == 1:
            return None
        heads = 1 if self._is_replicated else self.num_heads // self.num_kv_heads
        return Shard(dim, self.axis.rank, self.axis.size, heads * width)

    def keys(self, width: int) -> Shard | None:
        """This rank's rows of a matrix that has `width` outputs for every key-value head."""
        if self.axis.size == 1:
            return None
        if not self._is_replicated:
            return Shard(0, self.axis.rank, self.axis.size, width)
        num_copies = self.axis.size // self.num_kv_heads
        return Shard(0, self.axis.rank // num_copies, self.num_kv_heads, width)

    @property
    def num_local_kv_heads(self) -> int:
        shard = self.keys(1)
        if shard is None:
            return self.num_kv_heads
        first, last = shard.bounds(self.num_kv_heads)
        return last - first

    @property
    def _is_replicated(self) -> bool:
        return self.axis.size > self.num_kv_heads


class HeadProjections:
    """`q_proj`, `k_proj` and `v_proj` of one input as one product; this rank's heads."""

    def __init__(
        self, w: Weights, dim: int, head_dim: int, heads: HeadSplit, numerics: Numerics
    ) -> None:
        q_dim, kv_dim = heads.num_heads * head_dim, heads.num_kv_heads * head_dim
        matrices = [
            w.matrix("q_proj", q_dim, dim, heads.queries(head_dim)),
            w.matrix("k_proj", kv_dim, dim, heads.keys(head_dim)),
            w.matrix("v_proj", kv_dim, dim, heads.keys(head_dim)),
        ]
        self.linear = Linear(matrices, numerics)

    @property
    def input(self) -> RowInput:
        """How the rows are taken."""
        return input_of(self.linear)

    def __call__(self, x: Rows) -> Sums:
        """[num_tokens, dim] -> [num_tokens, q, k, v heads side by side * head_dim]."""
        return self.linear.parts(x)


class HeadsOutput:
    """`o_proj`: all heads side by side to the model's width, summed over the ranks."""

    def __init__(
        self, w: Weights, dim: int, head_dim: int, heads: HeadSplit, numerics: Numerics
    ) -> None:
        columns = heads.queries(head_dim, dim=1)
        matrix = w.matrix("o_proj", dim, heads.num_heads * head_dim, columns)
        self._linear = Linear([matrix], numerics)
        self._axis = heads.axis

    @property
    def input(self) -> RowInput:
        """How the rows are taken."""
        return input_of(self._linear)

    def __call__(self, heads: Rows) -> Sums:
        """[num_tokens, heads * head_dim] -> [num_tokens, dim]."""
        return self._linear.reduced(heads, self._axis)
