"""The deployed numerics round where the specification says, and nowhere else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scission.common.checkpoint.source import FileSource
from scission.common.checkpoint.weights import Ledger, Weights
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.layers.attention import GroupedOutput
from scission.common.layers.moe import MoE, ScoreRouter
from scission.common.layers.numerics import Numerics
from scission.common.model.batch import SequenceChunk, build_batch
from scission.common.model.config import parse_config
from scission.common.model.deepseek_v4 import Indexer
from scission.common.model.deepseek_v4_step import ListedStep
from scission.common.model.step_plan import PlanGeometry, plan_step
from scission.common.parallel.ranks import Axis
from scission.kernels.indexer import hadamard
from scission.kernels.quant import round_trip_fp4, round_trip_fp8
from scission.kernels.rope import rotate_
from tests.reference_checkpoint import dequantized_state, tiny_config

DEPLOYED = Numerics(torch.float32, rounds=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_random_deepseek_v4(directory, tiny_config(), seed=7)
    return directory


@pytest.fixture(scope="module")
def state(checkpoint: Path) -> dict[str, Tensor]:
    return dequantized_state(checkpoint)


def _weights(checkpoint: Path, *scope: str) -> Weights:
    return Weights(Ledger(FileSource(checkpoint), "cpu")).scope(*scope)


def test_wo_b_rounds_its_input_and_wo_a_does_not(
    checkpoint: Path, state: dict[str, Tensor]
) -> None:
    heads = torch.randn(3, 4, 64)
    w = _weights(checkpoint, "layers", "0", "attn")
    out = GroupedOutput(w, 160, 256, 2, 48, Axis(), DEPLOYED)(heads)
    wo_a = state["layers.0.attn.wo_a.weight"].view(2, 48, 128)
    z = torch.stack([heads.view(3, 2, 128)[:, g] @ wo_a[g].mT for g in (0, 1)], dim=1).flatten(1)
    expected = round_trip_fp8(z, 128) @ state["layers.0.attn.wo_b.weight"].mT
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_experts_round_what_w1_w3_and_w2_take(checkpoint: Path, state: dict[str, Tensor]) -> None:
    x = torch.randn(4, 160)
    w = _weights(checkpoint, "layers", "3", "ffn")
    router = ScoreRouter(w.scope("gate"), 160, 8, 3, 1.5)
    out = MoE(w, router, 160, 96, 8, 10.0, Axis(), DEPLOYED)(x, torch.zeros(4, dtype=torch.int64))
    # the router sees x as it is
    experts, weights = router(x, torch.zeros(4, dtype=torch.int64))

    def expert(name: str, x: Tensor, weight: Tensor) -> Tensor:
        w1, w2, w3 = (state[f"layers.3.ffn.{name}.w{i}.weight"] for i in (1, 2, 3))
        rounded = round_trip_fp8(x, 128)
        a, b = (rounded @ w1.mT).clamp(max=10), (rounded @ w3.mT).clamp(-10, 10)
        return round_trip_fp8(torch.nn.functional.silu(a) * b * weight, 128) @ w2.mT

    for token in range(4):
        row = x[token : token + 1]
        expected = expert("shared_experts", row, torch.ones(1))
        for e, weight in zip(experts[token].tolist(), weights[token], strict=True):
            expected = expected + expert(f"experts.{e}", row, weight)
        torch.testing.assert_close(out[token : token + 1], expected, rtol=1e-3, atol=1e-3)


def test_the_indexer_rounds_its_queries_after_rope_and_hadamard(
    checkpoint: Path, state: dict[str, Tensor]
) -> None:
    config = parse_config(tiny_config())
    w = _weights(checkpoint, "layers", "2", "attn", "indexer")
    indexer = Indexer(w, config, DEPLOYED)
    num_tokens, num_entries = 3, 20
    frequencies = torch.rand(8)
    geometry = PlanGeometry(16, 128, {4: True}, {4: 8}, frequencies, frequencies)
    chunk = SequenceChunk([0] * num_tokens, 4 * num_entries, [1], 1)
    plan = plan_step(build_batch([chunk], CPU), geometry)
    qr, head_weights = torch.randn(num_tokens, 96), torch.randn(num_tokens, 16)
    keys = round_trip_fp4(torch.randn(64, 32), 32)
    picked = indexer(qr, head_weights, ListedStep(plan, 16, DEPLOYED), keys)
    assert picked is not None

    q = round_trip_fp8(qr, 128) @ state["layers.2.attn.indexer.wq_b.weight"].mT
    q = rotate_(q.view(num_tokens, 16, 32), plan.compressed_rotation.forward)
    q = round_trip_fp4(hadamard(q), 32)
    matches = torch.einsum("thd,cd->thc", q, keys[32 : 32 + num_entries]).clamp(min=0)
    scores = torch.einsum("th,thc->tc", head_weights, matches)
    expected = scores.topk(8).indices + 32
    assert torch.equal(picked.sort().values, expected.sort().values)
