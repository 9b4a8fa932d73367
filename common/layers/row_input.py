"""How a layer takes its rows: as they are, or rounded by whoever computes them."""

from dataclasses import dataclass

from torch import Tensor

from scission.common.layers.linear import Linear
from scission.kernels.linear import Scaling


@dataclass(frozen=True, slots=True)
class RowInput:
    """What the producer of a layer's rows does for it, as `quantize_rows` takes it."""

    scaling: Scaling | None = None  # None: the rows stay as they are
    static_scale: Tensor | None = None
    keeps_values: bool = False  # quantised or not, the values are read, too


def input_of(*linears: Linear) -> RowInput:
    """Of layers that read the same rows: codes where a kernel multiplies them.

    Linear layers round what is not rounded: rows may always stay as they are.
    """
    coded = [linear for linear in linears if linear.fp8 is not None and linear.scaling is not None]
    if not coded:
        return RowInput()
    first = coded[0]
    assert all(linear.scaling == first.scaling for linear in coded)
    return RowInput(first.scaling, first.static_scale, keeps_values=len(coded) < len(linears))
