"""The model against transformers on the same dequantised weights: fp32, nothing rounded."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.model.load import LoadedModel
from tests.one_process import OneProcess, load_exact
from tests.parity.reference_model import reference_model
from tests.reference_checkpoint import tiny_config

# measured 3e-5: sums of fp32 products in another order
TOLERANCE = 2e-4
NUM_TOKENS = 24

# the published head geometry and block sizes, few layers; and a model whose dims are odd sizes
CONFIGS = {
    "odd-sizes": tiny_config(),
    "real-heads": tiny_config(
        hidden_size=256,
        num_hidden_layers=4,
        compress_ratios=[128, 128, 4, 128, 0],
        num_hash_layers=1,
        num_attention_heads=4,
        head_dim=512,
        qk_rope_head_dim=64,
        q_lora_rank=128,
        o_lora_rank=128,
        sliding_window=128,
        index_n_heads=16,
        index_head_dim=128,
        index_topk=16,
        moe_intermediate_size=128,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, DeepseekV4ForCausalLM]:
    directory: Path = tmp_path_factory.mktemp(request.param)
    write_random_deepseek_v4(directory, CONFIGS[request.param], seed=1)
    return load_exact(directory), reference_model(directory)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16, 17, 31, 127, 128, 129, 200, 255, 256, 257, 391])
@torch.inference_mode()
def test_prompt_and_greedy_tokens_equal_transformers(
    models: tuple[LoadedModel, DeepseekV4ForCausalLM], length: int
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
    models: tuple[LoadedModel, DeepseekV4ForCausalLM],
) -> None:
    loaded, reference = models
    prompt = torch.randint(0, loaded.vocab_size, (300,))
    runner = OneProcess(loaded, max_seqs=1)
    ours = runner.step([(runner.new_sequence(), prompt.tolist())], logits="all")
    assert _top_difference(ours, reference(prompt.unsqueeze(0)).logits[0]) <= TOLERANCE


def _greedy(reference: DeepseekV4ForCausalLM, prompt: list[int], num_tokens: int) -> Tensor:
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
