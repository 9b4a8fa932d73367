"""The gated feed-forward layer: gate and up as one product, silu, an optional clamp, down."""

from torch import Tensor

from scission.common.checkpoint.weights import Weights
from scission.common.layers.linear import Linear, axis_shard
from scission.common.layers.numerics import LINEAR_BLOCK, Numerics
from scission.common.layers.row_input import RowInput, input_of
from scission.common.parallel.ranks import Axis
from scission.kernels.activation import silu_mul, silu_mul_rows
from scission.kernels.linear import QuantizedRows, SplitSums


class GatedMLP:
    """down(min(silu(gate x), limit) * clip(up x, -limit, limit)).

    Ranks hold whole scale blocks of the inner dimension, so that none reads another's scale;
    trailing ranks may hold nothing, which adds nothing.
    """

    def __init__(
        self,
        w: Weights,
        dim: int,
        inner: int,
        axis: Axis,
        numerics: Numerics,
        *,
        limit: float | None = None,
    ) -> None:
        """
        Args:
            limit: of the activation; None: no clamp.
        """
        rows, columns = (axis_shard(axis, cut, LINEAR_BLOCK) for cut in (0, 1))
        gate_up = [w.matrix(name, inner, dim, rows) for name in ("gate_proj", "up_proj")]
        self._gate_up = Linear(gate_up, numerics)
        self._down = Linear([w.matrix("down_proj", dim, inner, columns)], numerics)
        self.limit = limit
        self._axis = axis

    @property
    def input(self) -> RowInput:
        """How the rows are taken."""
        return input_of(self._gate_up)

    @property
    def captures(self) -> bool:
        """Whether nothing asks the host."""
        return True

    @property
    def fp8(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Codes and scales of gate and up, and of down; None: they are not multiplied so."""
        gate_up, down = self._gate_up.fp8, self._down.fp8
        return None if gate_up is None or down is None else (gate_up, down)

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor | SplitSums:
        """[num_tokens, dim] -> [num_tokens, dim], summed over the ranks."""
        return self._down.reduced(self._inner(x), self._axis)

    def partial(self, x: Tensor | QuantizedRows) -> Tensor:
        """This rank's share of the sum."""
        return self._down(self._inner(x))

    def _inner(self, x: Tensor | QuantizedRows) -> Tensor | QuantizedRows:
        gate_up, wanted = self._gate_up(x), input_of(self._down)
        if wanted.scaling is None:
            return silu_mul(gate_up, self.limit)
        return silu_mul_rows(gate_up, self.limit, wanted.scaling, wanted.static_scale)
