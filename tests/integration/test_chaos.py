"""Workers die and freeze at any moment under concurrent streams.

With a second worker of the role alive no request is lost, and every token is the one that an
undisturbed run gives.
"""

import asyncio
import json
import random
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from tests.integration.stack import Stack
from tests.reference_checkpoint import tiny_config

NUM_STREAMS = 8
ROUNDS = 8
NUM_TOKENS = 60
MAX_GAP_S = 5.0
LOGPROB_TOLERANCE = 2e-4  # batches differ after a fault, and with them the order of sums
Drawn = list[tuple[int, float]]  # token and its logprob


def prompt_of(index: int) -> list[int]:
    rng = random.Random(index)
    return [0, *(rng.randrange(3, 250) for _ in range(rng.choice((20, 150, 600))))]


def drawn_by(event: dict[str, Any]) -> Drawn:
    assert "error" not in event, event
    return [
        (token_id, logprob)
        for choice in event["choices"]
        if choice["token_ids"]
        for token_id, logprob in zip(
            choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True
        )
    ]


async def stream_tokens(client: httpx.AsyncClient, url: str, prompt: list[int]) -> Drawn:
    """One greedy stream; fails on an error event or on a silence of over MAX_GAP_S."""
    body = {
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
        "logprobs": 0,
    }
    tokens: Drawn = []
    async with client.stream("POST", url, json=body) as response:
        assert response.status_code == httpx.codes.OK, await response.aread()
        lines = response.aiter_lines()
        while True:
            # the head start is for queueing behind the others on a small machine
            line = await asyncio.wait_for(anext(lines), MAX_GAP_S if tokens else 3 * MAX_GAP_S)
            if line == "data: [DONE]":
                return tokens
            if line.startswith("data: "):
                tokens += drawn_by(json.loads(line.removeprefix("data: ")))


async def disturbed_round(stack: Stack, rng: random.Random) -> tuple[list[Drawn], str, int]:
    """All streams at once and one fault at a random moment; their tokens, who was struck, how."""
    victim = f"{rng.choice(('prefill', 'decode'))}-{rng.randrange(2)}"
    number = rng.choice((signal.SIGKILL, signal.SIGSTOP))
    async with httpx.AsyncClient(timeout=60.0) as client:

        async def strike() -> None:
            await asyncio.sleep(rng.uniform(0.0, 1.5))
            stack.signal(victim, number)

        striking = asyncio.create_task(strike())
        url = stack.url("/v1/completions")
        results = await asyncio.gather(
            *(stream_tokens(client, url, prompt_of(i)) for i in range(NUM_STREAMS))
        )
        await striking
    return results, victim, number


@pytest.mark.slow
def test_no_stream_is_lost_while_workers_die_and_freeze(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_random_deepseek_v4(model, tiny_config(), seed=11, shards=1)
    with Stack(model, tmp_path, prefills=2, decodes=2) as stack:
        expected = [
            drawn_by(
                stack.complete(prompt_of(i), max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
            )
            for i in range(NUM_STREAMS)
        ]
        rng = random.Random(3)
        for _ in range(ROUNDS):
            results, victim, number = asyncio.run(disturbed_round(stack, rng))
            for i, tokens in enumerate(results):
                ids, logprobs = zip(*tokens, strict=True)
                expected_ids, expected_logprobs = zip(*expected[i], strict=True)
                assert ids == expected_ids, (victim, number, i)
                assert logprobs == pytest.approx(expected_logprobs, abs=LOGPROB_TOLERANCE)
            stack.revive(victim)
        stack.wait_drained(timeout_s=15.0)
