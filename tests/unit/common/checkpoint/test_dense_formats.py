"""The formats of the dense checkpoints: scales by existence, never by ratio; nothing dropped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scission.common.checkpoint.source import FileSource
from scission.common.checkpoint.table import TensorSpec
from scission.common.checkpoint.weights import Ledger, Shard, Weights, load_model
from scission.common.checkpoint.write_random import write_random_checkpoint
from scission.common.errors import CheckpointError
from scission.common.layers.numerics import Numerics
from scission.common.model.architecture import Model
from scission.common.model.registry import find_architecture
from scission.common.parallel.ranks import Ranks
from tests.dense_checkpoints import (
    dequantized_state,
    ministral3_config,
    qwen3_config,
    step3p5_config,
    vision_decoys,
)
from tests.unit.common.checkpoint.small_checkpoints import open_weights, write_tensors

CODES = torch.arange(-96, 96, dtype=torch.float32).view(1, -1).repeat(3, 1).to(torch.float8_e4m3fn)


def _build(directory: Path, config: dict[str, Any]) -> Model:
    architecture = find_architecture(config)
    parsed = architecture.parse(config)
    numerics = Numerics(torch.float32, rounds=False)
    return load_model(
        lambda w: architecture.build(w, parsed, Ranks(), numerics, 128),
        FileSource(directory),
        "cpu",
        architecture.ignored(parsed),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_of_the_whole_tensor_multiplies(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    scale = torch.full(shape, 0.0123).to(dtype)
    write_tensors(tmp_path, a__weight=CODES, a__weight_scale_inv=scale)
    matrix = open_weights(tmp_path).matrix("a", 3, 192)
    assert matrix.kind == "fp8_tensor"
    assert torch.equal(matrix.dequantize(torch.float32), CODES.float() * scale.float())


def test_one_scale_of_a_tensor_is_that_of_every_block(tmp_path: Path) -> None:
    write_tensors(tmp_path, a__weight=CODES, a__weight_scale_inv=torch.tensor(0.3))
    matrix = open_weights(tmp_path).matrix("a", 3, 192)
    blocks = matrix.by_block()
    assert blocks.kind == "fp8_block" and blocks.by_block() is blocks
    assert torch.equal(blocks.dequantize(torch.float32), matrix.dequantize(torch.float32))


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "scale"])
def test_blocks_are_128_wide_whatever_the_ratio_of_the_shapes(tmp_path: Path, name: str) -> None:
    """192 columns by 2 scales are 128 + 64, not 96 + 96."""
    scales = torch.tensor([[0.5, 0.125]])
    write_tensors(tmp_path, **{"a__weight": CODES, f"a__{name}": scales})
    values = open_weights(tmp_path).matrix("a", 3, 192).dequantize(torch.float32)
    widths = torch.tensor([0.5] * 128 + [0.125] * 64)
    assert torch.equal(values, CODES.float() * widths)


@pytest.mark.parametrize("name", ["activation_scale", "input_scale"])
def test_a_static_scale_of_inputs_is_taken_and_kept(tmp_path: Path, name: str) -> None:
    scales = {"a__weight_scale_inv": torch.tensor(0.5), f"a__{name}": torch.tensor(0.25)}
    write_tensors(tmp_path, a__weight=CODES, **scales)
    weights = open_weights(tmp_path)
    matrix = weights.matrix("a", 3, 192)
    weights.finish()
    assert matrix.input_scale == 0.25


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_a_broken_scale_of_inputs_is_refused(tmp_path: Path, value: float) -> None:
    scales = {"a__weight_scale_inv": torch.tensor(0.5), "a__activation_scale": torch.tensor(value)}
    write_tensors(tmp_path, a__weight=CODES, **scales)
    with pytest.raises(CheckpointError, match="matrix a: its inputs' scale is"):
        open_weights(tmp_path).matrix("a", 3, 192)


def test_codes_without_a_scale_name_the_scale_as_the_checkpoint_would(tmp_path: Path) -> None:
    write_tensors(
        tmp_path, a__weight=CODES, b__weight=CODES.clone(), b__weight_scale_inv=torch.ones(1, 2)
    )
    with pytest.raises(CheckpointError, match=r"tensor a\.weight_scale_inv is missing"):
        open_weights(tmp_path).matrix("a", 3, 192)


def test_a_scale_of_a_plain_matrix_is_refused(tmp_path: Path) -> None:
    plain = torch.ones(3, 4, dtype=torch.bfloat16)
    write_tensors(tmp_path, a__weight=plain, a__weight_scale_inv=torch.ones(1, 1))
    with pytest.raises(CheckpointError, match="plain BF16 but has a scale"):
        open_weights(tmp_path).matrix("a", 3, 4)


@pytest.mark.parametrize(
    "shard",
    [None, Shard(0, 1, 2), Shard(1, 1, 3, 128), Shard(1, 2, 3, 100), Shard(2, 1, 2, 128)],
    ids=["whole", "experts", "blocks of rows", "rows inside a block", "blocks of columns"],
)
def test_flat_experts_are_cut_with_their_scales(tmp_path: Path, shard: Shard | None) -> None:
    codes = torch.randn(4, 300, 192).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 3, 2) + 0.5
    write_tensors(tmp_path, a__weight=codes, a__weight_scale_inv=scales)
    matrix = open_weights(tmp_path).flat_experts("a", 4, 300, 192, shard)
    whole = _spread(scales, 300, 192) * codes.float()
    part = [slice(None)] * 3
    if shard is not None:
        part[shard.dim] = slice(*shard.bounds(whole.shape[shard.dim]))
    assert torch.equal(matrix.dequantize(torch.float32), whole[tuple(part)])


def test_scales_may_lie_in_another_shard_than_their_weight(tmp_path: Path) -> None:
    config = qwen3_config(num_hidden_layers=1)
    write_random_checkpoint(tmp_path, config, seed=1, shards=4)
    source = FileSource(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    files = {source.tensors[f"{name}.{part}"].file for part in ("weight", "weight_scale_inv")}
    assert len(files) == 2
    values = Weights(Ledger(source, "cpu")).matrix(name, 384, 160).dequantize(torch.float32)
    assert torch.equal(values, dequantized_state(tmp_path)[f"{name}.weight"])


def test_what_is_no_number_in_the_vision_tower_is_never_read(tmp_path: Path) -> None:
    config = ministral3_config(num_hidden_layers=1)
    write_random_checkpoint(tmp_path, config, seed=1, extra_tensors=vision_decoys())
    read: list[str] = []
    source = FileSource(tmp_path)
    take = source.read

    def remember(name: str, part: tuple[slice, ...], out: Tensor) -> None:
        read.append(name)
        take(name, part, out)

    source.read = remember  # type: ignore[method-assign]
    architecture = find_architecture(config)
    parsed = architecture.parse(config)
    numerics = Numerics(torch.float32, rounds=False)
    load_model(
        lambda w: architecture.build(w, parsed, Ranks(), numerics, 128),
        source,
        "cpu",
        architecture.ignored(parsed),
    )
    assert read and not any("vision" in name or "projector" in name for name in read)


def test_layers_behind_the_last_are_skipped_and_others_are_not(tmp_path: Path) -> None:
    config = step3p5_config()
    extra = {"model.layers.5.enorm.weight": torch.ones(160, dtype=torch.bfloat16)}
    write_random_checkpoint(tmp_path, config, seed=1, extra_tensors=extra)
    _build(tmp_path, config)
    unknown = {"model.layers.4.enorm.weight": torch.ones(160, dtype=torch.bfloat16)}
    write_random_checkpoint(tmp_path, config, seed=1, extra_tensors=unknown)
    with pytest.raises(CheckpointError, match=r"belong to no parameter: model\.layers\.4\.enorm"):
        _build(tmp_path, config)


def test_a_model_without_any_scale_is_plain(tmp_path: Path) -> None:
    config = qwen3_config(num_hidden_layers=1)
    del config["quantization_config"]
    write_random_checkpoint(tmp_path, config, seed=1)
    source = FileSource(tmp_path)
    assert {tensor.dtype for tensor in source.tensors.values()} == {"BF16"}
    _build(tmp_path, config)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_scales_of_either_dtype_are_read(tmp_path: Path, dtype: str) -> None:
    config = qwen3_config(num_hidden_layers=1)
    table = {
        name: TensorSpec(dtype, spec.shape) if name.endswith("_inv") else spec
        for name, spec in find_architecture(config).table(config, {}).items()
    }
    write_random_checkpoint(tmp_path, config, seed=1, table=table)
    _build(tmp_path, config)


def test_a_sink_that_is_asked_for_and_missing_is_an_error(tmp_path: Path) -> None:
    config = step3p5_config(sink=True)
    write_random_checkpoint(tmp_path / "off", config, seed=1)
    _build(tmp_path / "off", config)
    write_random_checkpoint(tmp_path / "on", config | {"sink": 1}, seed=1)
    _build(tmp_path / "on", config | {"sink": 1})
    with pytest.raises(CheckpointError, match=r"self_attn\.sinks is missing"):
        _build(tmp_path / "off", config | {"sink": 1})


def _spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    wide = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)
    return wide[..., :rows, :columns]
