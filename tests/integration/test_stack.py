"""What only the whole stack shows: prefix hits, a client that never reads, unlike workers."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from tests.integration.stack import HOST, Stack, token_ids_of, wait_until
from tests.reference_checkpoint import tiny_config

PROMPT = [0, *((11 * i + i // 50) % 240 + 3 for i in range(300))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_random_deepseek_v4(folder, tiny_config(), seed=11, shards=1)
    return folder


@pytest.fixture(scope="module")
def stack(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(model, tmp_path_factory.mktemp("logs")) as running:
        yield running


def test_a_prefix_hit_changes_no_token(stack: Stack) -> None:
    first, second = (
        stack.complete(PROMPT, max_tokens=24, ignore_eos=True, logprobs=0) for _ in range(2)
    )
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 256
    assert token_ids_of(first) == token_ids_of(second)
    logprobs = [a["choices"][0]["logprobs"]["token_logprobs"] for a in (first, second)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=2e-4)


def test_another_salt_hits_no_prefix(stack: Stack) -> None:
    answer = stack.complete(PROMPT, max_tokens=2, ignore_eos=True, cache_salt="another tenant")
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_client_that_never_reads_delays_nobody_and_is_freed_when_it_goes(stack: Stack) -> None:
    body = orjson.dumps(
        {
            "prompt": PROMPT,
            "max_tokens": 3000,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 20,
        }
    )
    port = int(stack.url().rpartition(":")[2])
    with socket.create_connection((HOST, port)) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        wait_until(lambda: stack.busy("decode") is not None, 10.0, "the silent client is served")
        for i in range(5):
            answer = stack.complete([0, 7, 8 + i], max_tokens=5, ignore_eos=True)
            assert len(token_ids_of(answer)) == 5
    started = time.monotonic()
    stack.wait_drained()
    assert time.monotonic() - started < 5.0


def test_workers_of_other_numerics_are_not_paired_and_the_field_is_named(
    model: Path, tmp_path: Path
) -> None:
    with Stack(model, tmp_path) as stack:
        stack.kill("decode-0")
        wait_until(lambda: "decode-0" not in stack.ready_workers(), 10.0, "the decode is gone")
        stack.start("decode-0", "--numerics=deployed")
        wait_until(lambda: "decode-0" in stack.ready_workers(), 60.0, "the other decode answers")
        ready = stack.http.get(stack.url("/ready"))
        assert ready.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert "numerics" in ready.text
        refused = stack.http.post(stack.url("/v1/completions"), json={"prompt": [0, 5]})
        assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert "numerics" in refused.json()["error"]["message"]
