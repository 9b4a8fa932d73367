"""Where a checkpoint's tensors come from: safetensors shards, mapped into memory."""

import hashlib
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from scission.common.checkpoint.headers import TensorHeader, read_headers
from scission.common.errors import CheckpointError

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_SAMPLE_BYTES = 64


class TensorDescription(Protocol):
    """What is known of a tensor without reading it."""

    @property
    def dtype(self) -> str:
        """Safetensors' word for it, such as BF16."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def num_bytes(self) -> int: ...


class Source(Protocol):
    """A set of named tensors that can be read in part, byte for byte."""

    @property
    def tensors(self) -> Mapping[str, TensorDescription]: ...

    def read(self, name: str, part: tuple[slice, ...], out: Tensor) -> None:
        """Fill `out` with tensor[part]; same shape and dtype as that part, on any device."""

    def revision(self) -> str:
        """A hash of the weights: equal names, dtypes and shapes with other values differ."""


class FileSource:
    """The safetensors shards of a folder, mapped into memory; each read copies once.

    Mapped pages are the page cache's: reading a slice touches only its pages, and nothing is held
    twice.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._headers = read_headers(directory)
        self._bytes: dict[Path, Tensor] = {}

    @property
    def tensors(self) -> Mapping[str, TensorHeader]:
        return self._headers

    def read(self, name: str, part: tuple[slice, ...], out: Tensor) -> None:
        mapped = self._mapped(name)[part]
        if out.dtype != mapped.dtype or out.shape != mapped.shape:
            wanted = f"{mapped.dtype} {list(mapped.shape)}"
            raise AssertionError(f"{name}: {wanted} into {out.dtype} {list(out.shape)}")
        if out.element_size() == 1:
            # codes and scales are bytes: nothing may convert them
            out.view(torch.uint8).copy_(mapped.view(torch.uint8))
        else:
            out.copy_(mapped)

    def revision(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self._headers):
            header = self._headers[name]
            digest.update(f"{name}\0{header.dtype}\0{header.shape}\0".encode())
            content = self._file_bytes(header.file)[header.start : header.start + header.num_bytes]
            middle = header.num_bytes // 2
            for start in (0, middle):
                digest.update(content[start : start + _SAMPLE_BYTES].numpy().tobytes())
        return digest.hexdigest()

    def _mapped(self, name: str) -> Tensor:
        header = self._headers[name]
        if header.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"tensor {name} has dtype {header.dtype}, unknown to torch")
        dtype = TORCH_DTYPES[header.dtype]
        content = self._file_bytes(header.file)[header.start : header.start + header.num_bytes]
        # the format does not promise that a tensor starts at a multiple of its element size
        if header.start % dtype.itemsize:
            content = content.clone()
        return content.view(dtype).view(header.shape)

    def _file_bytes(self, file: Path) -> Tensor:
        if file not in self._bytes:
            with file.open("rb") as stream:
                # private and writable only so that torch takes the buffer; nothing writes to it
                mapped = mmap.mmap(
                    stream.fileno(),
                    0,
                    flags=mmap.MAP_PRIVATE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            self._bytes[file] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._bytes[file]


def weights_revision(directory: Path) -> str:
    """Hex hash over every tensor's name, dtype, shape and a fixed sample of its bytes."""
    return FileSource(directory).revision()


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", name)]
