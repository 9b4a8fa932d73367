"""The dense models against transformers on the same dequantised weights, in fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scission.common.checkpoint.write_random import write_random_checkpoint
from scission.common.model.load import LoadedModel
from tests.dense_checkpoints import ministral3_config, qwen3_config, step3p5_config
from tests.one_process import OneProcess, load_exact
from tests.parity.dense_reference import dense_reference

# sums of fp32 products in another order
TOLERANCE = 2e-4
NUM_TOKENS = 24

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-partial-blocks": qwen3_config(),
    "qwen3-aligned-tied": qwen3_config(
        hidden_size=256,
        head_dim=128,
        num_attention_heads=4,
        intermediate_size=384,
        tie_word_embeddings=True,
    ),
    "qwen3-yarn": qwen3_config(rope_scaling=YARN, num_hidden_layers=2),
    "ministral3": ministral3_config(),
    "ministral3-aligned-tied": ministral3_config(
        hidden_size=256, head_dim=128, intermediate_size=384, tie_word_embeddings=True
    ),
    "step3p5": step3p5_config(),
    "step3p5-aligned": step3p5_config(
        hidden_size=256, moe_intermediate_size=384, share_expert_dim=128, intermediate_size=256
    ),
    "ministral3-sliding": ministral3_config(sliding_window=40, num_hidden_layers=2),
}
# around the borders of blocks of 128, of windows and of trained contexts
LENGTHS = (1, 3, 39, 40, 41, 63, 64, 65, 127, 128, 129, 255, 256, 257, 391)


@pytest.fixture(scope="module", params=CONFIGS)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, torch.nn.Module]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    write_random_checkpoint(directory, CONFIGS[request.param], seed=1)
    return load_exact(directory), dense_reference(directory)


@pytest.mark.parametrize("length", LENGTHS)
@torch.inference_mode()
def test_prompt_and_greedy_tokens_equal_transformers(
    models: tuple[LoadedModel, torch.nn.Module], length: int
) -> None:
    loaded, reference = models
    prompt = torch.randint(0, loaded.vocab_size, (length,)).tolist()
    runner = OneProcess(loaded, max_seqs=1)
    sequence = runner.new_sequence()
    ours = runner.greedy([sequence], runner.prefill(sequence, prompt), NUM_TOKENS)[:, 0]

    theirs = _greedy(reference, prompt, NUM_TOKENS)
    assert ours.argmax(-1).tolist() == theirs.argmax(-1).tolist()
    assert _top_difference(ours, theirs) <= TOLERANCE


@torch.inference_mode()
def test_every_position_of_a_prompt_equals_transformers(
    models: tuple[LoadedModel, torch.nn.Module],
) -> None:
    loaded, reference = models
    prompt = torch.randint(0, loaded.vocab_size, (300,))
    runner = OneProcess(loaded, max_seqs=1)
    ours = runner.step([(runner.new_sequence(), prompt.tolist())], logits="all")
    assert _top_difference(ours, reference(prompt.unsqueeze(0)).logits[0]) <= TOLERANCE


def _greedy(reference: torch.nn.Module, prompt: list[int], num_tokens: int) -> Tensor:
    """[num_tokens + 1, vocab_size] logits of the prompt's end and of its own greedy tokens."""
    result = reference(torch.tensor([prompt]), use_cache=True)
    logits = [result.logits[0, -1]]
    for _ in range(num_tokens):
        token = logits[-1].argmax().view(1, 1)
        result = reference(token, past_key_values=result.past_key_values, use_cache=True)
        logits.append(result.logits[0, -1])
    return torch.stack(logits)


def _top_difference(ours: Tensor, theirs: Tensor, count: int = 20) -> float:
    """The largest difference of logprobs among the reference's most likely tokens of each row."""
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    top = theirs.topk(count, dim=-1)
    return (ours.gather(-1, top.indices) - top.values).abs().max().item()
