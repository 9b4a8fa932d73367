# ruff: noqa: T201
"""Held-out problems through the whole stack over HTTP, greedily: a table of right answers by task.

    python -m examples.nano.evaluate --problems 500 --json eval.json

Starts `scission serve` once for each numerics (exact, deployed) and asks every problem of both, so
that their differences are paired; `--url` asks a server that runs already.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from examples.nano.data import problems
from examples.nano.data.problems import TASKS, Problem
from examples.nano.data.rows import question_text
from scission.common.ports import free_port

UNSEEN = tuple(name for name in TASKS if name != "about")
# tokens of context of the long tasks
NEEDLES = {"needle-2k": 2000, "needle-8k": 8000}
FILLER_CHARACTERS = 4.62  # of a token, measured
DEFAULT_TASKS = (*UNSEEN, *NEEDLES)


def held_out(task: str, number: int, seed: int = 7) -> list[Problem]:
    """Different problems that training never saw; fewer where a task has no more."""
    r = random.Random(f"{seed}:{task}")
    found: dict[str, Problem] = {}
    for _ in range(number * 400):
        if len(found) == number:
            break
        if task in NEEDLES:
            problem = problems.needle(r, int((NEEDLES[task] - 40) * FILLER_CHARACTERS), 10)
        else:
            problem = TASKS[task][0](r)
        if problem.is_held_out:
            found.setdefault(problem.key + problem.question, problem)
    return list(found.values())


def request(problem: Problem, model: str, *, is_thinking: bool) -> dict[str, Any]:
    """The body of a chat completion."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question_text(problem)}]
    if problem.call is not None and problem.result is not None:
        function = {**problem.call, "arguments": json.dumps(problem.call["arguments"])}
        call = {"id": "call_0", "type": "function", "function": function}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_0", "content": problem.result},
        ]
    body: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": 200,
        "chat_template_kwargs": {"thinking": is_thinking},
    }
    if problem.tools:
        body["tools"] = [{"type": "function", "function": tool} for tool in problem.tools]
    return body


def is_right(problem: Problem, message: dict[str, Any]) -> bool:
    """Whether an assistant's message answers the problem."""
    content = message.get("content") or ""
    if problem.call is not None and problem.result is None:
        calls = message.get("tool_calls") or []
        if len(calls) != 1 or calls[0]["function"]["name"] != problem.call["name"]:
            return False
        try:
            arguments = json.loads(calls[0]["function"]["arguments"])
        except ValueError:
            return False
        return bool(arguments == problem.call["arguments"])
    if problem.task == "json":
        try:
            return bool(json.loads(content) == json.loads(problem.answer))
        except ValueError:
            return False
    return bool(re.sub(r"\s+", " ", content).strip() == problem.answer)


async def ask_all(
    url: str, asked: Sequence[Problem], *, is_thinking: bool, concurrency: int
) -> list[dict[str, Any]]:
    """The messages that answer the problems, in order."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600.0) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def ask(problem: Problem) -> dict[str, Any]:
            async with gate:
                body = request(problem, model, is_thinking=is_thinking)
                response = await client.post("/v1/chat/completions", json=body)
                response.raise_for_status()
                message: dict[str, Any] = response.json()["choices"][0]["message"]
                return message

        return list(await asyncio.gather(*(ask(problem) for problem in asked)))


@contextmanager
def serving(model: Path | None, numerics: str) -> Iterator[str]:
    """A stack of its own, until the block ends: its address."""
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "scission.services.cli", "serve", f"--port={port}"]
    command += [] if model is None else [str(model)]
    command += [f"--numerics={numerics}"]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"{url}/ready").status_code == httpx.codes.OK:
                    break
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("scission serve did not become ready")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def evaluate(
    url: str, tasks: Sequence[str], number: int, modes: Sequence[bool], concurrency: int
) -> dict[str, list[bool]]:
    """By task and mode ("add, thinking"): whether each problem's answer is right."""
    results = {}
    for task in tasks:
        asked = held_out(task, number)
        for is_thinking in modes:
            messages = asyncio.run(
                ask_all(url, asked, is_thinking=is_thinking, concurrency=concurrency)
            )
            right = [is_right(p, m) for p, m in zip(asked, messages, strict=True)]
            name = f"{task}, {'thinking' if is_thinking else 'direct'}"
            results[name] = right
            print(
                f"  {name:26} {100 * sum(right) / len(right):6.1f} %  of {len(right)}", flush=True
            )
            for problem, message, is_good in zip(asked, messages, right, strict=True):
                if not is_good:
                    said = message.get("content") or message.get("tool_calls")
                    print(f"      {problem.question!r}: {said!r}, not {problem.answer!r}")
                    break
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; else what `scission serve` bundles")
    parser.add_argument("--url", help="of a running server; nothing is started then")
    parser.add_argument("--numerics", nargs="+", default=["deployed", "exact"])
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT_TASKS))
    parser.add_argument("--problems", type=int, default=500, help="of each task")
    parser.add_argument("--modes", nargs="+", default=["thinking", "direct"])
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    modes = [mode == "thinking" for mode in options.modes]
    report: dict[str, dict[str, list[bool]]] = {}
    arguments = (options.tasks, options.problems, modes, options.concurrency)
    if options.url:
        report["server"] = evaluate(options.url, *arguments)
    else:
        for numerics in options.numerics:
            print(f"numerics {numerics}")
            with serving(options.model, numerics) as url:
                report[numerics] = evaluate(url, *arguments)
    show(report)
    if options.json is not None:
        options.json.write_text(json.dumps(report) + "\n", encoding="utf-8")


def show(report: dict[str, dict[str, list[bool]]]) -> None:
    """The table: percent right by task, and paired differences to the first column."""
    columns = list(report)
    first = report[columns[0]]
    print(f"{'task':28} {'n':>5} " + " ".join(f"{column:>10}" for column in columns) + "  lost/won")
    for task, right in first.items():
        cells = [f"{100 * sum(report[c][task]) / len(right):10.1f}" for c in columns]
        pairs = ""
        for column in columns[1:]:
            both = list(zip(right, report[column][task], strict=True))
            pairs += f"  {sum(a and not b for a, b in both)}/{sum(b and not a for a, b in both)}"
        print(f"{task:28} {len(right):5} " + " ".join(cells) + pairs)


if __name__ == "__main__":
    main()
