"""Over HTTP, through three processes: the logprobs and greedy tokens of transformers."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from tests.integration.stack import Stack
from tests.parity.reference_model import reference_model
from tests.reference_checkpoint import tiny_config

NUM_TOKENS = 24
TOP = 20
TOLERANCE = 2e-4  # of a logprob; fp32 on both sides, sums in another order

CHECKPOINTS = {
    "partial-blocks": tiny_config(),
    "aligned-blocks": tiny_config(
        hidden_size=256,
        head_dim=128,
        qk_rope_head_dim=64,
        q_lora_rank=128,
        o_lora_rank=128,
        moe_intermediate_size=128,
        compress_ratios=[128, 128, 4, 128, 4, 0],
        num_hidden_layers=5,
        sliding_window=128,
        index_head_dim=128,
        index_topk=16,
    ),
}
# shorter and longer than the window, several blocks of 4 and of 128, at, before and after borders
PROMPT_LENGTHS = (1, 2, 4, 15, 16, 17, 63, 127, 128, 129, 200, 256, 301, 520)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    write_random_deepseek_v4(folder, CHECKPOINTS[request.param], seed=11, shards=2)
    return folder


@pytest.fixture(scope="module")
def stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    # chunks of 96 tokens: prompts are cut, and are batched with one another
    with Stack(
        checkpoint, tmp_path_factory.mktemp("logs"), flags=["--max-num-batched-tokens=96"]
    ) as running:
        yield running


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return [0, *torch.randint(3, 250, (length - 1,), generator=generator).tolist()]


def reference_logprobs(model: torch.nn.Module, token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def top_by_id(entry: dict[str, float]) -> dict[int, float]:
    return {int(key.removeprefix("token_id:")): value for key, value in entry.items()}


def assert_equal_to_reference(answer: dict[str, Any], prompt: list[int], reference: Any) -> None:
    choice = answer["choices"][0]
    output = choice["token_ids"]
    assert len(output) == NUM_TOKENS or choice["finish_reason"] == "stop"
    logprobs = reference_logprobs(reference, prompt + output)
    for step, token_id in enumerate(output):
        expected = logprobs[len(prompt) - 1 + step]
        assert token_id == int(expected.argmax()), f"token {step} of a prompt of {len(prompt)}"
        ours = top_by_id(choice["logprobs"]["top_logprobs"][step])
        assert len(ours) >= TOP
        for other_id, value in ours.items():
            assert math.isclose(value, expected[other_id].item(), abs_tol=TOLERANCE)
        worst_listed = min(ours.values())
        assert worst_listed >= expected.topk(TOP).values[-1].item() - TOLERANCE


def test_the_stack_equals_transformers(checkpoint: Path, stack: Stack) -> None:
    reference = reference_model(checkpoint)
    for length in PROMPT_LENGTHS:
        prompt = prompt_of(length)
        answer = stack.complete(
            prompt, max_tokens=NUM_TOKENS, logprobs=TOP, return_tokens_as_token_ids=True
        )
        assert_equal_to_reference(answer, prompt, reference)
    stack.wait_drained()


def test_prompts_sent_together_equal_transformers(checkpoint: Path, stack: Stack) -> None:
    reference = reference_model(checkpoint)
    prompts = [prompt_of(length) for length in (5, 33, 131, 260)]
    answer = stack.complete(
        prompts,  # type: ignore[arg-type]
        max_tokens=NUM_TOKENS,
        logprobs=TOP,
        return_tokens_as_token_ids=True,
    )
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        assert_equal_to_reference({"choices": [choice]}, prompt, reference)


def test_echoed_prompt_logprobs_equal_transformers(checkpoint: Path, stack: Stack) -> None:
    reference = reference_model(checkpoint)
    prompt = prompt_of(150)
    answer = stack.complete(
        prompt, max_tokens=0, echo=True, logprobs=5, return_tokens_as_token_ids=True
    )
    logprobs = reference_logprobs(reference, prompt)
    ours = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert ours[0] is None and len(ours) == len(prompt)
    for position in range(1, len(prompt)):
        expected = logprobs[position - 1, prompt[position]].item()
        assert math.isclose(ours[position], expected, abs_tol=TOLERANCE)
