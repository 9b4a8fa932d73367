"""A checkpoint as the model's constructors see it: they pull tensors by name, a ledger counts both
ways.

Every tensor is taken exactly once (`finish` names those that were not), with exactly the shape and
dtype that was asked for. The format of a matrix is decided from its own dtype and its scale's
shape, never from the config, and never from the ratio of the two shapes.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from scission.common.checkpoint.matrix import Matrix, MatrixKind, Shard, StoredFormat
from scission.common.checkpoint.progress import LoadProgress
from scission.common.checkpoint.source import (
    SAFETENSORS_DTYPES,
    TORCH_DTYPES,
    Source,
    natural_key,
)
from scission.common.errors import CheckpointError
from scission.kernels.quant import FP4_GROUP, FP4_MAX, FP8_MAX, scale_values

__all__ = ["Ledger", "Matrix", "MatrixKind", "Shard", "Weights", "load_model"]

logger = logging.getLogger(__name__)

Built = TypeVar("Built")

# by the dtype of its codes
_KINDS: Mapping[str, MatrixKind] = {
    "BF16": "plain",
    "F16": "plain",
    "F32": "plain",
    "F8_E4M3": "fp8_block",
    "I8": "fp4_group",
}
_SUFFIXES = ("", ".weight", ".scale")
_SCALE_DTYPES = ("F8_E8M0", "F32", "BF16")
# what any trained or sensibly random matrix stays within; codes without their scales do not
_SANE_LARGEST = (2.0**-40, 2.0**14)


class Ledger:
    """One load, shared by its scopes: where from, where to, what was taken, what was wrong."""

    def __init__(self, source: Source, device: torch.device | str) -> None:
        self.source = source
        self.device = torch.device(device)
        self.taken: set[str] = set()
        self.problems: list[str] = []
        total_bytes = sum(tensor.num_bytes for tensor in source.tensors.values())
        self.progress = LoadProgress(total_bytes, "loading weights") if not self.is_dry else None

    @property
    def is_dry(self) -> bool:
        return self.device.type == "meta"

    def problem(self, message: str) -> None:
        """On the meta device collected for `finish`; elsewhere the first one ends the load."""
        if not self.is_dry:
            raise CheckpointError(message)
        self.problems.append(message)


class Weights:
    """The tensors of a source under one name prefix.

    On the meta device nothing is read and every problem is collected: `finish` raises them as one.
    On any other the first problem raises CheckpointError.
    """

    def __init__(self, ledger: Ledger, prefix: str = "") -> None:
        self._ledger = ledger
        self._prefix = prefix

    @property
    def device(self) -> torch.device:
        return self._ledger.device

    def scope(self, *components: str) -> "Weights":
        """The tensors under these name components, as in scope("layers", "0", "attn")."""
        return Weights(self._ledger, self._prefix + "".join(c + "." for c in components))

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds it; does not take it."""
        return self._prefix + name in self._ledger.source.tensors

    def tensor(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, shard: Shard | None = None
    ) -> Tensor:
        """Take one tensor, of exactly this whole shape and stored dtype; returns this rank's part.

        Raises:
            CheckpointError: missing, taken before, or of another shape or dtype.
        """
        wanted = tuple(shape)
        word = SAFETENSORS_DTYPES[dtype]
        self._take(name, wanted, (word,))
        tensor = self._stack([name], "", _part(wanted, shard), word)[0]
        self._count([name], tensor.nbytes)
        return tensor

    def matrix(
        self, name: str, out_features: int, in_features: int, shard: Shard | None = None
    ) -> Matrix:
        """Take `name`.weight and, where it is quantised, `name`.scale.

        Args:
            name: component(s) without `.weight`.
            out_features, in_features: of the whole matrix.
            shard: this rank's part; dim 0 cuts outputs, dim 1 inputs. FP4 inputs are cut at
                multiples of 32, FP8 anywhere.

        Raises:
            CheckpointError: missing, taken before, of another shape, or a format that is none of
                ours.
        """
        return self._matrices([name], (out_features, in_features), shard, stacked=False)

    def experts(
        self,
        names: Sequence[str],
        out_features: int,
        in_features: int,
        shard: Shard | None = None,
    ) -> Matrix:
        """Take the same matrix of every expert, stacked [experts, out, in]; all of one format.

        `shard` cuts the stack: dim 0 whole experts, dim 1 outputs, dim 2 inputs. Pass the names of
        ALL experts: those of other ranks are checked and counted as taken, but not read.
        """
        return self._matrices(names, (len(names), out_features, in_features), shard, stacked=True)

    def finish(self, ignored: Sequence[re.Pattern[str]] = ()) -> None:
        """The other half of the ledger: every tensor of the checkpoint must have been taken.

        Args:
            ignored: patterns of whole names that may be left over; what they match is logged once.

        Raises:
            CheckpointError: problems collected so far, or tensors that nothing took, by name.
        """
        ledger = self._ledger
        left = sorted(ledger.source.tensors.keys() - ledger.taken, key=natural_key)
        dropped = [name for name in left if not any(rule.fullmatch(name) for rule in ignored)]
        if dropped:
            ledger.problems.append(
                f"{len(dropped)} tensors of the checkpoint belong to no parameter: "
                + _listed(dropped)
            )
        if ledger.problems:
            raise CheckpointError(_listed(ledger.problems, "; "))
        if ledger.progress is not None:
            ledger.progress.close()
            if left:
                logger.info("ignored %d tensors: %s", len(left), _listed(left, limit=5))

    def _matrices(
        self, names: Sequence[str], shape: tuple[int, ...], shard: Shard | None, *, stacked: bool
    ) -> Matrix:
        """`shape` is [out, in], or [experts, out, in] when stacked."""
        formats = [self._take_matrix(name, shape[-2:]) for name in names]
        stored = next(
            (found for found in formats if found is not None), StoredFormat("plain", "BF16")
        )
        for name, found in zip(names, formats, strict=True):
            if found not in (stored, None):
                self._ledger.problem(
                    f"experts of one layer must have one format: {self._prefix}{names[0]} is "
                    f"{stored}, {self._prefix}{name} is {found}"
                )
        part = _part(shape, shard)
        rows, columns = part[-2:]
        if not stored.can_cut(columns):
            raise CheckpointError(
                f"{self._prefix}{names[0]}: FP4 inputs are cut at multiples of {FP4_GROUP}, "
                f"not at {columns.start} and {columns.stop}"
            )
        mine = names[part[0]] if stacked else names
        code_part, scale_part = stored.code_part(rows, columns), stored.scale_part(rows, columns)
        codes = self._stack(mine, ".weight", code_part, stored.dtype)
        scales: Tensor | None = None
        if stored.scale_dtype is not None:
            scales = self._stack(mine, ".scale", scale_part, stored.scale_dtype)
            if scales.dtype == torch.float8_e8m0fnu:
                scales = scales.view(torch.uint8)
        if not stacked:
            codes, scales = codes[0], scales[0] if scales is not None else None
        self._count(names, codes.nbytes + (scales.nbytes if scales is not None else 0))
        offset = stored.offset(rows, columns)
        out_features, in_features = rows.stop - rows.start, columns.stop - columns.start
        matrix = Matrix(stored.kind, codes, scales, out_features, in_features, offset)
        self._check_magnitude(names[0], matrix)
        return matrix

    def _take_matrix(self, name: str, shape: tuple[int, ...]) -> StoredFormat | None:
        """Enter a matrix's tensors into the ledger; its format, None where it is none of ours."""
        tensors = self._ledger.source.tensors
        whole = f"{self._prefix}{name}"
        weight, scale = tensors.get(f"{whole}.weight"), tensors.get(f"{whole}.scale")
        if weight is None:
            self._ledger.problem(f"tensor {whole}.weight is missing")
            self._ledger.taken.add(f"{whole}.scale")
            return None
        kind = _KINDS.get(weight.dtype)
        if kind is None or (kind == "fp4_group" and shape[1] % FP4_GROUP):
            self._ledger.taken |= {f"{whole}.weight", f"{whole}.scale"}
            self._ledger.problem(
                f"matrix {whole} {list(shape)} is {weight.dtype} {list(weight.shape)}; known are "
                "BF16, F16 and F32 without scale, F8_E4M3 with one scale per 128 x 128 block, and "
                "I8 (packed FP4) with one per 32 inputs"
            )
            return None
        found = scale.dtype if scale is not None else ""
        scale_dtype = found if found in _SCALE_DTYPES else _SCALE_DTYPES[0]
        stored = StoredFormat(kind, weight.dtype, None if kind == "plain" else scale_dtype)
        self._take(f"{name}.weight", stored.code_shape(*shape), (weight.dtype,))
        scale_shape = stored.scale_shape(*shape)
        if scale_shape is not None:
            self._take(f"{name}.scale", scale_shape, _SCALE_DTYPES)
        elif scale is not None:
            self._ledger.taken.add(f"{whole}.scale")
            self._ledger.problem(
                f"matrix {whole} is plain {weight.dtype} but has a scale {list(scale.shape)}"
            )
        return stored

    def _take(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        """Enter one tensor into the ledger; a problem where it is not as wanted."""
        whole = self._prefix + name
        tensor = self._ledger.source.tensors.get(whole)
        wanted = f"{' or '.join(dtypes)} {list(shape)}"
        if tensor is None:
            self._ledger.problem(f"tensor {whole} is missing (wanted {wanted})")
            return
        if whole in self._ledger.taken:
            raise AssertionError(f"tensor {whole} is taken twice")
        self._ledger.taken.add(whole)
        if tensor.shape != shape or tensor.dtype not in dtypes:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            self._ledger.problem(f"tensor {whole} is {found}, wanted {wanted}")

    def _stack(
        self,
        names: Sequence[str],
        suffix: str,
        part: tuple[slice, ...],
        dtype: str,
    ) -> Tensor:
        """The same part of several tensors that were taken, [names, ..part]."""
        shape = (len(names), *(cut.stop - cut.start for cut in part))
        stack = torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=self.device)
        if not self._ledger.is_dry:
            for name, out in zip(names, stack, strict=True):
                self._ledger.source.read(self._prefix + name + suffix, part, out)
        return stack

    def _count(self, names: Sequence[str], copied_bytes: int) -> None:
        """Tell the progress bar that these tensors (or matrices) are done."""
        if self._ledger.progress is not None:
            tensors = self._ledger.source.tensors
            whole = [self._prefix + name for name in names]
            found = [n + suffix for n in whole for suffix in _SUFFIXES if n + suffix in tensors]
            self._ledger.progress.add(sum(tensors[n].num_bytes for n in found), copied_bytes)

    def _check_magnitude(self, name: str, matrix: Matrix) -> None:
        """Non-zero is not correct: the largest value that the scales allow must be a weight's."""
        if matrix.scales is None or matrix.scales.is_meta or not matrix.codes.numel():
            return
        largest = scale_values(matrix.scales).max().item()
        largest *= FP8_MAX if matrix.kind == "fp8_block" else FP4_MAX
        low, high = _SANE_LARGEST
        # NaN scales compare false
        if not low <= largest <= high:
            raise CheckpointError(
                f"matrix {self._prefix}{name}: its scales allow magnitudes up to {largest:g}, "
                f"outside [{low:g}, {high:g}]: the scales are broken"
            )


def load_model(
    build: Callable[[Weights], Built],
    source: Source,
    device: torch.device | str,
    ignored: Sequence[re.Pattern[str]] = (),
) -> Built:
    """Build a model from a source: first on the meta device, so that one error lists every problem.

    Args:
        build: constructs the model from the weights, on `weights.device`.
        source: the checkpoint.
        device: where the parameters live.
        ignored: patterns of whole names that the model may leave.

    Raises:
        CheckpointError: names what is missing, of another shape or dtype, or left over.
    """
    ledger = Ledger(source, "meta")
    dry = Weights(ledger)
    try:
        build(dry)
    except CheckpointError as error:
        # a constructor may refuse what stands in for a tensor that is not as wanted: the cause
        # first
        raise CheckpointError(_listed([*ledger.problems, str(error)], "; ")) from error
    dry.finish(ignored)
    weights = Weights(Ledger(source, device))
    model = build(weights)
    weights.finish(ignored)
    return model


def _part(shape: tuple[int, ...], shard: Shard | None) -> tuple[slice, ...]:
    part = [slice(0, size) for size in shape]
    if shard is not None:
        part[shard.dim] = slice(*shard.bounds(shape[shard.dim]))
    return tuple(part)


def _listed(items: Sequence[str], separator: str = ", ", limit: int = 20) -> str:
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
