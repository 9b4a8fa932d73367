"""Writes random DeepSeek-V4 checkpoints in the published layout: for tests, and as the bundled
model.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from scission.common.checkpoint.byte_tokenizer import (
    build_tokenizer,
    tokenizer_config,
    tokenizer_json,
)
from scission.common.checkpoint.deepseek_v4 import (
    MatrixFormat,
    random_values,
    tensor_table,
)
from scission.common.checkpoint.dummy import seed_of
from scission.common.checkpoint.headers import INDEX_NAME
from scission.common.checkpoint.table import TensorSpec
from scission.common.errors import CheckpointError
from scission.kernels.quant import quantize_block_fp8, quantize_group_fp4

_ENCODING = Path(__file__).parent / "bundled_encoding.py"

Adjust = Callable[[str, Tensor], Tensor]


def write_random_deepseek_v4(
    directory: Path,
    config: Mapping[str, Any],
    seed: int,
    *,
    shards: int = 3,
    experts: MatrixFormat | None = None,
    wo_a: MatrixFormat = "fp8",
    extra_tensors: Mapping[str, Tensor] | None = None,
    stale_index_names: Sequence[str] = (),
    adjust: Adjust | None = None,
) -> None:
    """Write a whole random model: weights, index, configs, tokenizer and the texts of its chats.

    The same arguments give the same bytes.

    Args:
        directory: made if it does not exist.
        config: the fields of config.json.
        seed: every tensor has a generator of its own, seeded by this and its name.
        shards: number of safetensors files, each a run of whole tensors.
        experts: format of the routed experts; None: what `expert_dtype` says, else fp4.
        wo_a: fp8, or bf16 without a scale, as some re-releases have it.
        extra_tensors: written besides those of the table, such as a further MTP stage.
        stale_index_names: named by the index although no shard holds them.
        adjust: (name, values) -> values, called before quantisation.

    Raises:
        CheckpointError: a config without a field, or with fewer tokens than the tokenizer has.
    """
    table = tensor_table(config, experts=experts, wo_a=wo_a)
    tensors: dict[str, Tensor] = {}
    for name, spec in table.items():
        if not name.endswith(".scale"):
            tensors |= _random_tensors(name, spec, config, seed, adjust)
    assert tensors.keys() == table.keys()
    tensors |= extra_tensors or {}
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(directory, tensors, shards, stale_index_names)
    write_json(directory / "config.json", config)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    write_json(directory / "generation_config.json", generation)
    _write_chat_files(directory, config)


def write_shards(
    directory: Path,
    tensors: Mapping[str, Tensor],
    shards: int = 1,
    stale_index_names: Sequence[str] = (),
) -> None:
    """Write tensors as model-XXXXX-of-YYYYY.safetensors and their index."""
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    written_bytes = 0
    for name, tensor in tensors.items():
        parts[min(shards * written_bytes // max(total_bytes, 1), shards - 1)][name] = tensor
        written_bytes += tensor.nbytes
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: t.contiguous() for name, t in part.items()}, directory / file)
        # safetensors makes files for their owner alone; a checkpoint may be read by another user
        (directory / file).chmod(0o644)
        weight_map |= dict.fromkeys(part, file)
    weight_map |= dict.fromkeys(stale_index_names, next(iter(weight_map.values())))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(directory / INDEX_NAME, index)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_chat_files(directory: Path, config: Mapping[str, Any]) -> None:
    """The byte-level tokenizer, and the texts of chats with tools and effort."""
    num_tokens = build_tokenizer().get_vocab_size()
    if num_tokens > config["vocab_size"]:
        raise CheckpointError(
            f"vocab_size is {config['vocab_size']}; the tokenizer has {num_tokens} tokens"
        )
    (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    described = tokenizer_config(config["max_position_embeddings"])
    write_json(directory / "tokenizer_config.json", described)
    (directory / "encoding").mkdir(exist_ok=True)
    shutil.copyfile(_ENCODING, directory / "encoding" / "encoding_dsv4.py")


def _random_tensors(
    name: str, spec: TensorSpec, config: Mapping[str, Any], seed: int, adjust: Adjust | None
) -> dict[str, Tensor]:
    """One tensor of the table, with its scale where it is quantised."""
    is_fp4 = spec.dtype == "I8"
    shape = (*spec.shape[:-1], spec.shape[-1] * 2) if is_fp4 else spec.shape
    generator = torch.Generator().manual_seed(seed_of(seed, name))
    values = random_values(name, shape, config, generator)
    if adjust is not None:
        values = adjust(name, values)
    match spec.dtype:
        case "I64" | "F32":
            return {name: values}
        case "BF16":
            return {name: values.to(torch.bfloat16)}
    codes, scales = quantize_group_fp4(values) if is_fp4 else quantize_block_fp8(values)
    scale_name = re.sub(r"\.weight$", ".scale", name)
    return {name: codes, scale_name: scales.view(torch.float8_e8m0fnu)}
