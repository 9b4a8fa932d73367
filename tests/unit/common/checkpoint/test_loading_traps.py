"""The known traps of loading: each test fails when its trap is stepped into again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scission.common.checkpoint.source import FileSource
from scission.common.checkpoint.weights import Shard, Weights, load_model
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.errors import CheckpointError
from tests.reference_checkpoint import dequantized_state, tiny_config
from tests.unit.common.checkpoint.small_checkpoints import (
    open_weights,
    random_fp4,
    random_fp8,
    take_everything,
    write_tensors,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_random_deepseek_v4(directory, tiny_config(), seed=1)
    return directory


def test_trap_3_dequantised_statistics_are_those_of_the_weights(checkpoint: Path) -> None:
    parameters = load_model(take_everything(tiny_config()), FileSource(checkpoint), "cpu")
    for name, value in parameters.items():
        if value.ndim == 2 and value.is_floating_point() and "embed" not in name:
            rms = value.float().square().mean().sqrt().item()
            columns = value.shape[1]
            assert 0.1 * columns**-0.5 < rms < 4 * columns**-0.5 or "ape" in name, (name, rms)


def test_trap_4_a_missing_tensor_and_a_dropped_one_are_both_named(tmp_path: Path) -> None:
    write_tensors(tmp_path, a__norm__weight=torch.ones(4), norm__weight=torch.ones(4))

    def build(weights: Weights) -> None:
        weights.scope("a").tensor("norm.weight", [4], torch.float32)
        weights.scope("b").tensor("norm.weight", [4], torch.float32)
        weights.matrix("head", 8, 4)

    with pytest.raises(CheckpointError) as raised:
        load_model(build, FileSource(tmp_path), "cpu")
    message = str(raised.value)
    assert "tensor b.norm.weight is missing (wanted F32 [4])" in message
    assert "tensor head.weight is missing" in message
    assert "1 tensors of the checkpoint belong to no parameter: norm.weight" in message


def test_trap_1_scale_bytes_are_kept_bit_for_bit(tmp_path: Path) -> None:
    codes, scales = random_fp8(300, 200)
    # 2 ** -8 and smaller, which a value cast to a byte turns into zero
    small = (scales.view(torch.uint8) - 8).view(torch.float8_e8m0fnu)
    write_tensors(tmp_path, w__weight=codes, w__scale=small)
    matrix = open_weights(tmp_path).matrix("w", 300, 200)
    assert matrix.scales is not None
    assert matrix.scales.dtype == torch.uint8
    assert torch.equal(matrix.scales, small.view(torch.uint8))
    assert torch.equal(matrix.codes.view(torch.uint8), codes.view(torch.uint8))
    assert matrix.dequantize(torch.float32).abs().max() > 0


def test_trap_2_codes_never_leave_without_their_scale(tmp_path: Path) -> None:
    codes, _ = random_fp8(128, 128)
    write_tensors(tmp_path, wo_a__weight=codes)
    with pytest.raises(CheckpointError, match=r"wo_a\.scale is missing"):
        open_weights(tmp_path).matrix("wo_a", 128, 128)
    with pytest.raises(CheckpointError, match=r"wo_a\.weight is F8_E4M3 .* wanted BF16"):
        open_weights(tmp_path).tensor("wo_a.weight", [128, 128], torch.bfloat16)


@pytest.mark.parametrize("byte", [0, 255, 200])
def test_trap_3_broken_scales_are_refused(tmp_path: Path, byte: int) -> None:
    codes, scales = random_fp8(128, 128)
    scales = torch.full_like(scales.view(torch.uint8), byte).view(torch.float8_e8m0fnu)
    write_tensors(tmp_path, w__weight=codes, w__scale=scales)
    with pytest.raises(CheckpointError, match="the scales are broken"):
        open_weights(tmp_path).matrix("w", 128, 128)


def test_trap_5_the_format_is_each_matrix_s_own(tmp_path: Path) -> None:
    # a config that says otherwise is not even read
    config = tiny_config(expert_dtype="fp8")
    write_random_deepseek_v4(tmp_path, config, seed=2, experts="fp4")
    names = [f"experts.{e}.w1" for e in range(8)]
    experts = open_weights(tmp_path).scope("layers", "0", "ffn").experts(names, 96, 160)
    assert experts.kind == "fp4_group"
    assert experts.codes.shape == (8, 96, 80)
    shared = open_weights(tmp_path).matrix("layers.0.ffn.shared_experts.w1", 96, 160)
    assert shared.kind == "fp8_block"


def test_fp8_experts_load_where_the_file_has_them(tmp_path: Path) -> None:
    config = tiny_config()
    write_random_deepseek_v4(tmp_path, config, seed=2, experts="fp8")
    names = [f"experts.{e}.w2" for e in range(8)]
    experts = open_weights(tmp_path).scope("layers", "3", "ffn").experts(names, 160, 96)
    assert experts.kind == "fp8_block"
    state = dequantized_state(tmp_path)
    expected = torch.stack([state[f"layers.3.ffn.{name}.weight"] for name in names])
    assert torch.equal(experts.dequantize(torch.float32), expected)


def test_experts_of_two_formats_are_refused(tmp_path: Path) -> None:
    w0, s0 = random_fp4(32, 64)
    w1, s1 = random_fp8(32, 64)
    write_tensors(tmp_path, e0__weight=w0, e0__scale=s0, e1__weight=w1, e1__scale=s1)
    with pytest.raises(CheckpointError, match=r"e0 is fp4_group .* e1 is fp8_block"):
        open_weights(tmp_path).experts(["e0", "e1"], 32, 64)


def test_trap_6_every_expert_has_its_own_scales(checkpoint: Path) -> None:
    names = [f"experts.{e}.w3" for e in range(8)]
    experts = open_weights(checkpoint).scope("layers", "4", "ffn").experts(names, 96, 160)
    assert experts.scales is not None
    shards = [load_file(file) for file in sorted(checkpoint.glob("*.safetensors"))]
    stored = {name: tensor for shard in shards for name, tensor in shard.items()}
    for e, name in enumerate(names):
        scale = stored[f"layers.4.ffn.{name}.scale"].view(torch.uint8)
        assert torch.equal(experts.scales[e], scale)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [([5], torch.float32), ([4, 1], torch.float32), ([4], torch.bfloat16)],
)
def test_trap_7_every_mismatch_is_fatal(
    tmp_path: Path, shape: list[int], dtype: torch.dtype
) -> None:
    write_tensors(tmp_path, w=torch.ones(4))
    with pytest.raises(CheckpointError, match=r"tensor w is F32 \[4\], wanted"):
        open_weights(tmp_path).tensor("w", shape, dtype)


def test_trap_7_a_scale_of_the_wrong_shape_is_fatal(tmp_path: Path) -> None:
    codes, scales = random_fp8(256, 256)
    write_tensors(tmp_path, w__weight=codes, w__scale=scales[:, :1].contiguous())
    with pytest.raises(CheckpointError, match=r"w\.scale is F8_E8M0 \[2, 1\], wanted .*\[2, 2\]"):
        open_weights(tmp_path).matrix("w", 256, 256)
    # packed FP4 with FP8's block scales is no format at all
    packed = torch.zeros(256, 128, dtype=torch.int8)
    write_tensors(tmp_path, w__weight=packed, w__scale=scales)
    with pytest.raises(CheckpointError, match=r"w\.scale is F8_E8M0 \[2, 2\], wanted .*\[256, 8\]"):
        open_weights(tmp_path).matrix("w", 256, 256)


def test_trap_8_codes_stay_plain_rows(tmp_path: Path) -> None:
    codes, scales = random_fp8(64, 96)
    write_tensors(tmp_path, wo_a__weight=codes, wo_a__scale=scales)
    matrix = open_weights(tmp_path).matrix("wo_a", 64, 96)
    assert matrix.codes.is_contiguous()
    # an einsum over the dequantised matrix, group by group, is the product by rows
    x = torch.randn(3, 2, 96)
    grouped = matrix.dequantize(torch.float32).view(2, 32, 96)
    y = torch.einsum("tgi,goi->tgo", x, grouped)
    plain = codes.to(torch.float32) * torch.exp2(scales.view(torch.uint8).float() - 127)[0, 0]
    torch.testing.assert_close(y[:, 1], x[:, 1] @ plain[32:].T)


def test_trap_9_one_shard_and_many_shards_load_the_same(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=1, compress_ratios=[4, 0])
    loaded = []
    for shards in (1, 5):
        directory = tmp_path / str(shards)
        write_random_deepseek_v4(directory, config, seed=3, shards=shards)
        assert len(list(directory.glob("*.safetensors"))) == shards
        loaded.append(load_model(take_everything(config), FileSource(directory), "cpu"))
    first, second = loaded
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_trap_9_a_folder_without_index_loads_the_same(checkpoint: Path, tmp_path: Path) -> None:
    merged: dict[str, Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        merged |= load_file(file)
    save_file(merged, tmp_path / "model.safetensors")
    whole = load_model(take_everything(tiny_config()), FileSource(tmp_path), "cpu")
    parts = load_model(take_everything(tiny_config()), FileSource(checkpoint), "cpu")
    assert all(torch.equal(whole[name], parts[name]) for name in parts)


def test_trap_10_bf16_wo_a_with_a_stale_scale_in_the_index_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stale = "layers.2.attn.wo_a.scale"
    write_random_deepseek_v4(
        tmp_path, tiny_config(), seed=4, wo_a="bf16", stale_index_names=[stale]
    )
    weights = open_weights(tmp_path)
    assert stale in caplog.text
    assert not weights.has(stale)
    matrix = weights.matrix("layers.2.attn.wo_a", 96, 128)
    assert (matrix.kind, matrix.scales) == ("plain", None)
    assert matrix.codes.dtype == torch.bfloat16


def test_a_plain_matrix_with_a_scale_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path, w__weight=torch.ones(4, 4), w__scale=torch.ones(1, 1))
    with pytest.raises(CheckpointError, match="plain F32 but has a scale"):
        open_weights(tmp_path).matrix("w", 4, 4)


@pytest.mark.parametrize(("rows", "columns"), [(160, 96), (257, 300), (1, 129), (200, 640)])
def test_trap_11_scale_blocks_are_128_whatever_the_shape(
    tmp_path: Path, rows: int, columns: int
) -> None:
    codes, scales = random_fp8(rows, columns)
    write_tensors(tmp_path, w__weight=codes, w__scale=scales)
    values = open_weights(tmp_path).matrix("w", rows, columns).dequantize(torch.float32)
    assert torch.equal(values, dequantized_state(tmp_path)["w.weight"])


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("kind", "rows", "columns", "align"),
    [
        ("fp8", 256, 384, 1),
        ("fp8", 200, 328, 1),
        ("fp8", 640, 320, 128),
        ("fp8", 7, 5, 1),
        ("fp4", 96, 256, 32),
        ("fp4", 40, 96, 32),
        ("plain", 33, 17, 1),
    ],
)
def test_trap_12_a_rank_s_cut_is_the_cut_of_the_dequantised_matrix(
    tmp_path: Path, kind: str, rows: int, columns: int, align: int, dim: int, count: int
) -> None:
    if kind == "plain":
        write_tensors(tmp_path, w__weight=torch.randn(rows, columns))
    else:
        codes, scales = random_fp8(rows, columns) if kind == "fp8" else random_fp4(rows, columns)
        write_tensors(tmp_path, w__weight=codes, w__scale=scales)
    whole = dequantized_state(tmp_path)["w.weight"]
    parts = []
    for index in range(count):
        shard = Shard(dim, index, count, align)
        matrix = open_weights(tmp_path).matrix("w", rows, columns, shard)
        start, stop = shard.bounds((rows, columns)[dim])
        part = matrix.dequantize(torch.float32)
        assert (matrix.out_features, matrix.in_features) == part.shape
        assert torch.equal(part, whole.narrow(dim, start, stop - start))
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim), whole)


def test_trap_12_trailing_ranks_without_a_block_multiply_to_zero(tmp_path: Path) -> None:
    codes, scales = random_fp8(160, 64)
    write_tensors(tmp_path, w__weight=codes, w__scale=scales)
    matrix = open_weights(tmp_path).matrix("w", 160, 64, Shard(0, 3, 4, align=128))
    assert matrix.codes.shape == (0, 64)
    assert matrix.scales is not None and matrix.scales.shape == (0, 1)
    write_tensors(tmp_path, w__weight=codes[:, :32].contiguous(), w__scale=scales)
    matrix = open_weights(tmp_path).matrix("w", 160, 32, Shard(1, 1, 2, align=128))
    y = torch.randn(3, 0) @ matrix.dequantize(torch.float32).T
    assert y.shape == (3, 160)
    assert not y.any()


def test_fp4_inputs_are_cut_at_whole_groups_only(tmp_path: Path) -> None:
    codes, scales = random_fp4(8, 96)
    write_tensors(tmp_path, w__weight=codes, w__scale=scales)
    with pytest.raises(CheckpointError, match="multiples of 32, not at 0 and 48"):
        open_weights(tmp_path).matrix("w", 8, 96, Shard(1, 0, 2))


def test_trap_13_hash_layers_have_no_router_bias_and_that_is_no_error(checkpoint: Path) -> None:
    weights = open_weights(checkpoint)
    for layer in range(6):
        gate = weights.scope("layers", str(layer), "ffn", "gate")
        assert gate.has("bias") == (layer >= 2)
        assert gate.has("tid2eid") == (layer < 2)
