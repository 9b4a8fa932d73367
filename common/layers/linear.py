"""Linear layers over quantised matrices, and their parallel forms; size 1 is the trivial case."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.common.checkpoint.weights import Matrix, Shard, Weights
from scission.common.errors import CheckpointError
from scission.common.layers.numerics import Numerics
from scission.common.parallel.ranks import Axis
from scission.kernels.linear import (
    QuantizedRows,
    Scaling,
    SplitSums,
    can_run,
    linear_bf16,
    linear_block_fp8,
    linear_block_fp8_parts,
    quantize_rows,
    round_trip_rows,
)
from scission.kernels.quant import FP8_BLOCK, scale_values


def axis_shard(axis: Axis, dim: int, align: int = 1) -> Shard | None:
    """This rank's part of a dimension, in whole units of `align`; None: all of it."""
    return Shard(dim, axis.rank, axis.size, align) if axis.size > 1 else None


class Linear:
    """y = x Wᵀ for one matrix, or for several over the same input, whose outputs lie side by side.

    On the CPU the values are kept in the dtype of the activations, which holds those of FP4 and of
    power-of-two scales exactly; on other devices the stored codes are kept, multiplied as they are
    where there is a kernel, and else decoded when used.
    """

    def __init__(
        self, matrices: Sequence[Matrix], numerics: Numerics, *, rounds_input: bool = True
    ) -> None:
        """
        Args:
            matrices: all [.., in] of one in.
            numerics: dtype of input and output, and whether a quantised matrix's input is rounded.
            rounds_input: False for a matrix that is multiplied without that.
        """
        quantised = {matrix.kind != "plain" for matrix in matrices}
        if len(quantised) > 1:
            kinds = ", ".join(matrix.kind for matrix in matrices)
            raise CheckpointError(f"matrices of one input must be all quantised or none: {kinds}")
        self._matrices = tuple(matrices)
        self._dtype = numerics.dtype
        rounds = rounds_input and numerics.rounds
        scaling, static_scale = input_scaling(matrices) if rounds else (None, None)
        # how the input is rounded; None: it is multiplied as it is
        self.scaling: Scaling | None = scaling
        # [] float32, with "static"
        self.static_scale: Tensor | None = static_scale
        is_kept = matrices[0].codes.device.type == "cpu"
        self._values = self._decode() if is_kept else None
        if is_kept:
            self._matrices = ()
        self._fp8 = None if is_kept else _as_one_fp8(matrices, self._dtype)
        if self._fp8 is not None:
            self._matrices = (self._fp8,)

    @property
    def weight(self) -> Tensor:
        """[out, in] of the activations' dtype."""
        return self._values if self._values is not None else self._decode()

    @property
    def fp8(self) -> tuple[Tensor, Tensor] | None:
        """Codes [out, in] and float32 scales of 128 x 128 blocks, where a kernel takes them."""
        if self._fp8 is None or self._fp8.scales is None:
            return None
        return self._fp8.codes, self._fp8.scales

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """[num_tokens, in] -> [num_tokens, out].

        Args:
            x: rows, rounded here where they are to be; or quantised already, by `self.scaling`,
                or with their values where nothing is rounded.
        """
        if self._fp8 is not None and self._fp8.scales is not None:
            return linear_block_fp8(self._rounded(x), self._fp8.codes, self._fp8.scales)
        return self._by_values(x)

    def parts(self, x: Tensor | QuantizedRows) -> Tensor | SplitSums:
        """As the call; where a kernel splits the inputs, the parts of the sums as they are."""
        if self._fp8 is not None and self._fp8.scales is not None:
            return linear_block_fp8_parts(self._rounded(x), self._fp8.codes, self._fp8.scales)
        return self._by_values(x)

    def reduced(self, x: Tensor | QuantizedRows, axis: Axis) -> Tensor | SplitSums:
        """Summed over ranks that hold some of the inputs each; parts where there is but one."""
        return self.parts(x) if axis.size == 1 else axis.reduce(self(x))

    def _rounded(self, x: Tensor | QuantizedRows) -> Tensor | QuantizedRows:
        """As codes are multiplied with it."""
        if self.scaling is None:
            return x if isinstance(x, Tensor) else _values_of(x)
        return quantize_rows(x, self.scaling, self.static_scale) if isinstance(x, Tensor) else x

    def _by_values(self, x: Tensor | QuantizedRows) -> Tensor:
        if self.scaling is None:
            x = x if isinstance(x, Tensor) else _values_of(x)
        if isinstance(x, QuantizedRows):
            x = x.dequantize(self._dtype)
        elif self.scaling is not None:
            x = round_trip_rows(x, self.scaling, self.static_scale)
        return F.linear(x, self.weight)

    def _decode(self) -> Tensor:
        return torch.cat([matrix.dequantize(self._dtype) for matrix in self._matrices])


def input_scaling(matrices: Sequence[Matrix]) -> tuple[Scaling | None, Tensor | None]:
    """How the input of matrices is rounded that were quantised so; None: it is not.

    A static scale of the inputs is the checkpoint's own; of several matrices over one input the
    largest, which none of their inputs exceeds. Else weights with power-of-two scales go with
    activations that have them too, and weights with float scales with dynamic ones.
    """
    if matrices[0].kind == "plain":
        return None, None
    static = [matrix.input_scale for matrix in matrices if matrix.input_scale is not None]
    if static and len(static) == len(matrices):
        return "static", torch.stack(static).amax(0)
    dtypes = {matrix.scales.dtype for matrix in matrices if matrix.scales is not None}
    return ("ue8m0" if dtypes <= {torch.uint8, torch.float8_e8m0fnu} else "dynamic"), None


def _values_of(rows: QuantizedRows) -> Tensor:
    if rows.values is None:
        raise ValueError("this layer rounds no input, and the rows hold only their codes")
    return rows.values


def _as_one_fp8(matrices: Sequence[Matrix], dtype: torch.dtype) -> Matrix | None:
    """The matrices one below the other as the FP8 kernel takes them; None: it cannot."""
    first = matrices[0]
    if not can_run(first.codes.device, dtype, first.in_features):
        return None
    matrices = [matrix.by_block() for matrix in matrices]
    # each begins a row of blocks of its own
    if any(matrix.out_features % FP8_BLOCK for matrix in matrices[:-1]):
        return None
    scales = []
    for matrix in matrices:
        if matrix.kind != "fp8_block" or matrix.offset != (0, 0) or matrix.scales is None:
            return None
        scales.append(scale_values(matrix.scales))
    codes = torch.cat([matrix.codes for matrix in matrices])
    return Matrix("fp8_block", codes, torch.cat(scales), codes.shape[0], codes.shape[1])


class ColumnParallelLinear(Linear):
    """Each rank holds some of the outputs, in whole units of `align` (heads, groups)."""

    def __init__(
        self,
        w: Weights,
        name: str,
        out_features: int,
        in_features: int,
        axis: Axis,
        numerics: Numerics,
        *,
        align: int = 1,
        rounds_input: bool = True,
    ) -> None:
        matrix = w.matrix(name, out_features, in_features, axis_shard(axis, 0, align))
        super().__init__([matrix], numerics, rounds_input=rounds_input)


class RowParallelLinear(Linear):
    """Each rank holds some of the inputs; the outputs are summed over the ranks in fp32."""

    def __init__(
        self,
        w: Weights,
        name: str,
        out_features: int,
        in_features: int,
        axis: Axis,
        numerics: Numerics,
        *,
        align: int = 1,
        rounds_input: bool = True,
    ) -> None:
        matrix = w.matrix(name, out_features, in_features, axis_shard(axis, 1, align))
        super().__init__([matrix], numerics, rounds_input=rounds_input)
        self._axis = axis

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        return self._axis.reduce(super().__call__(x))


class VocabParallelEmbedding:
    """Each rank holds the rows of some of the vocabulary; the table stays in its stored dtype."""

    def __init__(
        self, w: Weights, name: str, vocab_size: int, dim: int, axis: Axis, numerics: Numerics
    ) -> None:
        shard = axis_shard(axis, 0)
        self.table = w.tensor(f"{name}.weight", (vocab_size, dim), torch.bfloat16, shard)
        self._first = shard.bounds(vocab_size)[0] if shard else 0
        self._axis = axis
        self._dtype = numerics.dtype

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[num_tokens] int64 -> [num_tokens, dim] of the activations' dtype."""
        if self._axis.size == 1:
            return self.table.index_select(0, token_ids).to(self._dtype)
        local = token_ids - self._first
        is_mine = (local >= 0) & (local < self.table.shape[0])
        rows = F.embedding(local * is_mine, self.table) * is_mine.unsqueeze(-1)
        return self._axis.all_reduce(rows).to(self._dtype)


class VocabParallelHead:
    """Logits in fp32; each rank computes those of some of the vocabulary."""

    def __init__(
        self,
        w: Weights,
        name: str,
        vocab_size: int,
        dim: int,
        axis: Axis,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        """
        Args:
            tied_to: the embedding whose table is the head's, too; None: the head's own is taken.
        """
        shard = axis_shard(axis, 0)
        table = (
            tied_to.table
            if tied_to is not None
            else w.tensor(f"{name}.weight", (vocab_size, dim), torch.bfloat16, shard)
        )
        # what is gathered is as long on every rank; the rows that pad it are cut off again
        num_rows = -(-vocab_size // axis.size)
        if table.device.type == "cpu":
            table = table.float()
        if table.shape[0] < num_rows:
            table = F.pad(table, (0, 0, 0, num_rows - table.shape[0]))
        self._weight = table
        self._vocab_size = vocab_size
        self._axis = axis

    def __call__(self, x: Tensor) -> Tensor:
        """[n, dim] -> [n, vocab_size] float32."""
        if self._weight.dtype == torch.bfloat16 and x.dtype == torch.bfloat16:
            logits = linear_bf16(x, self._weight, torch.float32)
        else:
            logits = F.linear(x.float(), self._weight.float())
        logits = self._axis.all_gather(logits)
        return logits[:, : self._vocab_size]
