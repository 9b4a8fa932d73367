"""The stack on a GPU with captured steps: its answers, and what is left after a crowd."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scission.common.checkpoint.write_random import write_random_checkpoint
from tests.dense_checkpoints import qwen3_config
from tests.integration.stack import Stack, token_ids_of

pytestmark = pytest.mark.gpu

# every width that a kernel asks to be a multiple of 128
CONFIG = qwen3_config(
    num_hidden_layers=2, hidden_size=256, intermediate_size=384, head_dim=128, vocab_size=1024
)
FLAGS = ("--device=cuda", "--numerics=deployed")
PROMPTS = [[(7 * i + j) % 1000 for j in range(length)] for i, length in enumerate((3, 140, 61, 9))]
# greedy, random, cut, with logprobs; and what the host draws
FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 40, "seed": 6},
    {"temperature": 1.0, "seed": 7, "logprobs": 3},
    {"temperature": 1.0, "seed": 8, "repetition_penalty": 1.2},
    {"temperature": 0.5, "seed": 9, "n": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    folder.mkdir()
    write_random_checkpoint(folder, CONFIG, seed=3)
    return folder


def test_requests_one_by_one_are_answered_as_without_graphs(folder: Path, tmp_path: Path) -> None:
    answers = []
    for flag in ("--cuda-graphs", "--no-cuda-graphs"):
        logs = tmp_path / flag
        logs.mkdir()
        with Stack(folder, logs, flags=[*FLAGS, flag]) as stack:
            assert ("captured graphs" in stack.log("decode-0")) == (flag == "--cuda-graphs")
            answers.append(
                [
                    token_ids_of(stack.complete(prompt, max_tokens=20, ignore_eos=True, **fields))
                    for prompt in PROMPTS[:2]
                    for fields in FIELDS[:5]
                ]
            )
    assert answers[0] == answers[1]


def test_a_crowd_that_comes_and_goes_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    with Stack(folder, tmp_path, flags=FLAGS) as stack:

        def ask(i: int) -> int:
            fields = FIELDS[i % len(FIELDS)]
            prompt = PROMPTS[i % len(PROMPTS)]
            max_tokens = 10 + 13 * (i % 9)
            if i % 5 == 0:
                # the client goes away in the middle
                with stack.stream(prompt, max_tokens=500, ignore_eos=True, **fields) as events:
                    for _ in range(3):
                        next(events)
                return 0
            answer = stack.complete(prompt, max_tokens=max_tokens, ignore_eos=True, **fields)
            assert len(token_ids_of(answer)) == max_tokens * fields.get("n", 1)
            return max_tokens

        with ThreadPoolExecutor(24) as pool:
            assert sum(pool.map(ask, range(96))) > 0
        stack.wait_drained()
