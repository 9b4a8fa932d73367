"""The dense models over HTTP, through three processes: transformers' logprobs and greedy tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scission.common.checkpoint.write_random import write_random_checkpoint
from tests.dense_checkpoints import ministral3_config, qwen3_config, step3p5_config
from tests.integration.stack import Stack
from tests.integration.test_parity_http import (
    NUM_TOKENS,
    TOP,
    assert_equal_to_reference,
    prompt_of,
    top_by_id,
)
from tests.one_process import OneProcess, load_exact
from tests.parity.dense_reference import dense_reference

CHUNK = 128  # tokens of a step, a block: longer prompts are cut

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "qwen3-partial-blocks": qwen3_config(num_hidden_layers=3),
    "qwen3-aligned-tied": qwen3_config(
        num_hidden_layers=2,
        hidden_size=256,
        head_dim=128,
        num_attention_heads=4,
        intermediate_size=384,
        tie_word_embeddings=True,
    ),
    "ministral3": ministral3_config(num_hidden_layers=3),
    "step3p5": step3p5_config(),
    "step3p5-aligned": step3p5_config(
        hidden_size=256, moe_intermediate_size=384, share_expert_dim=128, intermediate_size=256
    ),
}
# around windows of 40, trained contexts of 64, chunks and blocks of 128
PROMPT_LENGTHS = (1, 2, 39, 40, 41, 63, 64, 65, 127, 128, 129, 256, 301)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    write_random_checkpoint(folder, CHECKPOINTS[request.param], seed=11)
    return folder


@pytest.fixture(scope="module")
def stack(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    flags = [f"--max-num-batched-tokens={CHUNK}", "--max-model-len=1024"]
    with Stack(checkpoint, tmp_path_factory.mktemp("logs"), flags=flags) as running:
        yield running


def test_the_stack_equals_transformers_and_one_process(checkpoint: Path, stack: Stack) -> None:
    reference = dense_reference(checkpoint)
    loaded = load_exact(checkpoint)
    for length in PROMPT_LENGTHS:
        prompt = prompt_of(length)
        answer = _complete(stack, prompt)
        assert_equal_to_reference(answer, prompt, reference)

        runner = OneProcess(loaded, max_seqs=1)
        sequence = runner.new_sequence()
        output = answer["choices"][0]["token_ids"]
        logits = runner.prefill(sequence, prompt, chunk_size=CHUNK)
        steps = runner.greedy([sequence], logits, len(output) - 1)
        assert steps[:, 0].argmax(-1).tolist() == output
        for step, entry in zip(
            steps, answer["choices"][0]["logprobs"]["top_logprobs"], strict=True
        ):
            logprobs = step.log_softmax(-1)[0]
            for token_id, value in top_by_id(entry).items():
                # bit for bit: the same fp32 number
                assert torch.tensor(value) == logprobs[token_id]
    stack.wait_drained()


def test_a_cached_prefix_changes_no_token(checkpoint: Path, stack: Stack) -> None:
    """The second prompt starts behind the first one's last full block."""
    reference = dense_reference(checkpoint)
    prompt = prompt_of(700)
    for length in (260, 290, 300):
        answer = _complete(stack, prompt[:length])
        assert_equal_to_reference(answer, prompt[:length], reference)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 256


def _complete(stack: Stack, prompt: list[int]) -> dict[str, Any]:
    return stack.complete(
        prompt, max_tokens=NUM_TOKENS, logprobs=TOP, return_tokens_as_token_ids=True
    )
