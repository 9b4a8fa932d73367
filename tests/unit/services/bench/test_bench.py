"""The engine benchmarks: what they count as the floor, and that the commands run and report."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from scission.common.checkpoint.deepseek_v4 import tensor_table
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.errors import ConfigError
from scission.common.layers.numerics import Numerics
from scission.common.model.architecture import BLOCK_SIZE
from scission.common.model.config import parse_config
from scission.common.model.deepseek_v4_state import cache_layout
from scission.common.model.registry import find_architecture
from scission.services.bench.decode import command as bench_decode
from scission.services.bench.floor import (
    DeviceRates,
    Operations,
    decode_bytes,
    prefill_operations,
)
from scission.services.bench.prefill import command as bench_prefill
from scission.services.bench.shape import shape_of
from scission.services.bench.subject import cut_layers
from tests.published_dense import MINISTRAL3_8B, QWEN3_8B, STEP3P5_FLASH
from tests.reference_checkpoint import published_config, tiny_config


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_random_deepseek_v4(folder, tiny_config(), seed=11, shards=1)
    return folder


def bytes_of(raw: dict[str, object], batch: int, context: int) -> float:
    config = parse_config(raw)
    layout = cache_layout(config, Numerics(torch.bfloat16, rounds=True))
    return decode_bytes(tensor_table(raw), layout, shape_of(raw), batch, context)


def test_a_step_of_one_token_reads_the_experts_it_picks_and_no_draft_layer() -> None:
    raw = tiny_config()
    tensors = tensor_table(raw)
    rest = sum(
        t.num_bytes
        for name, t in tensors.items()
        if not name.startswith("mtp.")
        and ".ffn.experts." not in name
        and name != "embed.weight"
        and not name.endswith(".tid2eid")
    )
    experts = sum(
        t.num_bytes
        for name, t in tensors.items()
        if ".ffn.experts." in name and not name.startswith("mtp.")
    )
    row = tensors["embed.weight"].num_bytes / 320
    hashed = 2 * 3 * 8  # layers, experts a token, bytes of an id
    expected = rest + experts * 3 / 8 + row + hashed
    assert math.isclose(bytes_of(raw, 1, 0), expected)


def test_a_large_batch_reads_every_expert_once() -> None:
    raw = published_config("flash")
    stored = sum(t.num_bytes for n, t in tensor_table(raw).items() if not n.startswith("mtp."))
    assert 0.9 * stored < bytes_of(raw, 4096, 0) < 1.01 * stored


def test_the_longer_the_context_the_more_state_is_read() -> None:
    raw = published_config("flash")
    assert bytes_of(raw, 1, 1024) < bytes_of(raw, 1, 8192) < bytes_of(raw, 2, 8192)


def test_operations_are_twice_the_parameters_that_a_token_meets() -> None:
    raw = published_config("flash")
    operations = prefill_operations(tensor_table(raw), shape_of(raw), 1024)
    # 13e9 active parameters, by the publisher
    per_token = (operations.quantised + operations.other) / 1024
    assert 0.8 * 2 * 13e9 < per_token < 1.3 * 2 * 13e9


def dense_bytes(raw: dict[str, Any], batch: int, context: int) -> float:
    architecture = find_architecture(raw)
    numerics = Numerics(torch.bfloat16, rounds=True)
    layout = architecture.layout(architecture.parse(raw), numerics, BLOCK_SIZE)
    return decode_bytes(architecture.table(raw, {}), layout, shape_of(raw), batch, context)


def test_a_dense_step_reads_all_weights_but_the_table_and_every_key_and_value() -> None:
    stored = sum(t.num_bytes for t in find_architecture(QWEN3_8B).table(QWEN3_8B, {}).values())
    table = 151936 * 4096 * 2
    row = 4096 * 2
    assert dense_bytes(QWEN3_8B, 3, 0) == stored - table + 3 * row
    # K and V of 8 heads of 128 channels in bf16, in 36 layers
    per_token = 2 * 8 * 128 * 2 * 36
    assert dense_bytes(QWEN3_8B, 3, 1024) - dense_bytes(QWEN3_8B, 3, 0) == 3 * 1024 * per_token


def test_a_tied_table_is_read_whole() -> None:
    tied = {**QWEN3_8B, "tie_word_embeddings": True}
    stored = sum(t.num_bytes for t in find_architecture(tied).table(tied, {}).values())
    assert dense_bytes(tied, 1, 0) == stored


def test_sliding_layers_read_a_window_and_experts_are_picked() -> None:
    whole = dense_bytes(STEP3P5_FLASH, 1, 0)
    # 12 of 45 layers keep all tokens, the others 511: K and V of 8 heads of 128 channels in bf16
    per_row = 2 * 8 * 128 * 2
    assert dense_bytes(STEP3P5_FLASH, 1, 4096) - whole == per_row * (12 * 4096 + 33 * 511)
    stored = sum(
        t.num_bytes for t in find_architecture(STEP3P5_FLASH).table(STEP3P5_FLASH, {}).values()
    )
    assert 0.04 * stored < whole < 0.1 * stored
    assert dense_bytes(STEP3P5_FLASH, 4096, 0) > 0.98 * stored


@pytest.mark.parametrize(
    ("config", "active"),
    [(QWEN3_8B, 7.0e9), (MINISTRAL3_8B, 7.9e9), (STEP3P5_FLASH, 11e9)],
    ids=lambda given: given["model_type"] if isinstance(given, dict) else "",
)
def test_a_dense_token_costs_twice_its_parameters(config: dict[str, Any], active: float) -> None:
    table = find_architecture(config).table(config, {})
    operations = prefill_operations(table, shape_of(config), 64)
    assert 0.9 * 2 * active < (operations.quantised + operations.other) / 64 < 1.15 * 2 * active


def test_operations_take_the_time_of_their_own_rate() -> None:
    rates = DeviceRates(copy_bytes_per_s=1.0, bf16_flops_per_s=10.0, fp8_flops_per_s=20.0)
    assert Operations(quantised=40.0, other=10.0).seconds(rates) == 3.0


def test_a_cut_model_keeps_its_first_layers() -> None:
    cut = cut_layers(published_config("flash"), 5)
    config = parse_config(cut)
    assert config.num_hidden_layers == 5
    assert config.layer_ratios == (0, 0, 4, 128, 4)
    assert config.num_nextn_predict_layers == 0
    with pytest.raises(ConfigError, match="the model has 43"):
        cut_layers(published_config("flash"), 44)


@pytest.mark.parametrize(
    "config", [QWEN3_8B, MINISTRAL3_8B, STEP3P5_FLASH], ids=lambda config: config["model_type"]
)
def test_dense_models_are_cut_to_their_first_layers(config: dict[str, Any]) -> None:
    cut = cut_layers(config, 5)
    architecture = find_architecture(cut)
    table = architecture.table(cut, {})
    assert {int(n.split("layers.")[1].split(".")[0]) for n in table if "layers." in n} == set(
        range(5)
    )
    with pytest.raises(ConfigError, match="--layers is 100"):
        cut_layers(config, 100)


def test_decode_reports_times_and_no_floor_on_a_cpu(checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = [str(checkpoint), "--device=cpu", "--batch=1,3", "--context=20", "--steps=4"]
    result = CliRunner().invoke(bench_decode, [*arguments, f"--json={report}"])
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    assert [row["batch"] for row in written["results"]] == [1, 3]
    for row in written["results"]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert math.isclose(row["tokens_per_s"], 1000 * row["batch"] / row["median_ms"])
        assert "floor_ms" not in row
    assert written["rates"] is None and written["model"]["layers"] == 6


def test_prefill_cuts_the_layers_of_dummy_weights(checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = [str(checkpoint), "--device=cpu", "--load-format=dummy", "--layers=3"]
    arguments += ["--prompt-tokens=40,150", "--chunk-tokens=64", "--repeats=2"]
    result = CliRunner().invoke(bench_prefill, [*arguments, f"--json={report}"])
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    assert written["model"]["layers"] == 3
    assert [row["prompt_tokens"] for row in written["results"]] == [40, 150]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers=3"], "--layers needs --load-format dummy"),
        (["--layers=9", "--load-format=dummy"], "the model has 6"),
        (["--batch=1,x"], "positive integers such as 1,8,32"),
        (["--batch=0"], "positive integers such as 1,8,32"),
    ],
)
def test_wrong_flags_end_with_a_sentence(
    checkpoint: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(bench_decode, [str(checkpoint), "--device=cpu", *arguments])
    assert result.exit_code != 0
    assert message in result.output
