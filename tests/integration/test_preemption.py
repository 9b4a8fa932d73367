"""A decode whose blocks run out sends requests back, and nobody can tell from the answers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from tests.integration.stack import Stack, token_ids_of
from tests.reference_checkpoint import tiny_config

NUM_REQUESTS = 8
# 100 to 107 tokens of prompt take one block of 128 at admission, 200 more tokens two others
FLAGS = ("--num-gpu-blocks-override=14", "--growth-tokens=8", "--no-enable-prefix-caching")


def prompt_of(number: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return [0, *torch.randint(3, 250, (99 + number,), generator=generator).tolist()]


def test_preempted_requests_give_the_tokens_that_they_give_alone(tmp_path: Path) -> None:
    write_random_deepseek_v4(tmp_path / "model", tiny_config(), seed=11)
    with Stack(tmp_path / "model", tmp_path, flags=FLAGS) as stack:

        def ask(number: int) -> list[int]:
            return token_ids_of(stack.complete(prompt_of(number), max_tokens=200, ignore_eos=True))

        (decode,) = [w["metrics_address"] for w in stack.workers() if w["role"] == "decode"]
        alone = [ask(number) for number in range(NUM_REQUESTS)]
        assert stack.metrics(decode)["scission_num_preemptions_total"] == 0
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            together = list(pool.map(ask, range(NUM_REQUESTS)))
        assert stack.metrics(decode)["scission_num_preemptions_total"] > 0
        assert [len(tokens) for tokens in together] == [200] * NUM_REQUESTS
        assert together == alone
        stack.wait_drained()
