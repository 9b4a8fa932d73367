"""A small model on a GPU against the same on the CPU in exact fp32, alone and as a stack."""

from pathlib import Path

import pytest
import torch

from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.config import ModelOptions
from scission.common.model.load import load_model
from tests.integration.stack import Stack, token_ids_of
from tests.one_process import OneProcess, load_exact
from tests.reference_checkpoint import tiny_config

pytestmark = pytest.mark.gpu

NUM_TOKENS = 24
LENGTHS = (1, 5, 17, 128, 129, 300)
MIN_MARGIN = 1e-3  # between the two likeliest tokens; below it rounding may pick either
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_random_deepseek_v4(folder, tiny_config(), seed=1)
    return folder


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 320, (length,), generator=generator).tolist()


@torch.inference_mode()
def test_greedy_tokens_on_the_gpu_equal_the_cpus(folder: Path) -> None:
    assert not torch.backends.cuda.matmul.allow_tf32
    gpu = torch.device("cuda", 0)
    on_cpu = OneProcess(load_exact(folder))
    on_gpu = OneProcess(
        load_model(ModelOptions(folder, device="cuda", numerics="exact"), gpu), device=gpu
    )
    for length in LENGTHS:
        prompt = prompt_of(length)
        logits = []
        for runner in (on_cpu, on_gpu):
            sequence = runner.new_sequence()
            first = runner.prefill(sequence, prompt, chunk_size=96)
            logits.append(runner.greedy([sequence], first, NUM_TOKENS)[:, 0].cpu())
        top = logits[0].topk(2, dim=-1).values
        assert (top[:, 0] - top[:, 1]).min() > MIN_MARGIN, "choose another prompt"
        ours, theirs = (x.log_softmax(dim=-1) for x in logits)
        assert (ours - theirs).abs().max() <= TOLERANCE
        assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))


def test_the_stack_on_a_gpu_answers_as_on_the_cpu(folder: Path, tmp_path: Path) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        logs = tmp_path / device
        logs.mkdir()
        with Stack(folder, logs, flags=[f"--device={device}"]) as stack:
            answers.append(
                [
                    token_ids_of(
                        stack.complete(prompt_of(length), max_tokens=NUM_TOKENS, ignore_eos=True)
                    )
                    for length in LENGTHS
                ]
            )
            stack.wait_drained()
    assert answers[0] == answers[1]
