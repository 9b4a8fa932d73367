"""Reading a checkpoint: both ways, whole and in shards, and the known traps of loading."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from scission.common.checkpoint import deepseek_v4
from scission.common.checkpoint.headers import INDEX_NAME, read_headers
from scission.common.checkpoint.source import FileSource, weights_revision
from scission.common.checkpoint.weights import Ledger, Matrix, Shard, Weights, load_model
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4, write_shards
from scission.common.errors import CheckpointError
from scission.kernels.quant import quantize_block_fp8, quantize_group_fp4
from tests.reference_checkpoint import dequantized_state, tiny_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_random_deepseek_v4(directory, tiny_config(), seed=1)
    return directory


def _weights(directory: Path, device: str = "cpu") -> Weights:
    return Weights(Ledger(FileSource(directory), device))


def _write(directory: Path, **tensors: Tensor) -> Path:
    """A checkpoint of one shard; `__` in a keyword stands for a dot."""
    write_shards(directory, {name.replace("__", "."): t for name, t in tensors.items()})
    return directory


def _fp8(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    # blocks of very different magnitude, so that a wrong scale shows
    values *= torch.exp2(torch.arange(rows) // 128)[:, None]
    values *= torch.exp2(-2.0 * (torch.arange(columns) // 128))
    codes, scales = quantize_block_fp8(values)
    return codes, scales.view(torch.float8_e8m0fnu)


def _fp4(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize_group_fp4(values * torch.exp2(torch.arange(rows) % 5)[:, None])
    return codes, scales.view(torch.float8_e8m0fnu)


def _take_everything(config: dict[str, object]) -> Callable[[Weights], dict[str, Tensor]]:
    """Stands in for a model's constructor: takes each parameter of the table, dequantised."""
    table = deepseek_v4.tensor_table(config)

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


def test_every_parameter_equals_its_dequantised_value(checkpoint: Path) -> None:
    parameters = load_model(_take_everything(tiny_config()), FileSource(checkpoint), "cpu")
    expected = dequantized_state(checkpoint)
    assert parameters.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(parameters[name].to(value.dtype), value), name


def test_trap_3_dequantised_statistics_are_those_of_the_weights(checkpoint: Path) -> None:
    parameters = load_model(_take_everything(tiny_config()), FileSource(checkpoint), "cpu")
    for name, value in parameters.items():
        if value.ndim == 2 and value.is_floating_point() and "embed" not in name:
            rms = value.float().square().mean().sqrt().item()
            columns = value.shape[1]
            assert 0.1 * columns**-0.5 < rms < 4 * columns**-0.5 or "ape" in name, (name, rms)


def test_trap_4_a_missing_tensor_and_a_dropped_one_are_both_named(tmp_path: Path) -> None:
    _write(tmp_path, a__norm__weight=torch.ones(4), norm__weight=torch.ones(4))

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


def test_a_long_list_of_left_tensors_is_cut_and_counted(tmp_path: Path) -> None:
    _write(tmp_path, **{f"t__{i}": torch.ones(1) for i in range(30)})
    with pytest.raises(CheckpointError, match=r"30 tensors .*t\.19, and 10 more"):
        _weights(tmp_path).finish()


def test_a_tensor_cannot_be_taken_twice(checkpoint: Path) -> None:
    weights = _weights(checkpoint)
    weights.tensor("norm.weight", [160], torch.bfloat16)
    with pytest.raises(AssertionError, match=r"norm\.weight is taken twice"):
        weights.tensor("norm.weight", [160], torch.bfloat16)


def test_names_match_by_whole_components_only(tmp_path: Path) -> None:
    _write(
        tmp_path,
        experts__1__w1__weight=torch.full((2, 2), 1.0),
        experts__11__w1__weight=torch.full((2, 2), 11.0),
        shared_experts__1__w1__weight=torch.full((2, 2), 21.0),
        gate__weight=torch.full((2, 2), 31.0),
        wgate__weight=torch.full((2, 2), 41.0),
    )
    weights = _weights(tmp_path)
    assert not weights.has("experts.1.w")
    assert not weights.scope("expert").has("s.1.w1.weight")
    assert weights.scope("experts", "1").matrix("w1", 2, 2).codes.flatten().tolist() == [1.0] * 4
    assert weights.matrix("gate", 2, 2).codes.flatten().tolist() == [31.0] * 4
    with pytest.raises(CheckpointError, match=r"shared_experts\.1\.w1\.weight, wgate\.weight"):
        weights.finish([re.compile(r"experts\.11\..*")])


def test_ignored_names_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config()
    extra = {
        "mtp.0.embed.weight": torch.zeros(2),
        "mtp.0.head.weight": torch.zeros(2),
        "mtp.0.draft.gate": torch.zeros(2),
        "mtp.1.attn.wq_a.weight": torch.zeros(2),
        "mtp.2.norm.weight": torch.zeros(2),
    }
    write_random_deepseek_v4(tmp_path, config, seed=1, extra_tensors=extra)
    with caplog.at_level(logging.INFO):
        build = _take_everything(config)
        load_model(build, FileSource(tmp_path), "cpu", deepseek_v4.IGNORED)
    said = [r.getMessage() for r in caplog.records if "ignored" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("ignored 5 tensors: mtp.0.draft.gate, mtp.0.embed.weight")


def test_no_known_tensor_is_ever_ignored() -> None:
    table = deepseek_v4.tensor_table(tiny_config())
    assert not [n for n in table if any(rule.fullmatch(n) for rule in deepseek_v4.IGNORED)]


def test_trap_1_scale_bytes_are_kept_bit_for_bit(tmp_path: Path) -> None:
    codes, scales = _fp8(300, 200)
    # 2 ** -8 and smaller, which a value cast to a byte turns into zero
    small = (scales.view(torch.uint8) - 8).view(torch.float8_e8m0fnu)
    _write(tmp_path, w__weight=codes, w__scale=small)
    matrix = _weights(tmp_path).matrix("w", 300, 200)
    assert matrix.scales is not None
    assert matrix.scales.dtype == torch.uint8
    assert torch.equal(matrix.scales, small.view(torch.uint8))
    assert torch.equal(matrix.codes.view(torch.uint8), codes.view(torch.uint8))
    assert matrix.dequantize(torch.float32).abs().max() > 0


def test_trap_2_codes_never_leave_without_their_scale(tmp_path: Path) -> None:
    codes, _ = _fp8(128, 128)
    _write(tmp_path, wo_a__weight=codes)
    with pytest.raises(CheckpointError, match=r"wo_a\.scale is missing"):
        _weights(tmp_path).matrix("wo_a", 128, 128)
    with pytest.raises(CheckpointError, match=r"wo_a\.weight is F8_E4M3 .* wanted BF16"):
        _weights(tmp_path).tensor("wo_a.weight", [128, 128], torch.bfloat16)


@pytest.mark.parametrize("byte", [0, 255, 200])
def test_trap_3_broken_scales_are_refused(tmp_path: Path, byte: int) -> None:
    codes, scales = _fp8(128, 128)
    scales = torch.full_like(scales.view(torch.uint8), byte).view(torch.float8_e8m0fnu)
    _write(tmp_path, w__weight=codes, w__scale=scales)
    with pytest.raises(CheckpointError, match="the scales are broken"):
        _weights(tmp_path).matrix("w", 128, 128)


def test_trap_5_the_format_is_each_matrix_s_own(tmp_path: Path) -> None:
    # a config that says otherwise is not even read
    config = tiny_config(expert_dtype="fp8")
    write_random_deepseek_v4(tmp_path, config, seed=2, experts="fp4")
    names = [f"experts.{e}.w1" for e in range(8)]
    experts = _weights(tmp_path).scope("layers", "0", "ffn").experts(names, 96, 160)
    assert experts.kind == "fp4_group"
    assert experts.codes.shape == (8, 96, 80)
    shared = _weights(tmp_path).matrix("layers.0.ffn.shared_experts.w1", 96, 160)
    assert shared.kind == "fp8_block"


def test_fp8_experts_load_where_the_file_has_them(tmp_path: Path) -> None:
    config = tiny_config()
    write_random_deepseek_v4(tmp_path, config, seed=2, experts="fp8")
    names = [f"experts.{e}.w2" for e in range(8)]
    experts = _weights(tmp_path).scope("layers", "3", "ffn").experts(names, 160, 96)
    assert experts.kind == "fp8_block"
    state = dequantized_state(tmp_path)
    expected = torch.stack([state[f"layers.3.ffn.{name}.weight"] for name in names])
    assert torch.equal(experts.dequantize(torch.float32), expected)


def test_experts_of_two_formats_are_refused(tmp_path: Path) -> None:
    w0, s0 = _fp4(32, 64)
    w1, s1 = _fp8(32, 64)
    _write(tmp_path, e0__weight=w0, e0__scale=s0, e1__weight=w1, e1__scale=s1)
    with pytest.raises(CheckpointError, match=r"e0 is fp4_group .* e1 is fp8_block"):
        _weights(tmp_path).experts(["e0", "e1"], 32, 64)


def test_trap_6_every_expert_has_its_own_scales(checkpoint: Path) -> None:
    names = [f"experts.{e}.w3" for e in range(8)]
    experts = _weights(checkpoint).scope("layers", "4", "ffn").experts(names, 96, 160)
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
    _write(tmp_path, w=torch.ones(4))
    with pytest.raises(CheckpointError, match=r"tensor w is F32 \[4\], wanted"):
        _weights(tmp_path).tensor("w", shape, dtype)


def test_trap_7_a_scale_of_the_wrong_shape_is_fatal(tmp_path: Path) -> None:
    codes, scales = _fp8(256, 256)
    _write(tmp_path, w__weight=codes, w__scale=scales[:, :1].contiguous())
    with pytest.raises(CheckpointError, match=r"w\.scale is F8_E8M0 \[2, 1\], wanted .*\[2, 2\]"):
        _weights(tmp_path).matrix("w", 256, 256)
    # packed FP4 with FP8's block scales is no format at all
    packed = torch.zeros(256, 128, dtype=torch.int8)
    _write(tmp_path, w__weight=packed, w__scale=scales)
    with pytest.raises(CheckpointError, match=r"w\.scale is F8_E8M0 \[2, 2\], wanted .*\[256, 8\]"):
        _weights(tmp_path).matrix("w", 256, 256)


def test_trap_8_codes_stay_plain_rows(tmp_path: Path) -> None:
    codes, scales = _fp8(64, 96)
    _write(tmp_path, wo_a__weight=codes, wo_a__scale=scales)
    matrix = _weights(tmp_path).matrix("wo_a", 64, 96)
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
        loaded.append(load_model(_take_everything(config), FileSource(directory), "cpu"))
    first, second = loaded
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_trap_9_a_folder_without_index_loads_the_same(checkpoint: Path, tmp_path: Path) -> None:
    merged: dict[str, Tensor] = {}
    for file in checkpoint.glob("*.safetensors"):
        merged |= load_file(file)
    save_file(merged, tmp_path / "model.safetensors")
    whole = load_model(_take_everything(tiny_config()), FileSource(tmp_path), "cpu")
    parts = load_model(_take_everything(tiny_config()), FileSource(checkpoint), "cpu")
    assert all(torch.equal(whole[name], parts[name]) for name in parts)


def test_trap_10_bf16_wo_a_with_a_stale_scale_in_the_index_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stale = "layers.2.attn.wo_a.scale"
    write_random_deepseek_v4(
        tmp_path, tiny_config(), seed=4, wo_a="bf16", stale_index_names=[stale]
    )
    weights = _weights(tmp_path)
    assert stale in caplog.text
    assert not weights.has(stale)
    matrix = weights.matrix("layers.2.attn.wo_a", 96, 128)
    assert (matrix.kind, matrix.scales) == ("plain", None)
    assert matrix.codes.dtype == torch.bfloat16


def test_a_plain_matrix_with_a_scale_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, w__weight=torch.ones(4, 4), w__scale=torch.ones(1, 1))
    with pytest.raises(CheckpointError, match="plain F32 but has a scale"):
        _weights(tmp_path).matrix("w", 4, 4)


@pytest.mark.parametrize(("rows", "columns"), [(160, 96), (257, 300), (1, 129), (200, 640)])
def test_trap_11_scale_blocks_are_128_whatever_the_shape(
    tmp_path: Path, rows: int, columns: int
) -> None:
    codes, scales = _fp8(rows, columns)
    _write(tmp_path, w__weight=codes, w__scale=scales)
    values = _weights(tmp_path).matrix("w", rows, columns).dequantize(torch.float32)
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
        _write(tmp_path, w__weight=torch.randn(rows, columns))
    else:
        codes, scales = _fp8(rows, columns) if kind == "fp8" else _fp4(rows, columns)
        _write(tmp_path, w__weight=codes, w__scale=scales)
    whole = dequantized_state(tmp_path)["w.weight"]
    parts = []
    for index in range(count):
        shard = Shard(dim, index, count, align)
        matrix = _weights(tmp_path).matrix("w", rows, columns, shard)
        start, stop = shard.bounds((rows, columns)[dim])
        part = matrix.dequantize(torch.float32)
        assert (matrix.out_features, matrix.in_features) == part.shape
        assert torch.equal(part, whole.narrow(dim, start, stop - start))
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim), whole)


def test_trap_12_trailing_ranks_without_a_block_multiply_to_zero(tmp_path: Path) -> None:
    codes, scales = _fp8(160, 64)
    _write(tmp_path, w__weight=codes, w__scale=scales)
    matrix = _weights(tmp_path).matrix("w", 160, 64, Shard(0, 3, 4, align=128))
    assert matrix.codes.shape == (0, 64)
    assert matrix.scales is not None and matrix.scales.shape == (0, 1)
    _write(tmp_path, w__weight=codes[:, :32].contiguous(), w__scale=scales)
    matrix = _weights(tmp_path).matrix("w", 160, 32, Shard(1, 1, 2, align=128))
    y = torch.randn(3, 0) @ matrix.dequantize(torch.float32).T
    assert y.shape == (3, 160)
    assert not y.any()


@given(size=st.integers(0, 500), count=st.integers(1, 16), align=st.sampled_from([1, 32, 128]))
def test_shards_cover_a_dimension_once_in_order(size: int, count: int, align: int) -> None:
    end = 0
    for index in range(count):
        start, stop = Shard(0, index, count, align).bounds(size)
        assert start == end <= stop
        assert start % align == 0 or start == size
        end = stop
    assert end == size


def test_fp4_inputs_are_cut_at_whole_groups_only(tmp_path: Path) -> None:
    codes, scales = _fp4(8, 96)
    _write(tmp_path, w__weight=codes, w__scale=scales)
    with pytest.raises(CheckpointError, match="multiples of 32, not at 0 and 48"):
        _weights(tmp_path).matrix("w", 8, 96, Shard(1, 0, 2))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_experts_are_cut_by_expert_by_rows_and_by_columns(checkpoint: Path, dim: int) -> None:
    names = [f"layers.2.ffn.experts.{e}.w2" for e in range(8)]
    state = dequantized_state(checkpoint)
    whole = torch.stack([state[f"{name}.weight"] for name in names])
    align = 32 if dim == 2 else 1
    for index in range(3):
        shard = Shard(dim, index, 3, align)
        weights = _weights(checkpoint)
        experts = weights.experts(names, 160, 96, shard)
        start, stop = shard.bounds(whole.shape[dim])
        expected = whole.narrow(dim, start, stop - start)
        assert torch.equal(experts.dequantize(torch.float32), expected)
        # the other ranks' experts count as taken
        with pytest.raises(CheckpointError) as raised:
            weights.finish()
        assert "experts.7.w2" not in str(raised.value)


def test_trap_13_hash_layers_have_no_router_bias_and_that_is_no_error(checkpoint: Path) -> None:
    weights = _weights(checkpoint)
    for layer in range(6):
        gate = weights.scope("layers", str(layer), "ffn", "gate")
        assert gate.has("bias") == (layer >= 2)
        assert gate.has("tid2eid") == (layer < 2)


def test_tensors_are_cut_like_matrices(checkpoint: Path) -> None:
    whole = _weights(checkpoint).tensor("embed.weight", [320, 160], torch.bfloat16)
    parts = [
        _weights(checkpoint).tensor("embed.weight", [320, 160], torch.bfloat16, Shard(0, i, 3))
        for i in range(3)
    ]
    assert [len(part) for part in parts] == [107, 107, 106]
    assert torch.equal(torch.cat(parts), whole)


def test_loaded_tensors_own_their_memory(checkpoint: Path) -> None:
    weights = _weights(checkpoint)
    norm = weights.tensor("norm.weight", [160], torch.bfloat16)
    norm.zero_()
    assert _weights(checkpoint).tensor("norm.weight", [160], torch.bfloat16).any()


def test_a_tensor_at_an_odd_byte_is_read_right(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        }
    ).encode()
    values = torch.tensor([1.5, -2.5])
    content = len(header).to_bytes(8, "little") + header + b"abc" + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    assert torch.equal(_weights(tmp_path).tensor("b", [2], torch.float32), values)


def test_a_checkpoint_on_the_meta_device_reads_nothing(checkpoint: Path) -> None:
    weights = _weights(checkpoint, "meta")
    matrix = weights.matrix("layers.0.attn.wq_a", 96, 160)
    assert matrix.codes.is_meta
    assert matrix.dequantize(torch.float32).shape == (96, 160)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "cut short"),
        (b"\xff" * 8, "cut short"),
        (b"\x02\0\0\0\0\0\0\0[]", "broken safetensors header"),
        (b"\x02\0\0\0\0\0\0\0{}", None),
    ],
)
def test_a_broken_shard_is_named(tmp_path: Path, content: bytes, named: str | None) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    if named is None:
        assert read_headers(tmp_path) == {}
        return
    with pytest.raises(CheckpointError, match=f"model.safetensors.*{named}"):
        read_headers(tmp_path)


def test_a_shard_cut_short_is_named(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    last = max(tmp_path.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{last.name} is cut short"):
        read_headers(tmp_path)


def test_a_missing_shard_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_bytes((checkpoint / INDEX_NAME).read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks 3 of the 3 shards .*00001-of-00003"):
        read_headers(tmp_path)


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(CheckpointError, match="no file name"):
        read_headers(tmp_path)


@given(content=st.binary(max_size=200))
@settings(max_examples=200)
def test_no_bytes_crash_the_header_parser(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp() / "fuzz"
    directory.mkdir(exist_ok=True)
    header = len(content).to_bytes(8, "little") + content
    (directory / "model.safetensors").write_bytes(header)
    try:
        read_headers(directory)
    except CheckpointError:
        pass


def test_the_revision_sees_names_shapes_and_values(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=1, compress_ratios=[0, 0])
    revisions = []
    for i, (seed, shards) in enumerate([(1, 3), (1, 2), (2, 3)]):
        write_random_deepseek_v4(tmp_path / str(i), config, seed=seed, shards=shards)
        revisions.append(weights_revision(tmp_path / str(i)))
    first, other_shards, other_seed = revisions
    assert first == other_shards
    assert first != other_seed
    _write(tmp_path / "0", norm__weight=torch.ones(4))
    assert weights_revision(tmp_path / "0") != first


def test_the_writer_is_deterministic(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_random_deepseek_v4(tmp_path / name, tiny_config(), seed=5)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_matrix_counts_its_bytes() -> None:
    codes = torch.zeros(2, 4, 16, dtype=torch.int8)
    matrix = Matrix("fp4_group", codes, torch.zeros(2, 4, 1, dtype=torch.uint8), 4, 32)
    assert matrix.num_bytes == 2 * 4 * 17
