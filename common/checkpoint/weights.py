"""A checkpoint as the model's constructors see it: they pull tensors by name, a ledger counts both
ways.

Every tensor is taken exactly once (`finish` names those that were not), with exactly the shape and
dtype that was asked for. The format of a matrix is decided from its own dtype and its scale's
shape, never from the config, and never from the ratio of the two shapes.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from scission.common.checkpoint.progress import LoadProgress
from scission.common.checkpoint.source import (
    SAFETENSORS_DTYPES,
    TORCH_DTYPES,
    Source,
    natural_key,
)
from scission.common.errors import CheckpointError
from scission.kernels.quant import (
    FP4_GROUP,
    FP4_MAX,
    FP8_BLOCK,
    FP8_MAX,
    dequantize_block_fp8,
    dequantize_group_fp4,
    scale_values,
)

logger = logging.getLogger(__name__)

Built = TypeVar("Built")
MatrixKind = Literal["plain", "fp8_block", "fp4_group"]

_PLAIN_DTYPES = ("BF16", "F32", "F16")
_SCALE_DTYPES = ("F8_E8M0", "F32", "BF16")
# what any trained or sensibly random matrix stays within; codes without their scales do not
_SANE_LARGEST = (2.0**-40, 2.0**14)


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a dimension: contiguous, `count` equal parts of whole units of `align`.

    The last part may be shorter, and trailing ranks may hold nothing where there are fewer units
    than ranks; an empty matrix multiplies to zeros, as it must.
    """

    dim: int
    index: int
    count: int
    align: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.index < self.count and self.align > 0 and self.dim >= 0, self

    def bounds(self, size: int) -> tuple[int, int]:
        """[start, stop) of this rank's part of a dimension of `size`."""
        num_units = -(-size // self.align)
        units_each = -(-num_units // self.count)
        start = min(self.index * units_each * self.align, size)
        return start, min((self.index + 1) * units_each * self.align, size)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [.., out, in] in its stored format, with its scales; a leading dim counts experts.

    fp8_block: codes [.., out, in] float8_e4m3fn, one scale per 128 x 128 block of the WHOLE matrix;
    `offset` is where codes[0, 0] lies in the first block held. fp4_group: codes [.., out, in / 2]
    int8, scales [.., out, in / 32]. ue8m0 scales are their bytes (uint8). plain: codes are the
    values.
    """

    kind: MatrixKind
    codes: Tensor
    scales: Tensor | None
    out_features: int
    in_features: int
    offset: tuple[int, int] = (0, 0)

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + (self.scales.nbytes if self.scales is not None else 0)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values, [.., out, in] of `dtype` (exact in bfloat16 and float32)."""
        match self.kind:
            case "plain":
                return self.codes.to(dtype)
            case "fp8_block":
                assert self.scales is not None
                return dequantize_block_fp8(self.codes, self.scales, self.offset).to(dtype)
            case "fp4_group":
                assert self.scales is not None
                return dequantize_group_fp4(self.codes, self.scales).to(dtype)


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
        if not self._take(name, wanted, (SAFETENSORS_DTYPES[dtype],)):
            return torch.empty(_cut(wanted, shard), dtype=dtype, device=self.device)
        return self._read(name, _part(wanted, shard))

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
        """Take the same matrix of every expert, stacked [experts, out, in]; all must have one
        format.

        `shard` cuts the stack: dim 0 whole experts, dim 1 outputs, dim 2 inputs. Pass the names of
        ALL
        experts: those of other ranks are checked and counted as taken, but not read.
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
        kind, dtype, scale_dtype = next((f for f in formats if f is not None), _MISSING)
        for name, found in zip(names, formats, strict=True):
            if found is not None and found != (kind, dtype, scale_dtype):
                self._ledger.problem(
                    "experts of one layer must have one format: "
                    f"{self._prefix}{names[0]} is {kind} ({dtype}, scales {scale_dtype}), "
                    f"{self._prefix}{name} is {found[0]} ({found[1]}, scales {found[2]})"
                )
        part = _part(shape, shard)
        rows, columns = part[-2:]
        mine = names[part[0]] if stacked else names
        leading = (len(mine),) if stacked else ()
        local = (rows.stop - rows.start, columns.stop - columns.start)
        code_part: tuple[slice, ...] = (rows, columns)
        scale_part: tuple[slice, ...] | None = None
        offset = (0, 0)
        if kind == "fp8_block":
            scale_part = (_blocks(rows), _blocks(columns))
            offset = (rows.start % FP8_BLOCK, columns.start % FP8_BLOCK)
        elif kind == "fp4_group":
            if columns.start % FP4_GROUP or (local[1] and columns.stop % FP4_GROUP):
                raise CheckpointError(
                    f"{self._prefix}{names[0]}: FP4 inputs are cut at multiples of {FP4_GROUP}, "
                    f"not at {columns.start} and {columns.stop}"
                )
            code_part = (rows, slice(columns.start // 2, columns.stop // 2))
            scale_part = (rows, slice(columns.start // FP4_GROUP, columns.stop // FP4_GROUP))
        codes = self._allocate(leading, code_part, dtype)
        scales = self._allocate(leading, scale_part, scale_dtype) if scale_part else None
        if all(found is not None for found in formats):
            for i, name in enumerate(mine):
                self._fill(name + ".weight", code_part, codes[i] if stacked else codes)
                if scales is not None and scale_part is not None:
                    self._fill(name + ".scale", scale_part, scales[i] if stacked else scales)
            self._count(names)
        if scales is not None and scales.dtype == torch.float8_e8m0fnu:
            scales = scales.view(torch.uint8)
        matrix = Matrix(kind, codes, scales, local[0], local[1], offset)
        self._check_magnitude(names[0], matrix)
        return matrix

    def _take_matrix(self, name: str, shape: tuple[int, ...]) -> "_Format | None":
        """Take a matrix's tensors; (kind, code dtype, scale dtype), or None after a problem."""
        tensors = self._ledger.source.tensors
        whole = f"{self._prefix}{name}"
        weight, scale = tensors.get(f"{whole}.weight"), tensors.get(f"{whole}.scale")
        if weight is None:
            self._ledger.problem(f"tensor {whole}.weight is missing")
            if scale is not None:
                self._ledger.taken.add(f"{whole}.scale")
            return None
        out_features, in_features = shape
        scale_shape: tuple[int, ...] | None = None
        kind: MatrixKind
        if weight.dtype in _PLAIN_DTYPES:
            kind, code_shape = "plain", (out_features, in_features)
        elif weight.dtype == "F8_E4M3":
            kind, code_shape = "fp8_block", (out_features, in_features)
            scale_shape = (-(-out_features // FP8_BLOCK), -(-in_features // FP8_BLOCK))
        elif weight.dtype == "I8" and in_features % FP4_GROUP == 0:
            kind, code_shape = "fp4_group", (out_features, in_features // 2)
            scale_shape = (out_features, in_features // FP4_GROUP)
        else:
            self._ledger.taken.update({f"{whole}.weight", f"{whole}.scale"} & tensors.keys())
            self._ledger.problem(
                f"matrix {whole} [{out_features}, {in_features}] is {weight.dtype} "
                f"{list(weight.shape)}; known are BF16, F16 and F32 without scale, F8_E4M3 with "
                "one scale per 128 x 128 block, and I8 (packed FP4) with one per 32 inputs"
            )
            return None
        ok = self._take(f"{name}.weight", code_shape, (weight.dtype,))
        if scale_shape is not None:
            ok = self._take(f"{name}.scale", scale_shape, _SCALE_DTYPES) and ok
        elif scale is not None:
            self._ledger.taken.add(f"{whole}.scale")
            self._ledger.problem(
                f"matrix {whole} is plain {weight.dtype} but has a scale {list(scale.shape)}"
            )
            ok = False
        if not ok:
            return None
        return kind, weight.dtype, scale.dtype if scale is not None else ""

    def _take(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> bool:
        """Enter one tensor into the ledger; False (or an error) where it is not as wanted."""
        whole = self._prefix + name
        tensor = self._ledger.source.tensors.get(whole)
        wanted = f"{' or '.join(dtypes)} {list(shape)}"
        if tensor is None:
            self._ledger.problem(f"tensor {whole} is missing (wanted {wanted})")
            return False
        if whole in self._ledger.taken:
            raise AssertionError(f"tensor {whole} is taken twice")
        self._ledger.taken.add(whole)
        if tensor.shape != shape or tensor.dtype not in dtypes:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            self._ledger.problem(f"tensor {whole} is {found}, wanted {wanted}")
            return False
        return True

    def _read(self, name: str, part: tuple[slice, ...]) -> Tensor:
        whole = self._prefix + name
        tensor = self._allocate((), part, self._ledger.source.tensors[whole].dtype)
        self._fill(name, part, tensor)
        if self._ledger.progress is not None:
            on_disk = self._ledger.source.tensors[whole].num_bytes
            self._ledger.progress.add(on_disk, tensor.nbytes)
        return tensor

    def _allocate(self, leading: tuple[int, ...], part: tuple[slice, ...], dtype: str) -> Tensor:
        shape = (*leading, *(cut.stop - cut.start for cut in part))
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=self.device)

    def _fill(self, name: str, part: tuple[slice, ...], out: Tensor) -> None:
        if not self._ledger.is_dry:
            self._ledger.source.read(self._prefix + name, part, out)

    def _count(self, names: Sequence[str]) -> None:
        progress = self._ledger.progress
        if progress is None:
            return
        for name in names:
            for suffix in (".weight", ".scale"):
                tensor = self._ledger.source.tensors.get(self._prefix + name + suffix)
                if tensor is not None:
                    progress.add(tensor.num_bytes, tensor.num_bytes)

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


_Format = tuple[MatrixKind, str, str]
_MISSING: _Format = ("plain", "BF16", "")


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
    dry = Weights(Ledger(source, "meta"))
    build(dry)
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


def _cut(shape: tuple[int, ...], shard: Shard | None) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in _part(shape, shard))


def _blocks(part: slice) -> slice:
    """The scale blocks that a cut of a blocked dimension touches; none for an empty cut."""
    if part.start == part.stop:
        return slice(0, 0)
    return slice(part.start // FP8_BLOCK, -(-part.stop // FP8_BLOCK))


def _listed(items: Sequence[str], separator: str = ", ", limit: int = 20) -> str:
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more
