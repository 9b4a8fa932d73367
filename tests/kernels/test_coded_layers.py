"""Layers that multiply codes, against the same layers of decoded values on the CPU."""

from pathlib import Path

import pytest
import torch

from scission.common.checkpoint.source import FileSource
from scission.common.checkpoint.weights import Ledger, Weights
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.layers.linear import _as_one_fp8
from scission.common.layers.moe import MoE, ScoreRouter
from scission.common.layers.numerics import Numerics
from scission.common.parallel.ranks import Axis
from scission.kernels.linear import linear_block_fp8, quantize_rows
from scission.kernels.quant import round_trip_fp8
from scission.kernels.target import Target
from scission.kernels.testing import relative_error
from tests.reference_checkpoint import tiny_config

NUMERICS = Numerics(torch.bfloat16, rounds=True)
HIDDEN, INNER, Q_LORA, EXPERTS, TOP_K = 256, 128, 128, 8, 3
# bf16 rounds outputs by 1.7e-3; where a last bit of it differs, an inner value's e4m3 code may too
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    config = tiny_config(hidden_size=HIDDEN, moe_intermediate_size=INNER, q_lora_rank=Q_LORA)
    write_random_deepseek_v4(folder, config, seed=1)
    return folder


def _run_kernels_everywhere(monkeypatch: pytest.MonkeyPatch, kernel_target: Target) -> None:
    """The interpreter's CPU counts as a device with kernels."""
    modules = (
        "kernels.linear",
        "kernels.moe.outputs",
        "common.layers.moe",
        "common.layers.coded_moe",
    )
    for module in modules:
        monkeypatch.setattr(f"scission.{module}.target_of", lambda _: kernel_target)


def _layer(folder: Path, part: str, device: torch.device | str) -> Weights:
    return Weights(Ledger(FileSource(folder), device)).scope("layers", "3", part)


def _mixture(folder: Path, device: torch.device | str) -> MoE:
    w = _layer(folder, "ffn", device)
    router = ScoreRouter(w.scope("gate"), HIDDEN, EXPERTS, TOP_K, 1.5)
    return MoE(w, router, HIDDEN, INNER, EXPERTS, 10.0, Axis(), NUMERICS)


@pytest.mark.parametrize("num_tokens", [1, 19, 130])
def test_experts_of_codes_mix_as_decoded_ones(
    folder: Path,
    kernel_device: torch.device,
    kernel_target: Target,
    num_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(num_tokens, HIDDEN).to(torch.bfloat16)
    token_ids = torch.zeros(num_tokens, dtype=torch.int64)
    expected = _mixture(folder, "cpu")(x, token_ids)
    _run_kernels_everywhere(monkeypatch, kernel_target)
    coded = _mixture(folder, kernel_device)
    assert coded._coded is not None
    actual = coded(x.to(kernel_device), token_ids.to(kernel_device)).cpu()
    assert relative_error(actual, expected) <= TOLERANCE


def test_matrices_of_one_input_are_one_matrix_of_codes(
    folder: Path,
    kernel_device: torch.device,
    kernel_target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _run_kernels_everywhere(monkeypatch, kernel_target)
    w = _layer(folder, "attn", kernel_device)
    matrices = [w.matrix("wq_a", Q_LORA, HIDDEN), w.matrix("wkv", 64, HIDDEN)]
    one = _as_one_fp8(matrices, torch.bfloat16)
    assert one is not None and one.scales is not None
    values = torch.cat([matrix.dequantize(torch.float32) for matrix in matrices])
    assert torch.equal(one.dequantize(torch.float32), values)
    x = torch.randn(7, HIDDEN, device=kernel_device).to(torch.bfloat16)
    expected = round_trip_fp8(x, 128).float() @ values.mT
    actual = linear_block_fp8(quantize_rows(x, "ue8m0"), one.codes, one.scales)
    assert relative_error(actual, expected) <= TOLERANCE
    # the second would begin inside the first one's last row of blocks
    assert _as_one_fp8(matrices[::-1], torch.bfloat16) is None
    assert _as_one_fp8(matrices, torch.float32) is None
