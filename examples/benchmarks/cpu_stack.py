"""Decode rate through the services against transformers, and the gateway's overhead, in one run.

    .venv/bin/python -m examples.benchmarks.cpu_stack --json stack.json

Starts `scission serve` on a checkpoint and streams greedy completions over HTTP, at one request and
at several at a time; transformers' `generate` with its cache runs the same prompts for as many
tokens on the same weights, dequantised to fp32: one prompt, or one padded batch. Rounds alternate,
so that what else the machine does falls on both; transformers is given every number of threads up
to the cores' and its best one counts. Runs from the checkout: the parity tests' names of the
weights are used.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from scission.common.checkpoint.bundled import bundled_checkpoint
from scission.common.ports import free_port
from tests.parity.reference_model import reference_model

HOST = "127.0.0.1"
READY_TIMEOUT_S = 120.0
ENGINE_PARTS = ("prefill_queue", "compute", "sample")
UNCOUNTED_REQUESTS = 3


@dataclass(frozen=True, slots=True)
class Rate:
    """One side of one round."""

    decode_tokens_per_s: float  # while every sequence decodes: after all first tokens
    total_tokens_per_s: float  # from the first byte sent, prompts included
    token_ids: list[list[int]]


class StepTimes(BaseStreamer):
    """When `generate` handed out the tokens of each step; the first call brings the prompt."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    arguments = _arguments()
    torch.manual_seed(0)
    model = arguments.model or bundled_checkpoint()
    reference = reference_model(model)
    prompts = [_prompt(arguments.prompt_tokens + 8 * i, i) for i in range(arguments.concurrent)]
    with serving(model, arguments.numerics, arguments.serve_flags.split()) as url:
        asyncio.run(stream_all(url, prompts, arguments.new_tokens))  # first touches
        alone = [
            generate(reference, [prompt], arguments.new_tokens, threads=1).token_ids[0]
            for prompt in prompts
        ]
        report = {
            "environment": environment(arguments.cores),
            "model": str(model.name),
            "numerics": arguments.numerics,
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "new_tokens": arguments.new_tokens,
            "decode": [
                compare(url, reference, prompts[:count], alone[:count], arguments)
                for count in sorted({1, arguments.concurrent})
            ],
            "gateway_overhead_ms": gateway_overhead(url, prompts[0], arguments.requests),
        }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    _show(report)


def compare(
    url: str,
    reference: Any,
    prompts: Sequence[list[int]],
    alone: Sequence[list[int]],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Alternating rounds of both sides over the same prompts.

    Args:
        alone: transformers' tokens for each prompt without padding, whose tokens ours must be;
            those of its padded batch may differ, as compressed entries then hold padding.
    """
    ours: list[Rate] = []
    by_threads: dict[int, list[Rate]] = {n: [] for n in range(1, arguments.cores + 1)}
    for _ in range(arguments.rounds):
        ours.append(rate(url, prompts, arguments.new_tokens))
        for threads, rates in by_threads.items():
            rates.append(generate(reference, prompts, arguments.new_tokens, threads))
    best_threads, theirs = max(
        by_threads.items(),
        key=lambda item: statistics.median(one.decode_tokens_per_s for one in item[1]),
    )
    ratios = [
        a.decode_tokens_per_s / b.decode_tokens_per_s for a, b in zip(ours, theirs, strict=True)
    ]
    totals = [
        a.total_tokens_per_s / b.total_tokens_per_s for a, b in zip(ours, theirs, strict=True)
    ]
    return {
        "requests": len(prompts),
        "transformers_threads": best_threads,
        "scission_tokens_per_s": _spread([one.decode_tokens_per_s for one in ours]),
        "transformers_tokens_per_s": _spread([one.decode_tokens_per_s for one in theirs]),
        "ratio": _spread(ratios),
        "ratio_with_prompts": _spread(totals),
        # deployed numerics round activations, so other tokens are right there
        "same_tokens": all(one.token_ids == list(alone) for one in ours)
        if arguments.numerics == "exact"
        else None,
    }


async def stream_all(
    url: str, prompts: Sequence[list[int]], new_tokens: int
) -> list[list[tuple[float, int]]]:
    """All prompts at once, each as a stream of its own: when each token came, and which.

    The client must not take what it measures away from the servers: it keeps what comes with its
    time, and reads it afterwards.
    """
    streams = await asyncio.gather(*(_receive(url, prompt, new_tokens) for prompt in prompts))
    tokens = [list(_tokens(parts)) for parts in streams]
    if any(len(stream) != new_tokens for stream in tokens):
        raise SystemExit(f"not {new_tokens} tokens came: {streams[0][-1][1]!r}")
    return tokens


async def _receive(url: str, prompt: list[int], new_tokens: int) -> list[tuple[float, bytes]]:
    body = {
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    content = json.dumps(body).encode()
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    parts: list[tuple[float, bytes]] = []
    while data := await reader.read(1 << 16):
        parts.append((time.perf_counter(), data))
    writer.close()
    return parts


def _tokens(parts: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, int]]:
    """Each token with the time at which its event's last byte came."""
    rest = b""
    for at, data in parts:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                    for token in choice.get("token_ids") or ():
                        yield at, token


def rate(url: str, prompts: Sequence[list[int]], new_tokens: int) -> Rate:
    """Our side of one round."""
    started = time.perf_counter()
    streams = asyncio.run(stream_all(url, prompts, new_tokens))
    begin = max(times[0][0] for times in streams)
    end = min(times[-1][0] for times in streams)
    if end <= begin:
        raise SystemExit("the streams do not overlap: ask for more --new-tokens")
    between = sum(begin < at <= end for times in streams for at, _ in times)
    last = max(times[-1][0] for times in streams)
    return Rate(
        decode_tokens_per_s=between / (end - begin),
        total_tokens_per_s=sum(map(len, streams)) / (last - started),
        token_ids=[[token for _, token in times] for times in streams],
    )


@torch.inference_mode()
def generate(reference: Any, prompts: Sequence[list[int]], new_tokens: int, threads: int) -> Rate:
    """transformers' greedy `generate` over the prompts as one batch, padded on the left."""
    torch.set_num_threads(threads)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    steps = StepTimes()
    started = time.perf_counter()
    output = reference.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
        streamer=steps,
    )
    first, last = steps.at[1], steps.at[-1]
    return Rate(
        decode_tokens_per_s=len(prompts) * (len(steps.at) - 2) / (last - first),
        total_tokens_per_s=len(prompts) * new_tokens / (last - started),
        token_ids=output[:, longest:].tolist(),
    )


def gateway_overhead(url: str, prompt: list[int], requests: int) -> dict[str, Any]:
    """Client's time to the first token minus the prefill's own, of one request after another, ms.

    The prefill's part is what the gateway's sums of directly timed parts gain by the request.
    """
    overheads: list[float] = []
    parts: dict[str, list[float]] = {}
    with httpx.Client(timeout=60.0) as client:
        # a prompt of its own each, so that no prefix is cached
        for number in range(UNCOUNTED_REQUESTS + requests):
            own = [0, 3 + number % 200, 3 + number // 200, *prompt[3:]]
            before = _part_seconds(client, url)
            first_token_s = _first_token_seconds(client, url, own)
            after = _part_seconds(client, url)
            if number < UNCOUNTED_REQUESTS:
                continue
            gained = {name: after[name] - before.get(name, 0.0) for name in after}
            engine_s = sum(gained[name] for name in ENGINE_PARTS)
            overheads.append(1000 * (first_token_s - engine_s))
            for name, seconds in gained.items():
                parts.setdefault(name, []).append(1000 * seconds)
    return {
        "requests": requests,
        "p50": statistics.median(overheads),
        "p95": statistics.quantiles(overheads, n=20)[-1],
        "parts_p50": {name: statistics.median(values) for name, values in parts.items()},
    }


def _first_token_seconds(client: httpx.Client, url: str, prompt: list[int]) -> float:
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True, "ignore_eos": True}
    first: float | None = None
    started = time.perf_counter()
    with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if first is None and line.startswith("data: {"):
                first = time.perf_counter() - started
    assert first is not None
    return first


def _part_seconds(client: httpx.Client, url: str) -> dict[str, float]:
    families = text_string_to_metric_families(client.get(f"{url}/metrics").text)
    return {
        sample.labels["part"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "scission_time_to_first_token_part_seconds_sum"
    }


@contextmanager
def serving(model: Path, numerics: str, flags: Sequence[str]) -> Iterator[str]:
    """The whole stack as a user starts it; yields its URL."""
    port = free_port(HOST)
    command = [sys.executable, "-m", "scission.services.cli", "serve", str(model)]
    command += [
        f"--port={port}",
        "--device=cpu",
        f"--numerics={numerics}",
        "--log-level=warning",
        *flags,
    ]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "src"})
    url = f"http://{HOST}:{port}"
    try:
        _wait_ready(url, process)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    give_up_at = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < give_up_at:
        if process.poll() is not None:
            raise SystemExit(f"scission serve ended with {process.returncode}")
        try:
            if httpx.get(f"{url}/ready").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"not ready within {READY_TIMEOUT_S} s")


def environment(cores: int) -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cores": cores,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [0, *torch.randint(3, 250, (length - 1,), generator=generator).tolist()]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return asdict(Spread(statistics.median(values), min(values), max(values)))


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    min: float
    max: float


def _show(report: dict[str, Any]) -> None:
    lines = [f"{report['model']}, numerics {report['numerics']}, {report['new_tokens']} tokens"]
    for row in report["decode"]:
        ours, theirs = row["scission_tokens_per_s"], row["transformers_tokens_per_s"]
        ratio = row["ratio"]
        lines.append(
            f"{row['requests']} at a time: {ours['median']:.1f} tokens/s, transformers "
            f"{theirs['median']:.1f}; ratio {ratio['median']:.2f} "
            f"({ratio['min']:.2f} to {ratio['max']:.2f}), with prompts "
            f"{row['ratio_with_prompts']['median']:.2f}, same tokens: {row['same_tokens']}"
        )
    overhead = report["gateway_overhead_ms"]
    lines.append(f"gateway overhead: p50 {overhead['p50']:.2f} ms, p95 {overhead['p95']:.2f} ms")
    sys.stdout.write("\n".join(lines) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a folder [the bundled model]")
    parser.add_argument("--numerics", choices=("exact", "deployed"), default="exact")
    parser.add_argument("--concurrent", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=100, help="of the shortest prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="for the gateway's overhead")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--serve-flags", default="", help="more flags of `scission serve`")
    parser.add_argument("--json", type=Path, help="write the report there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
