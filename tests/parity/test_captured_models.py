"""Models step by step in rows of the device: as chunks on the CPU, and as graphs bit for bit."""

import json
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint.write_random import write_random_checkpoint
from scission.common.config import ModelOptions
from scission.common.model.batch import SequenceChunk
from scission.common.model.load import LoadedModel, load_model
from scission.common.model_source import BUNDLED
from scission.common.runner import Runner
from scission.common.sampling import SequenceSampling, sample
from scission.common.stepping.captured import CapturedSteps
from scission.common.stepping.chunked import ChunkedSteps
from scission.common.stepping.sequences import (
    DecodeSequence,
    Planned,
    Steps,
    Submitted,
    append,
)
from scission.common.types import SamplingParams
from scission.services.bench.subject import cut_layers
from tests.dense_checkpoints import ministral3_config, qwen3_config, step3p5_config
from tests.one_process import CPU, load_exact
from tests.published_dense import MINISTRAL3_8B, QWEN3_8B
from tests.reference_checkpoint import published_config

CONFIGS = {
    "qwen3": qwen3_config(num_hidden_layers=2),
    "ministral3-sliding": ministral3_config(num_hidden_layers=2, sliding_window=40),
    "step3p5": step3p5_config(),
}
PROMPTS = (3, 130, 61)
BLOCKS_EACH = 3
NUM_STEPS = 12


def play(loaded: LoadedModel, steps: Steps[DecodeSequence], runner: Runner) -> list[list[int]]:
    """Sequences that come one after another, one of them by chance; the tokens of each."""
    block_size = loaded.layout.block_size
    sequences: list[tuple[DecodeSequence, list[int]]] = []
    tokens: dict[DecodeSequence, list[int]] = {}
    under_way: deque[Submitted[DecodeSequence]] = deque()

    def collect(depth: int) -> None:
        while len(under_way) > depth:
            for drawn in under_way.popleft().collect():
                append(drawn)
                tokens[drawn.sequence].append(drawn.token_id)

    for i, length in enumerate(PROMPTS):
        prompt = torch.randint(
            loaded.vocab_size, (length,), generator=torch.Generator().manual_seed(i)
        ).tolist()
        first = 1 + i * BLOCKS_EACH
        blocks = list(range(first, first + BLOCKS_EACH))
        params = SamplingParams(99, temperature=float(i == 1), seed=i, ignore_eos=True)
        sampling = SequenceSampling(params, 0, prompt)
        logits = runner.forward([SequenceChunk(prompt, 0, blocks, 1 + i)])
        [(token_id, _)] = sample(logits, [sampling])
        sampling.append(token_id)
        used = -(-length // block_size)
        sequence = DecodeSequence(sampling, blocks[:used], 1 + i, length, [token_id])
        sequences.append((sequence, blocks))
        tokens[sequence] = [token_id]
        for _ in range(NUM_STEPS):
            for s, all_blocks in sequences:
                s.block_ids[:] = all_blocks[: s.num_computed // block_size + 1]
            under_way.append(steps.submit([Planned(s, 1) for s, _ in sequences]))
            collect(0 if under_way[-1].is_awaited else steps.depth)
        collect(0)
    return list(tokens.values())


def runner_of(loaded: LoadedModel, device: torch.device) -> Runner:
    num_blocks = 1 + len(PROMPTS) * BLOCKS_EACH
    return Runner(loaded.model, CacheStorage(loaded.layout, num_blocks, 1 + len(PROMPTS), device))


def captured_steps(loaded: LoadedModel, runner: Runner) -> CapturedSteps[DecodeSequence]:
    max_context = BLOCKS_EACH * loaded.layout.block_size
    return CapturedSteps(runner, (1, 2, 4), max_context, loaded.vocab_size)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_the_device_draw_what_chunks_draw(name: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, CONFIGS[name], seed=2)
    loaded = load_exact(tmp_path)
    runner = runner_of(loaded, CPU)
    expected = play(loaded, ChunkedSteps(runner), runner)
    runner = runner_of(loaded, CPU)
    assert play(loaded, captured_steps(loaded, runner), runner) == expected


# the first layers of published models, in their own widths; DeepSeek-V4's hold every kind of layer
PUBLISHED = {
    "scission-nano": (json.loads((BUNDLED / "config.json").read_text()), 7),
    "qwen3": (QWEN3_8B, 2),
    "ministral3": (MINISTRAL3_8B, 2),
    "deepseek-v4": (published_config("flash"), 6),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", PUBLISHED)
def test_replayed_steps_of_a_model_are_its_eager_ones_bit_for_bit(
    name: str, tmp_path: Path
) -> None:
    config, num_layers = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(cut_layers(config, num_layers)))
    device = torch.device("cuda", 0)
    loaded = load_model(ModelOptions(tmp_path, device="cuda", load_format="dummy"), device)
    assert loaded.model.captures
    results: list[tuple[list[list[int]], list[Tensor]]] = []
    for has_graphs in (False, True):
        runner = runner_of(loaded, device)
        steps: Any = captured_steps(loaded, runner)
        if has_graphs:
            steps.capture()
        logits: list[Tensor] = []
        steps._replay = _watched(steps, logits)
        results.append((play(loaded, steps, runner), logits))
    (eager_tokens, eager), (tokens, replayed) = results
    assert tokens == eager_tokens
    for ours, theirs in zip(replayed, eager, strict=True):
        assert not ours.isnan().any()
        assert torch.equal(ours, theirs)


def _watched(steps: Any, logits: list[Tensor]) -> Any:
    """`replay`, which also keeps the logits of the rows that are no padding; plain steps have
    none.
    """
    replay = steps._replay

    def watched(is_plain: bool) -> None:
        replay(is_plain=is_plain)
        if not is_plain:
            logits.append(steps._logits[: len(steps._seats.rows)].clone())

    return watched
