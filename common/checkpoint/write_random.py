"""Writes random checkpoints of any dense architecture in its published layout, for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scission.common.checkpoint.byte_tokenizer import tokenizer_config, tokenizer_json
from scission.common.checkpoint.dummy import seed_of
from scission.common.checkpoint.source import TORCH_DTYPES
from scission.common.checkpoint.table import TensorSpec, is_scale
from scission.common.checkpoint.write_deepseek_v4 import write_json, write_shards
from scission.common.model.registry import find_architecture
from scission.kernels.quant import FP8_BLOCK, FP8_MAX

_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_random_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    seed: int,
    *,
    shards: int = 3,
    table: Mapping[str, TensorSpec] | None = None,
    extra_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a whole random model: weights, index, configs, tokenizer and a chat template.

    The same arguments give the same bytes. Scales come after all other tensors, so that with
    several shards some are in another one than their weight.

    Args:
        directory: made if it does not exist.
        config: the fields of config.json.
        seed: every tensor has a generator of its own, seeded by this and its name.
        shards: number of safetensors files, each a run of whole tensors.
        table: the tensors and their formats; None: those of the config.
        extra_tensors: written besides those of the table, such as a vision tower's.

    Raises:
        CheckpointError: a config that is none of ours.
    """
    architecture = find_architecture(config)
    table = table or architecture.table(config, {})
    weights: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, spec in table.items():
        if is_scale(name):
            continue
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        values = architecture.random_values(name, spec.shape, config, generator)
        stem = name.removesuffix(".weight")
        scale = table.get(f"{stem}.weight_scale_inv")
        if scale is None:
            weights[name] = values.to(TORCH_DTYPES[spec.dtype])
            continue
        weights[name], scales[f"{stem}.weight_scale_inv"] = _quantize(values, scale)
        inputs = table.get(f"{stem}.activation_scale")
        if inputs is not None:
            drawn = torch.rand(inputs.shape, generator=generator).add_(0.5).mul_(4 / FP8_MAX)
            scales[f"{stem}.activation_scale"] = drawn.to(TORCH_DTYPES[inputs.dtype])
    tensors = weights | scales
    assert tensors.keys() == table.keys()
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(directory, tensors | dict(extra_tensors or {}), shards)
    write_json(directory / "config.json", config)
    text = config.get("text_config", config)
    write_json(
        directory / "generation_config.json",
        {name: text[name] for name in ("bos_token_id", "eos_token_id")},
    )
    (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    described = tokenizer_config(text["max_position_embeddings"])
    write_json(directory / "tokenizer_config.json", described)
    (directory / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")


def _quantize(values: Tensor, scale: TensorSpec) -> tuple[Tensor, Tensor]:
    """e4m3 codes of values [.., out, in] and their scales as described: one, or one per block."""
    dtype = TORCH_DTYPES[scale.dtype]
    if scale.shape in ((), (1,)):
        scales = (values.abs().amax() / FP8_MAX).to(dtype).reshape(scale.shape)
        spread = scales.float()
    else:
        blocks = scale.shape[-2:]
        scales = torch.empty(scale.shape, dtype=dtype)
        for i in range(blocks[0]):
            for j in range(blocks[1]):
                block = values[
                    ...,
                    i * FP8_BLOCK : (i + 1) * FP8_BLOCK,
                    j * FP8_BLOCK : (j + 1) * FP8_BLOCK,
                ]
                scales[..., i, j] = (block.abs().amax((-2, -1)) / FP8_MAX).to(dtype)
        spread = scales.float().repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)
        spread = spread[..., : values.shape[-2], : values.shape[-1]]
    codes = (values / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes, scales
