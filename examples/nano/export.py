# ruff: noqa: T201
"""Writes trained parameters as a checkpoint in DeepSeek-V4's published format.

python -m examples.nano.export /tmp/nano common/nano
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.nano.data.rows import nano_tokenizer
from examples.nano.network import Parameters, initial_parameters
from examples.nano.shape import CONFIG, ENCODING
from examples.nano.tokenizer import to_json
from scission.common.checkpoint.byte_tokenizer import tokenizer_config
from scission.common.checkpoint.deepseek_v4 import tensor_table
from scission.common.checkpoint.write_deepseek_v4 import write_json, write_shards
from scission.kernels.quant import (
    dequantize_block_fp8,
    dequantize_group_fp4,
    quantize_block_fp8,
    quantize_group_fp4,
)

# names of a layer's tensors in the checkpoint, and the stack whose row each is
_ATTENTION = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "q_norm", "kv_norm")
PAD_ID = 2
_HYPER = ("fn", "base", "scale")


def checkpoint_tensors(p: Parameters, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Values by the checkpoint's names, before rounding."""
    # a conversation's start is never said: it is as unlikely as padding, which training never asks
    head = p["head"].clone()
    head[config["bos_token_id"]] = head[PAD_ID]
    tensors = {"embed.weight": p["embed"], "head.weight": head, "norm.weight": p["norm"]}
    ratios, layers = config["compress_ratios"], config["num_hidden_layers"]
    for name in _HYPER:
        tensors[f"hc_head_{name}"] = p[f"hc_head_{name}"][0]
        tensors[f"mtp.0.hc_head_{name}"] = p[f"hc_head_{name}"][1]
    for name in ("e_proj", "h_proj", "enorm", "hnorm"):
        tensors[f"mtp.0.{name}.weight"] = p[name][0]
    tensors["mtp.0.norm.weight"] = p["mtp_norm"][0]
    for layer, ratio in enumerate(ratios):
        prefix = f"layers.{layer}." if layer < layers else f"mtp.{layer - layers}."
        for part in ("attn", "ffn"):
            tensors[f"{prefix}{part}_norm.weight"] = p[f"{part}_norm"][layer]
            for name in _HYPER:
                tensors[f"{prefix}hc_{part}_{name}"] = p[f"hc_{part}_{name}"][layer]
        for name in _ATTENTION:
            tensors[f"{prefix}attn.{name}.weight"] = p[name][layer]
        tensors[f"{prefix}attn.attn_sink"] = p["attn_sink"][layer]
        stage = ratios[:layer].count(ratio)
        kinds = {
            4: {"csa": "compressor", "index": "indexer.compressor"},
            128: {"hca": "compressor"},
        }
        for kind, owner in kinds.get(ratio, {}).items():
            for name in ("wkv", "wgate", "norm"):
                tensors[f"{prefix}attn.{owner}.{name}.weight"] = p[f"{kind}_{name}"][stage]
            tensors[f"{prefix}attn.{owner}.ape"] = p[f"{kind}_ape"][stage]
        if ratio == 4:
            for name in ("wq_b", "weights_proj"):
                tensors[f"{prefix}attn.indexer.{name}.weight"] = p[f"index_{name}"][stage]
        ffn = f"{prefix}ffn."
        tensors[f"{ffn}gate.weight"] = p["gate"][layer]
        if layer < config["num_hash_layers"]:
            tensors[f"{ffn}gate.tid2eid"] = p["tid2eid"][layer]
        else:
            tensors[f"{ffn}gate.bias"] = p["gate_bias"][layer]
        for name in ("w1", "w2", "w3"):
            tensors[f"{ffn}shared_experts.{name}.weight"] = p[f"shared_{name}"][layer]
            for expert in range(config["n_routed_experts"]):
                tensors[f"{ffn}experts.{expert}.{name}.weight"] = p[name][layer, expert]
    return tensors


def stored_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the files hold: every tensor of the table in its format.

    Raises:
        KeyError: a tensor of the table is missing.
    """
    result: dict[str, Tensor] = {}
    table = tensor_table(config)
    for name, spec in table.items():
        match spec.dtype:
            case "I8" | "F8_E4M3":
                quantize = quantize_group_fp4 if spec.dtype == "I8" else quantize_block_fp8
                codes, scales = quantize(tensors[name].float())
                result[name] = codes
                result[name.removesuffix(".weight") + ".scale"] = scales.view(torch.float8_e8m0fnu)
            case "F8_E8M0":
                continue
            case "BF16":
                result[name] = tensors[name].to(torch.bfloat16)
            case "I64":
                result[name] = tensors[name].long()
            case _:
                result[name] = tensors[name].float()
    assert result.keys() == table.keys()
    wrong = {name for name, spec in table.items() if tuple(result[name].shape) != spec.shape}
    assert not wrong, f"shapes differ from the table: {sorted(wrong)}"
    return result


def read_checkpoint(directory: Path, config: Mapping[str, Any] = CONFIG) -> Parameters:
    """The parameters that a checkpoint stores, as its formats round them."""
    p = initial_parameters(config, torch.Generator())
    stored: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= load_file(file)
    # all but the head are views of the parameters
    for name, w in checkpoint_tensors(p, config).items():
        values, scale = stored[name], stored.get(name.removesuffix(".weight") + ".scale")
        if scale is not None:
            is_fp4 = values.dtype == torch.int8
            values = (dequantize_group_fp4 if is_fp4 else dequantize_block_fp8)(values, scale)
        (p["head"] if name == "head.weight" else w).copy_(values)
    return p


def write_checkpoint(directory: Path, p: Parameters, config: Mapping[str, Any] = CONFIG) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(directory, stored_tensors(checkpoint_tensors(p, config), config))
    write_json(directory / "config.json", config)
    # greedy where a request says nothing: what it is good at has one right answer
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    write_json(
        directory / "generation_config.json",
        {**generation, "do_sample": False, "temperature": 0.0, "top_p": 1.0},
    )
    tokenizer = nano_tokenizer()
    (directory / "tokenizer.json").write_text(to_json(tokenizer), encoding="utf-8")
    described = tokenizer_config(config["max_position_embeddings"])
    write_json(directory / "tokenizer_config.json", described)
    (directory / "encoding").mkdir(exist_ok=True)
    shutil.copyfile(ENCODING, directory / "encoding" / "encoding_dsv4.py")


def read_parameters(folder: Path) -> Parameters:
    """The parts that training left in a folder, as one."""
    p: Parameters = {}
    for part in sorted(folder.glob("weights-*.pt")):
        p |= torch.load(part, map_location="cpu", weights_only=True)
    if not p:
        raise SystemExit(f"{folder} holds no weights-*.pt")
    return p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path, help="the folder that training wrote")
    parser.add_argument("checkpoint", type=Path, help="the folder to write")
    options = parser.parse_args()
    write_checkpoint(options.checkpoint, read_parameters(options.trained))
    size = sum(file.stat().st_size for file in options.checkpoint.rglob("*") if file.is_file())
    print(f"{options.checkpoint}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
