"""Checkpoints of a few tensors, and ways to read them, for the tests beside this file."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scission.common.checkpoint.deepseek_v4 import tensor_table
from scission.common.checkpoint.source import FileSource
from scission.common.checkpoint.weights import Ledger, Weights
from scission.common.checkpoint.write_deepseek_v4 import write_shards
from scission.kernels.quant import quantize_block_fp8, quantize_group_fp4


def open_weights(directory: Path, device: str = "cpu") -> Weights:
    return Weights(Ledger(FileSource(directory), device))


def write_tensors(directory: Path, **tensors: Tensor) -> Path:
    """A checkpoint of one shard; `__` in a keyword stands for a dot."""
    write_shards(directory, {name.replace("__", "."): t for name, t in tensors.items()})
    return directory


def random_fp8(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    # blocks of very different magnitude, so that a wrong scale shows
    values *= torch.exp2(torch.arange(rows) // 128)[:, None]
    values *= torch.exp2(-2.0 * (torch.arange(columns) // 128))
    codes, scales = quantize_block_fp8(values)
    return codes, scales.view(torch.float8_e8m0fnu)


def random_fp4(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize_group_fp4(values * torch.exp2(torch.arange(rows) % 5)[:, None])
    return codes, scales.view(torch.float8_e8m0fnu)


def take_everything(config: dict[str, object]) -> Callable[[Weights], dict[str, Tensor]]:
    """Stands in for a model's constructor: takes each parameter of the table, dequantised."""
    table = tensor_table(config)

    def build(weights: Weights) -> dict[str, Tensor]:
        parameters = {}
        for name, spec in table.items():
            stem = name.removesuffix(".weight")
            if name.endswith(".scale"):
                continue
            if spec.dtype in ("I8", "F8_E4M3"):
                columns = spec.shape[1] * (2 if spec.dtype == "I8" else 1)
                matrix = weights.matrix(stem, spec.shape[0], columns)
                parameters[name] = matrix.dequantize(torch.float32)
            else:
                dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
                parameters[name] = weights.tensor(name, spec.shape, dtypes[spec.dtype])
        return parameters

    return build
