"""What `inspect` says of the published models, of broken ones and of other ones."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from scission.common.checkpoint.deepseek_v4 import tensor_table
from scission.common.checkpoint.headers import TensorHeader
from scission.common.checkpoint.inspect import Inspection, inspect_checkpoint, inspect_headers
from scission.common.checkpoint.print_inspection import inspection_json, print_inspection
from scission.common.checkpoint.write_deepseek_v4 import (
    write_json,
    write_random_deepseek_v4,
    write_shards,
)
from scission.common.errors import CheckpointError
from tests.reference_checkpoint import published_config, tiny_config


def _published(model: str) -> Inspection:
    config = published_config(model)
    headers = {
        name: TensorHeader(spec.dtype, spec.shape, Path("model.safetensors"), 0)
        for name, spec in tensor_table(config).items()
    }
    return inspect_headers(Path(model), config, headers)


def test_the_published_flash_is_described() -> None:
    inspection = _published("flash")
    assert inspection.problems == ()
    assert inspection.num_tensors == 69187
    rows = {row.group: row for row in inspection.formats if row.format.startswith("FP4")}
    assert round(rows["routed experts"].num_parameters / 1e9, 1) == 277.0
    assert inspection.layers["CSA (one entry per 4 tokens, indexed)"] == 21
    assert inspection.layers["HCA (one entry per 128 tokens)"] == 20
    # 21 layers of 512 + 128 channels per 4 tokens, 20 of 512 per 128, in bf16
    assert inspection.states[0].bytes_per_token == 6880
    fits = {fit.device: fit.num_devices for fit in inspection.fits}
    assert fits["NVIDIA H200"] == 2
    assert fits["AMD MI355X (gfx950)"] == 1


def test_formats_and_bytes_add_up_to_the_whole(tmp_path: Path) -> None:
    write_random_deepseek_v4(tmp_path, tiny_config(), seed=1, shards=2, wo_a="bf16")
    inspection = inspect_checkpoint(tmp_path)
    assert inspection.problems == ()
    assert inspection.num_shards == 2
    assert sum(row.num_bytes for row in inspection.formats) == inspection.num_bytes
    formats = {(row.group, row.format): row.num_tensors for row in inspection.formats}
    assert formats[("routed experts", "FP4 e2m1, ue8m0 scale per 1x32")] == 6 * 8 * 3
    assert formats[("attention", "BF16")] == 6


def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path: Path) -> None:
    config = tiny_config()
    extra = {"layers.0.attn.bias": torch.zeros(1)}
    write_random_deepseek_v4(tmp_path, config, seed=1, extra_tensors=extra)
    write_json(tmp_path / "config.json", config | {"q_lora_rank": 64, "num_hash_layers": 3})
    problems = inspect_checkpoint(tmp_path).problems
    assert "1 tensors are missing: layers.2.ffn.gate.tid2eid" in problems
    assert problems[1] == "2 tensors are unknown: layers.0.attn.bias, layers.2.ffn.gate.bias"
    assert "are not as the config says: layers.0.attn.wq_a.weight is F8_E4M3 [96" in problems[2]


def test_a_config_of_ours_that_cannot_be_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    config = tiny_config()
    write_random_deepseek_v4(tmp_path, config, seed=1)
    write_json(tmp_path / "config.json", config | {"scoring_func": "softmax"})
    (problem,) = inspect_checkpoint(tmp_path).problems
    assert "scoring_func" in problem


def test_another_model_is_described_but_not_served(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.zeros(8, 4, dtype=torch.float8_e4m3fn),
        "model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1),
        "model.embed_tokens.weight": torch.zeros(16, 4, dtype=torch.bfloat16),
    }
    write_shards(tmp_path, tensors)
    write_json(tmp_path / "config.json", {"architectures": ["Other"], "model_type": "other"})
    inspection = inspect_checkpoint(tmp_path)
    (problem,) = inspection.problems
    assert "'Other'; served are DeepseekV4ForCausalLM" in problem
    assert [(row.group, row.format) for row in inspection.formats] == [
        ("embedding and head", "BF16"),
        ("feed-forward", "FP8 e4m3, F32 scale per 128x128"),
    ]
    assert inspection.fits == ()


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        inspect_checkpoint(tmp_path)


def test_it_prints_for_eyes_and_for_programs() -> None:
    inspection = _published("pro")
    out = StringIO()
    print_inspection(inspection, Console(file=out, width=140))
    assert "FP4 e2m1" in out.getvalue()
    assert "cannot be served" not in out.getvalue()
    read = json.loads(inspection_json(inspection))
    assert read["num_tensors"] == 145116
    assert read["states"][0]["handoff_bytes"].keys() == {"1024", "8192", "131072", "1048576"}
