"""A gateway process, spoken to over HTTP, with fake workers behind it."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.config import DiscoveryOptions
from scission.common.errors import CapacityError
from scission.common.ports import free_port
from scission.common.registration import Registrar, WorkerState
from scission.protos import cluster_pb2
from tests.fakes import FakeDecode, FakePrefill, FakeWorker, right_tokens
from tests.reference_checkpoint import tiny_config

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random_deepseek_v4(folder, tiny_config(), seed=1, shards=1)
    return folder


class Gateway:
    def __init__(self, model: Path, *flags: str) -> None:
        self._port, self.registry_port = free_port(HOST), free_port(HOST)
        self._command = [
            *("-m", "scission.services.gateway", str(model)),
            f"--port={self._port}",
            f"--registry-port={self.registry_port}",
            *flags,
        ]
        self.http = httpx.AsyncClient(base_url=f"http://{HOST}:{self._port}", timeout=30)

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._command,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stderr=asyncio.subprocess.PIPE,
        )

    async def until_status(self, path: str, status: int) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    if (await self.http.get(path)).status_code == status:
                        return
                except httpx.TransportError:
                    assert self.process.returncode is None
                await asyncio.sleep(0.02)

    async def end(self) -> tuple[int, str]:
        _, log = await asyncio.wait_for(self.process.communicate(), 60)
        assert self.process.returncode is not None
        return self.process.returncode, log.decode()

    async def close(self) -> None:
        await self.http.aclose()
        if self.process.returncode is None:
            self.process.kill()
            await self.process.communicate()

    def body(self, **fields: Any) -> dict[str, Any]:
        return {"prompt": PROMPT, "max_tokens": 6, "return_token_ids": True} | fields

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json=self.body(**fields))


def register(worker: FakeWorker, gateway: Gateway) -> "asyncio.Task[None]":
    options = DiscoveryOptions(gateways=(f"{HOST}:{gateway.registry_port}",), heartbeat_s=0.1)
    state = WorkerState(
        describe=lambda: worker.description,
        load=lambda: worker.load,
        prefixes=lambda is_full: cluster_pb2.PrefixUpdate(),
    )
    return asyncio.create_task(Registrar(state, options).run())


@asynccontextmanager
async def stack(model: Path, *flags: str) -> AsyncIterator[tuple[Gateway, FakePrefill, FakeDecode]]:
    gateway, decode = Gateway(model, *flags), FakeDecode()
    prefill = FakePrefill([decode])
    await gateway.start()
    await prefill.start()
    await decode.start()
    registering = [register(worker, gateway) for worker in (prefill, decode)]
    try:
        await gateway.until_status("/ready", 200)
        yield gateway, prefill, decode
    finally:
        for task in registering:
            task.cancel()
        await gateway.close()
        await prefill.kill()
        await decode.kill()


async def test_a_gateway_finds_its_workers_answers_and_lists_them(model: Path) -> None:
    async with stack(model) as (gateway, prefill, decode):
        answer = await gateway.complete()
        assert answer.json()["choices"][0]["token_ids"] == right_tokens(PROMPT, 6)
        workers = (await gateway.http.get("/workers")).json()["workers"]
        assert {(w["worker_id"], w["state"]) for w in workers} == {
            (prefill.worker_id, "ready"),
            (decode.worker_id, "ready"),
        }
        targets = (await gateway.http.get("/workers/http_sd")).json()
        assert sorted(target["targets"][0] for target in targets) == sorted(
            worker.description.metrics_address for worker in (prefill, decode)
        )
        metrics = (await gateway.http.get("/metrics")).text
        assert 'scission_workers{model_name="tiny",role="gateway",worker="decode_ready"' in metrics
        assert 'part="token_back"' in metrics


async def test_without_workers_the_gateway_lives_but_is_not_ready(model: Path) -> None:
    gateway = Gateway(model)
    await gateway.start()
    try:
        await gateway.until_status("/health", 200)
        assert (await gateway.http.get("/ready")).status_code == 503
        answer = await gateway.complete()
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert "no prefill" in answer.json()["error"]["message"]
    finally:
        await gateway.close()


async def test_full_workers_are_429_with_retry_after_in_under_100_ms(model: Path) -> None:
    async with stack(model) as (gateway, prefill, _):
        prefill.refuse = CapacityError("full")
        await gateway.complete()
        times = []
        for _ in range(5):
            began_at = time.monotonic()
            answer = await gateway.complete()
            times.append(time.monotonic() - began_at)
            assert answer.status_code == 429 and answer.headers["retry-after"]
            assert answer.json()["error"]["type"]
        assert min(times) < 0.1


async def test_a_client_that_hangs_up_frees_both_workers_within_a_second(model: Path) -> None:
    async with stack(model) as (gateway, _, decode):
        decode.limit = 3
        body = gateway.body(stream=True, max_tokens=100)
        async with gateway.http.stream("POST", "/v1/completions", json=body) as response:
            await anext(response.aiter_lines())
        await decode.until(lambda: bool(decode.cancels), 1.0)
        assert decode.num_running == 0


async def test_a_signal_lets_streams_finish_and_refuses_what_is_new(model: Path) -> None:
    async with stack(model) as (gateway, _, decode):
        decode.limit = 3
        body = gateway.body(stream=True)
        tokens: list[int] = []
        async with gateway.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            tokens += _tokens(await anext(lines))
            gateway.process.send_signal(signal.SIGTERM)
            await gateway.until_status("/ready", 503)
            assert (await gateway.complete()).status_code == 503
            decode.release()
            async for line in lines:
                tokens += _tokens(line)
        assert tokens == right_tokens(PROMPT, 6)
        code, log = await gateway.end()
        assert code == 0 and "aborting" not in log, log


async def test_streams_that_do_not_finish_end_with_an_error_event(model: Path) -> None:
    async with stack(model, "--shutdown-timeout=0.2") as (gateway, _, decode):
        decode.limit = 3
        body = gateway.body(stream=True)
        async with gateway.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            gateway.process.send_signal(signal.SIGTERM)
            rest = [line async for line in lines if line]
        assert '"error"' in rest[-2] and rest[-1] == "data: [DONE]"
        code, log = await gateway.end()
        assert code == 0 and "aborting" in log


async def test_a_stopped_gateway_is_found_and_its_requests_are_freed(model: Path) -> None:
    async with stack(model) as (gateway, prefill, decode):
        decode.limit = 3
        request = asyncio.create_task(gateway.complete(max_tokens=100))
        await decode.until(lambda: decode.tokens_sent == 2)
        gateway.process.send_signal(signal.SIGSTOP)
        await decode.until(lambda: bool(decode.gone), 10)
        await prefill.until(lambda: bool(prefill.gone), 10)
        assert decode.num_running == 0
        request.cancel()
        gateway.process.send_signal(signal.SIGCONT)
        decode.release()
        await gateway.until_status("/ready", 200)
        async with asyncio.timeout(30):
            while (await gateway.complete()).status_code != 200:
                await asyncio.sleep(0.05)


async def test_a_taken_port_ends_the_process_with_a_sentence(model: Path) -> None:
    first = Gateway(model)
    await first.start()
    try:
        await first.until_status("/health", 200)
        second = Gateway(model)
        second._command[3] = first._command[3]
        await second.start()
        code, log = await second.end()
        await second.close()
        assert code == 2 and "cannot listen" in log and "Traceback" not in log
    finally:
        await first.close()


def _tokens(line: str) -> list[int]:
    if not line.startswith("data: {"):
        return []
    choices = json.loads(line.removeprefix("data: "))["choices"]
    return [token for choice in choices for token in choice.get("token_ids") or ()]
