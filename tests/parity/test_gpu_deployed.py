"""A model in deployed numerics on a GPU, where codes are multiplied as they are."""

from pathlib import Path

import pytest
import torch

from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.config import ModelOptions
from scission.common.model.load import load_model
from tests.one_process import OneProcess
from tests.reference_checkpoint import tiny_config

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    # widths that the kernels take
    config = tiny_config(hidden_size=256, moe_intermediate_size=128, q_lora_rank=128)
    write_random_deepseek_v4(folder, config, seed=1)
    return folder


@torch.inference_mode()
def test_the_deployed_model_gives_the_same_logits_each_time(folder: Path) -> None:
    options = ModelOptions(folder, device="cuda", dtype="bfloat16", numerics="deployed")
    prompt = torch.randint(0, 320, (200,)).tolist()
    runs = []
    for _ in range(2):
        runner = OneProcess(load_model(options, GPU), device=GPU)
        sequence = runner.new_sequence()
        first = runner.prefill(sequence, prompt, chunk_size=96)
        runs.append(runner.greedy([sequence], first, 8).cpu())
    assert runs[0].isfinite().all()
    assert torch.equal(runs[0], runs[1])
