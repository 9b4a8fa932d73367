"""Many streams at a time over HTTP: tokens a second, time to first token, gaps between events.

    .venv/bin/python -m examples.benchmarks.stream_load --port 8000 --streams 128 --tokens 512

Speaks to a stack that runs already. Each of some client processes keeps its share of the streams
open, one completion after another of random token ids and a fixed length; what counts lies between
the first moment at which all streams flow and the first at which one has ended for good.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import random
import statistics
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
HEAD_END = b"\r\n\r\n"
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Load:
    port: int
    model: str
    vocab_size: int  # prompts are ids below it
    prompt_tokens: int
    tokens: int  # of one completion
    rounds: int  # completions a stream makes, one after another
    body: dict[str, Any]  # more fields of every request


@dataclass(slots=True)
class Stream:
    """Times are time.monotonic(), which the processes of a host share."""

    first_at: list[float] = field(default_factory=list)  # first event of each round
    ttft_s: list[float] = field(default_factory=list)
    ended_at: float = 0.0
    num_tokens: int = 0
    events: list[float] = field(default_factory=list)  # when they came, all rounds


async def run_stream(load: Load, seed: int) -> Stream:
    """One stream's completions on one connection."""
    result = Stream()
    numbers = random.Random(seed)
    reader, writer = await asyncio.open_connection(HOST, load.port)
    for _ in range(load.rounds):
        prompt = [numbers.randrange(3, load.vocab_size) for _ in range(load.prompt_tokens)]
        body = {
            "model": load.model,
            "prompt": prompt,
            "max_tokens": load.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **load.body,
        }
        content = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(content)}\r\n"
        )
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        sent_at = time.monotonic()
        await read_events(reader, result, sent_at)
    result.ended_at = time.monotonic()
    writer.close()
    return result


async def read_events(reader: asyncio.StreamReader, result: Stream, sent_at: float) -> None:
    """To the end of one response, which is chunked."""
    head = await reader.readuntil(HEAD_END)
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise RuntimeError(f"refused: {head!r} {await reader.read(400)!r}")
    is_first, last = True, b""
    while True:
        size = int(await reader.readuntil(b"\r\n"), 16)
        data = await reader.readexactly(size + 2)
        now = time.monotonic()
        if not size:
            break
        if is_first:
            result.first_at.append(now)
            result.ttft_s.append(now - sent_at)
            is_first = False
        result.events.append(now)
        last = (last + data[:-2])[-4096:]
    usage = [line for line in last.split(b"\n\n") if b'"completion_tokens"' in line][-1]
    result.num_tokens += json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"]


def run_process(load: Load, seeds: range, pipe: Any) -> None:
    async def run() -> list[Stream]:
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.gather(*(run_stream(load, seed) for seed in seeds))

    try:
        pipe.send(asyncio.run(run()))
    except Exception as error:
        pipe.send(error)


def measure(load: Load, num_streams: int, num_processes: int) -> dict[str, Any]:
    """All streams' figures."""
    context = multiprocessing.get_context("spawn")
    bounds = [i * num_streams // num_processes for i in range(num_processes + 1)]
    pipes = []
    for first, last in itertools.pairwise(bounds):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (load, range(first, last), theirs)
        context.Process(target=run_process, args=arguments, daemon=True).start()
        pipes.append(ours)
    streams: list[Stream] = []
    for pipe in pipes:
        part = pipe.recv()
        if isinstance(part, Exception):
            raise part
        streams += part
    began = max(stream.first_at[0] for stream in streams)
    ended = min(stream.ended_at for stream in streams)
    num_events = sum(len(stream.events) for stream in streams)
    tokens_an_event = sum(stream.num_tokens for stream in streams) / num_events
    within = sum(began <= at <= ended for stream in streams for at in stream.events)
    gaps = sorted(
        b - a
        for stream in streams
        for a, b in itertools.pairwise(stream.events)
        if began <= a and b <= ended
    )
    ttft = sorted(s for stream in streams for s in stream.ttft_s[1:] or stream.ttft_s)
    return {
        "streams": num_streams,
        "client_processes": num_processes,
        "prompt_tokens": load.prompt_tokens,
        "tokens": load.tokens,
        "seconds": ended - began,
        "tokens_per_s": within * tokens_an_event / (ended - began),
        "tokens_an_event": tokens_an_event,
        "ttft_p50_ms": 1000 * statistics.median(ttft),
        "ttft_p95_ms": 1000 * ttft[int(0.95 * (len(ttft) - 1))],
        "gap_p50_ms": 1000 * gaps[len(gaps) // 2],
        "gap_p99_ms": 1000 * gaps[int(0.99 * (len(gaps) - 1))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--processes", type=int, default=4, help="of the clients")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=1000, help="prompts are ids below it")
    parser.add_argument("--body", type=json.loads, default={}, help="more fields, as JSON")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with urllib.request.urlopen(f"http://{HOST}:{given.port}/v1/models", timeout=10) as answer:
        model = json.load(answer)["data"][0]["id"]
    load = Load(
        given.port,
        model,
        given.vocab_size,
        given.prompt_tokens,
        given.tokens,
        given.rounds,
        given.body,
    )
    report = measure(load, given.streams, given.processes)
    if given.json is not None:
        given.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(
        f"{report['tokens_per_s']:.0f} tokens/s over {report['streams']} streams "
        f"({report['tokens_an_event']:.2f} tokens an event), first token p50 "
        f"{report['ttft_p50_ms']:.1f} ms, p95 {report['ttft_p95_ms']:.1f} ms, "
        f"gaps p50 {report['gap_p50_ms']:.1f} ms, p99 {report['gap_p99_ms']:.1f} ms\n"
    )


if __name__ == "__main__":
    main()
