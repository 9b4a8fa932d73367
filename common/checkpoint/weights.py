"""A checkpoint as the model's constructors see it: they pull tensors by name, a ledger counts both
ways.

Every tensor is taken exactly once (`finish` names those that were not), with exactly the shape and
dtype that was asked for. The format of a matrix is decided from its own dtype and its scale's
shape, never from the config, and never from the ratio of the two shapes.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
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
# the names that authors give to the scale of NAME.weight, and to that of its inputs
_SCALE_NAMES = ("scale", "weight_scale_inv", "weight_scale")
_INPUT_SCALE_NAMES = ("activation_scale", "input_scale")
_SUFFIXES = ("", ".weight", *(f".{name}" for name in (*_SCALE_NAMES, *_INPUT_SCALE_NAMES)))
_SCALE_DTYPES = ("F8_E8M0", "F32", "BF16")
_TENSOR_SCALE_DTYPES = ("F32", "BF16")
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

    @cached_property
    def scale_name(self) -> str:
        """What this checkpoint calls scales; matters only where one is missing."""
        names = {name.rpartition(".")[2] for name in self.source.tensors}
        return next((name for name in _SCALE_NAMES if name in names), _SCALE_NAMES[0])

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

    @property
    def names(self) -> Collection[str]:
        """Of every tensor of the checkpoint, whatever this scope is."""
        return self._ledger.source.tensors.keys()

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds it; does not take it."""
        return self._prefix + name in self._ledger.source.tensors

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        shard: Shard | None = None,
        *,
        or_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Take one tensor, of exactly this whole shape and stored dtype; returns this rank's part.

        Args:
            or_dtype: another dtype that it may be stored in, and is returned in.

        Raises:
            CheckpointError: missing, taken before, or of another shape or dtype.
        """
        wanted = tuple(shape)
        words = tuple(SAFETENSORS_DTYPES[d] for d in (dtype, or_dtype) if d is not None)
        self._take(name, wanted, words)
        found = self._ledger.source.tensors.get(self._prefix + name)
        word = found.dtype if found is not None and found.dtype in words else words[0]
        tensor = self._stack([name], "", _part(wanted, shard), word)[0]
        self._count([name], tensor.nbytes)
        return tensor

    def matrix(
        self, name: str, out_features: int, in_features: int, shard: Shard | None = None
    ) -> Matrix:
        """Take `name`.weight and, where it is quantised, its scales.

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

    def flat_experts(
        self,
        name: str,
        num_experts: int,
        out_features: int,
        in_features: int,
        shard: Shard | None = None,
    ) -> Matrix:
        """Take the same matrix of every expert, stored as one tensor [experts, out, in].

        `shard` cuts as in `experts`; only this rank's part is read.
        """
        shape = (num_experts, out_features, in_features)
        return self._matrices([name], shape, shard, stacked=False)

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
        """`shape` is [out, in], or [experts, out, in]; stacked: of one matrix an expert."""
        leading = () if stacked else shape[:-2]
        formats = [self._take_matrix(name, leading, shape[-2:]) for name in names]
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
        outer = () if stacked else part[:-2]
        codes = self._stack(
            mine, ".weight", (*outer, *stored.code_part(rows, columns)), stored.dtype
        )
        scales = self._scales(mine, stored, (*outer, *stored.scale_part(rows, columns)))
        input_scale: Tensor | None = None
        if stored.input_scale_dtype is not None and len(names) == 1:
            scale_dtype = stored.input_scale_dtype
            input_scale = self._scalars(names, stored.input_scale_name, scale_dtype)[0].float()
        if not stacked:
            codes, scales = codes[0], scales[0] if scales is not None else None
        self._count(names, codes.nbytes + (scales.nbytes if scales is not None else 0))
        offset = stored.offset(rows, columns)
        out_features, in_features = rows.stop - rows.start, columns.stop - columns.start
        matrix = Matrix(stored.kind, codes, scales, out_features, in_features, offset, input_scale)
        self._check_magnitude(names[0], matrix)
        return matrix

    def _scales(
        self, names: Sequence[str], stored: StoredFormat, part: tuple[slice, ...]
    ) -> Tensor | None:
        """The scales of matrices that were taken, [names, ..part]; ue8m0 as bytes."""
        if stored.scale_dtype is None:
            return None
        if stored.kind == "fp8_tensor":
            return self._scalars(names, stored.scale_name, stored.scale_dtype)
        scales = self._stack(names, f".{stored.scale_name}", part, stored.scale_dtype)
        return scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales

    def _scalars(self, names: Sequence[str], scale_name: str, dtype: str) -> Tensor:
        """Scalars that were taken, stored as [] or [1]: [names]."""
        tensor = self._ledger.source.tensors.get(f"{self._prefix}{names[0]}.{scale_name}")
        part = (slice(0, 1),) if tensor is not None and tensor.shape == (1,) else ()
        return self._stack(names, f".{scale_name}", part, dtype).view(len(names))

    def _take_matrix(
        self, name: str, leading: tuple[int, ...], shape: tuple[int, ...]
    ) -> StoredFormat | None:
        """Enter a matrix's tensors into the ledger; its format, None where it is none of ours.

        Args:
            leading: dims before [out, in] that the tensor itself has.
        """
        tensors = self._ledger.source.tensors
        whole = f"{self._prefix}{name}"
        weight = tensors.get(f"{whole}.weight")
        scale_name = next(
            (n for n in _SCALE_NAMES if f"{whole}.{n}" in tensors), self._ledger.scale_name
        )
        scale = tensors.get(f"{whole}.{scale_name}")
        if weight is None:
            self._ledger.problem(f"tensor {whole}.weight is missing")
            self._ledger.taken.add(f"{whole}.{scale_name}")
            return None
        kind = _KINDS.get(weight.dtype)
        if kind is None or (kind == "fp4_group" and shape[1] % FP4_GROUP):
            self._ledger.taken |= {f"{whole}.weight", f"{whole}.{scale_name}"}
            self._ledger.problem(
                f"matrix {whole} {list(shape)} is {weight.dtype} {list(weight.shape)}; known are "
                "BF16, F16 and F32 without scale, F8_E4M3 with one scale per 128 x 128 block or "
                "per tensor, and I8 (packed FP4) with one per 32 inputs"
            )
            return None
        # blocks have a dimension each, a scale of the whole tensor has none (or is a list of one)
        if kind == "fp8_block" and scale is not None and scale.shape in ((), (1,)):
            kind = "fp8_tensor"
        allowed = _TENSOR_SCALE_DTYPES if kind == "fp8_tensor" else _SCALE_DTYPES
        found = scale.dtype if scale is not None else ""
        scale_dtype = found if found in allowed else allowed[0]
        input_scale_name = self._take_input_scale(name) if kind == "fp8_tensor" else ""
        stored = StoredFormat(
            kind,
            weight.dtype,
            None if kind == "plain" else scale_dtype,
            scale_name,
            tensors[f"{whole}.{input_scale_name}"].dtype if input_scale_name else None,
            input_scale_name,
        )
        self._take(f"{name}.weight", (*leading, *stored.code_shape(*shape)), (weight.dtype,))
        scale_shape = stored.scale_shape(*shape)
        if scale_shape is not None:
            wanted = (*leading, *scale_shape)
            if kind == "fp8_tensor" and scale is not None:
                wanted = scale.shape
            self._take(f"{name}.{scale_name}", wanted, allowed)
        elif scale is not None:
            self._ledger.taken.add(f"{whole}.{scale_name}")
            self._ledger.problem(
                f"matrix {whole} is plain {weight.dtype} but has a scale {list(scale.shape)}"
            )
        return stored

    def _take_input_scale(self, name: str) -> str:
        """Enter the static scale of a matrix's inputs into the ledger; its name, "" for none."""
        tensors = self._ledger.source.tensors
        for scale_name in _INPUT_SCALE_NAMES:
            scale = tensors.get(f"{self._prefix}{name}.{scale_name}")
            if scale is not None:
                shape = scale.shape if scale.shape == (1,) else ()
                self._take(f"{name}.{scale_name}", shape, _TENSOR_SCALE_DTYPES)
                return scale_name if scale.dtype in _TENSOR_SCALE_DTYPES else ""
        return ""

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
        largest *= FP4_MAX if matrix.kind == "fp4_group" else FP8_MAX
        low, high = _SANE_LARGEST
        # NaN scales compare false
        if not low <= largest <= high:
            raise CheckpointError(
                f"matrix {self._prefix}{name}: its scales allow magnitudes up to {largest:g}, "
                f"outside [{low:g}, {high:g}]: the scales are broken"
            )
        if matrix.input_scale is not None:
            scale = matrix.input_scale.item()
            if not 0 < scale < float("inf"):
                raise CheckpointError(
                    f"matrix {self._prefix}{name}: its inputs' scale is {scale:g}, not positive"
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
