"""Dummy weights: the real formats and shapes, random but never degenerate."""

from pathlib import Path

import pytest
import torch

from scission.common.checkpoint.dummy import DummySource
from scission.common.checkpoint.open import open_source
from scission.common.checkpoint.source import FileSource
from scission.common.checkpoint.weights import Ledger, Shard, Weights
from scission.common.checkpoint.write_deepseek_v4 import write_json
from scission.common.errors import CheckpointError, ConfigError
from tests.reference_checkpoint import tiny_config


def _weights(seed: int = 0, device: str = "cpu") -> Weights:
    return Weights(Ledger(DummySource(tiny_config(), seed), device))


@pytest.mark.parametrize(
    ("name", "rows", "columns", "kind"),
    [
        ("layers.2.attn.wq_b", 256, 96, "fp8_block"),
        ("layers.2.ffn.experts.7.w1", 96, 160, "fp4_group"),
        ("layers.2.attn.compressor.wkv", 128, 160, "plain"),
    ],
)
def test_dummy_matrices_keep_the_size_of_their_inputs(
    name: str, rows: int, columns: int, kind: str
) -> None:
    matrix = _weights().matrix(name, rows, columns)
    assert matrix.kind == kind
    values = matrix.dequantize(torch.float32)
    assert values.isfinite().all()
    rms = values.square().mean().sqrt().item() * columns**0.5
    assert 0.3 < rms < 3
    assert len(torch.unique(values)) > 10


def test_dummy_weights_follow_seed_and_name() -> None:
    def codes(seed: int, layer: int) -> torch.Tensor:
        return _weights(seed).matrix(f"layers.{layer}.attn.wq_a", 96, 160).codes.view(torch.uint8)

    assert torch.equal(codes(0, 1), codes(0, 1))
    assert not torch.equal(codes(0, 1), codes(0, 2))
    assert not torch.equal(codes(0, 1), codes(1, 1))
    assert DummySource(tiny_config(), 0).revision() != DummySource(tiny_config(), 1).revision()


def test_dummy_weights_are_cut_like_real_ones() -> None:
    matrix = _weights().matrix("layers.0.attn.wo_b", 160, 96, Shard(0, 1, 2, align=128))
    assert (matrix.codes.shape, matrix.offset) == ((32, 96), (0, 0))


def test_the_load_format_picks_the_source(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", tiny_config())
    assert isinstance(open_source(tmp_path, "dummy"), DummySource)
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        open_source(tmp_path, "auto")
    with pytest.raises(ConfigError, match="'pickle'; accepted are auto, dummy"):
        open_source(tmp_path, "pickle")  # type: ignore[arg-type]
    write_json(tmp_path / "config.json", {"architectures": ["Other"]})
    with pytest.raises(CheckpointError, match="'Other'; served are DeepseekV4ForCausalLM"):
        open_source(tmp_path, "dummy")


def test_files_are_the_default(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert isinstance(open_source(tmp_path), FileSource)
