"""What the shards of a checkpoint folder say they hold, read from their headers alone.

The headers are the truth. The index only names the shards: an index entry without a tensor in its
shard is stale and is logged, not believed. Needs no torch.
"""

import json
import logging
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scission.common.errors import CheckpointError

logger = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
# the safetensors format's own bound
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as its file describes it; `dtype` is safetensors' word, a key of DTYPE_BYTES."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int  # byte offset in the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Every tensor of a checkpoint folder by name.

    Raises:
        CheckpointError: no safetensors, a shard missing, cut short or not safetensors, or a tensor
            twice.
    """
    headers: dict[str, TensorHeader] = {}
    index = _read_index(directory)
    for file in _shards(directory, index):
        for name, header in _read_file_header(file).items():
            if name in headers:
                first = headers[name].file.name
                raise CheckpointError(f"tensor {name} is in two shards: {first} and {file.name}")
            headers[name] = header
    stale = sorted(index.keys() - headers.keys())
    if stale:
        logger.warning(
            "%s names %d tensors that no shard holds (%s); the shards are believed",
            INDEX_NAME,
            len(stale),
            ", ".join(stale[:5]) + (", ..." if len(stale) > 5 else ""),
        )
    return headers


def read_json(file: Path) -> dict[str, object]:
    """A JSON object from a checkpoint folder.

    Raises:
        CheckpointError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def _read_index(directory: Path) -> Mapping[str, str]:
    """The index's tensor -> shard map; empty when the folder has no index."""
    file = directory / INDEX_NAME
    if not file.exists():
        return {}
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file} has no weight_map")
    for name, shard in weight_map.items():
        # a name with a path in it would read outside the folder
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{file} puts {name} into {shard!r}, which is no file name")
    return weight_map


def _shards(directory: Path, index: Mapping[str, str]) -> list[Path]:
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint folder at {directory}")
    if index:
        files = [directory / name for name in sorted(set(index.values()))]
    elif (directory / SINGLE_NAME).exists():
        files = [directory / SINGLE_NAME]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no *.safetensors files")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of the {len(files)} shards that its index names: "
            + ", ".join(missing[:20])
        )
    return files


def _read_file_header(file: Path) -> dict[str, TensorHeader]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file} is no safetensors file, or is cut short ({size} bytes)")
        try:
            described = json.loads(stream.read(header_bytes))
            described.pop("__metadata__", None)
            headers = {
                name: _parse_entry(file, entry, 8 + header_bytes)
                for name, entry in described.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} has a broken safetensors header: {error!r}") from error
    for name, header in headers.items():
        if header.start + header.num_bytes > size:
            end = header.start + header.num_bytes
            raise CheckpointError(f"{file} is cut short: {name} ends at byte {end} of {size}")
    return headers


def _parse_entry(file: Path, entry: Mapping[str, object], data_start: int) -> TensorHeader:
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not (isinstance(shape, list) and isinstance(offsets, list)):
        raise ValueError(f"shape {shape!r}, data_offsets {offsets!r}")
    begin, end = (int(offset) for offset in offsets)
    dtype = str(entry["dtype"])
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype}")
    header = TensorHeader(dtype, tuple(int(n) for n in shape), file, data_start + begin)
    if min(header.shape, default=0) < 0 or begin < 0 or end - begin != header.num_bytes:
        raise ValueError(f"{dtype} {shape} does not fill bytes {begin} to {end}")
    return header
