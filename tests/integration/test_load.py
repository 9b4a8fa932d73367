"""Many streams of random lengths with random cancels, over two prefills and two decodes."""

import asyncio
import random
from pathlib import Path

import httpx

from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from tests.integration.stack import Stack
from tests.reference_checkpoint import tiny_config

NUM_STREAMS = 64
NUM_REQUESTS = 160
CANCELLED_SHARE = 0.3


async def run_one(client: httpx.AsyncClient, url: str, rng: random.Random) -> str:
    """One streamed request; returns how it ended."""
    prompt = [0, *(rng.randrange(3, 250) for _ in range(rng.choice((1, 7, 60, 130, 400))))]
    max_tokens = rng.choice((1, 2, 5, 20, 60))
    cancel_after = rng.randrange(max_tokens + 1) if rng.random() < CANCELLED_SHARE else None
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": rng.choice((0, 0.8)),
        "n": rng.choice((1, 1, 1, 3)),
        "return_token_ids": True,
    }
    seen: dict[int, int] = {}
    finished: set[int] = set()
    async with client.stream("POST", url, json=body) as response:
        assert response.status_code == httpx.codes.OK, await response.aread()
        events = 0
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                break
            event = httpx.Response(200, text=line.removeprefix("data: ")).json()
            assert "error" not in event, event
            for choice in event["choices"]:
                index = choice["index"]
                seen[index] = seen.get(index, 0) + len(choice.get("token_ids") or ())
                if choice["finish_reason"]:
                    assert choice["finish_reason"] == "length"
                    finished.add(index)
            events += 1
            if cancel_after is not None and events > cancel_after:
                return "cancelled"
    assert finished == set(range(body["n"])), (finished, body["n"])  # type: ignore[call-overload]
    assert all(count == max_tokens for count in seen.values()), (seen, max_tokens)
    return "finished"


async def run_all(url: str) -> list[str]:
    rng = random.Random(5)
    gate = asyncio.Semaphore(NUM_STREAMS)
    limits = httpx.Limits(max_connections=NUM_STREAMS)
    async with httpx.AsyncClient(timeout=120.0, limits=limits) as client:

        async def one(seed: int) -> str:
            async with gate:
                return await run_one(client, url, random.Random(seed))

        return await asyncio.gather(*(one(rng.randrange(1 << 30)) for _ in range(NUM_REQUESTS)))


def test_every_request_ends_as_it_should_and_every_pool_is_free_again(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_random_deepseek_v4(model, tiny_config(), seed=11, shards=1)
    with Stack(model, tmp_path, prefills=2, decodes=2) as stack:
        ends = asyncio.run(run_all(stack.url("/v1/completions")))
        assert len(ends) == NUM_REQUESTS
        assert ends.count("finished") > NUM_REQUESTS // 2
        assert ends.count("cancelled") > NUM_REQUESTS // 10
        stack.wait_drained(timeout_s=15.0)
