# ruff: noqa: T201
"""Held-out problems, answered greedily in several ways: a table of right answers by task.

    python -m examples.nano.evaluate --problems 500 --results eval.jsonl

Ways: `deployed` and `exact` start `scission serve` with these numerics and ask through gateway,
prefill and decode over HTTP; `one-process-deployed`, `one-process-exact` and
`one-process-fp8-cache` compute without services (fp8-cache: exact, but for the rounding of cached
keys and values). Every way is asked the same problems, every second one with thinking, so that
differences are paired. What `--results` holds already is not asked again.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from examples.nano.data import problems
from examples.nano.data.problems import TASKS, Problem
from examples.nano.data.rows import question_text
from examples.nano.one_process import NUMERICS, OneProcess
from scission.common.model_source import BUNDLED
from scission.common.ports import free_port

UNSEEN = tuple(name for name in TASKS if name != "about")
# tokens of context of the long tasks
NEEDLES = {"needle-2k": 2000, "needle-8k": 8000}
FILLER_CHARACTERS = 4.62  # of a token, measured
NUM_FACTS = 10  # in a text
DEFAULT_TASKS = (*UNSEEN, *NEEDLES)
ONE_PROCESS = "one-process-"
WAYS = ("deployed", "exact", *(ONE_PROCESS + name for name in NUMERICS))
AT_ONCE = 64  # problems between two writes of results


def held_out(task: str, number: int, seed: int = 7) -> list[Problem]:
    """Different problems that training never saw; fewer where a task has no more."""
    r = random.Random(f"{seed}:{task}")
    if task in NEEDLES:
        return _long_needles(r, NEEDLES[task], number)
    found: dict[str, Problem] = {}
    for _ in range(number * 400):
        if len(found) == number:
            break
        problem = TASKS[task][0](r)
        if problem.is_held_out:
            given = json.dumps(problem.tools)
            found.setdefault(problem.key + problem.question + given, problem)
    return list(found.values())


def _long_needles(r: random.Random, num_tokens: int, number: int) -> list[Problem]:
    """Every text is asked for all its facts, one text after the other."""
    texts: list[list[Problem]] = []
    while len(texts) * NUM_FACTS < number:
        asked = problems.needles(r, int((num_tokens - 40) * FILLER_CHARACTERS), NUM_FACTS)
        if asked[0].is_held_out:
            texts.append(asked)
    return [problem for asked in texts for problem in asked][:number]


def request(problem: Problem, *, is_thinking: bool) -> dict[str, Any]:
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


@dataclass(frozen=True)
class Result:
    """One problem, answered in one way; `number` counts the task's held-out problems."""

    way: str
    task: str
    number: int
    is_right: bool
    said: str
    drafts: tuple[int, int] | None = None  # the draft layer's right ones, of how many

    @property
    def key(self) -> tuple[str, str, int]:
        return self.way, self.task, self.number


Ask = Callable[[Sequence[dict[str, Any]]], Iterator[tuple[dict[str, Any], tuple[int, int] | None]]]


@contextmanager
def asking(way: str, model: Path, concurrency: int) -> Iterator[Ask]:
    """What answers bodies in order, with the draft layer's score where it is known."""
    if way.startswith(ONE_PROCESS):
        one = OneProcess(model, NUMERICS[way.removeprefix(ONE_PROCESS)])
        yield lambda bodies: ((a.message, one.draft_hits(a)) for a in one.answers(bodies))
    elif way.startswith("http"):
        yield lambda bodies: ((m, None) for m in asyncio.run(ask_all(way, bodies, concurrency)))
    else:
        with serving(model, way) as url:
            yield lambda bodies: ((m, None) for m in asyncio.run(ask_all(url, bodies, concurrency)))


async def ask_all(
    url: str, bodies: Sequence[dict[str, Any]], concurrency: int
) -> list[dict[str, Any]]:
    """The messages that a server answers with, in order."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600.0) as client:

        async def ask(body: dict[str, Any]) -> dict[str, Any]:
            async with gate:
                response = await client.post("/v1/chat/completions", json=body)
                response.raise_for_status()
                message: dict[str, Any] = response.json()["choices"][0]["message"]
                return message

        return list(await asyncio.gather(*(ask(body) for body in bodies)))


@contextmanager
def serving(model: Path, numerics: str) -> Iterator[str]:
    """A stack of its own, until the block ends: its address."""
    port = free_port("127.0.0.1")
    command = [sys.executable, "-m", "scission.services.cli", "serve", f"--port={port}"]
    command += [str(model), f"--numerics={numerics}"]
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
    ask: Ask, way: str, task: str, number: int, known: Collection[tuple[str, str, int]]
) -> Iterator[Result]:
    """What is not known yet of a task's first `number` problems."""
    problems_ = enumerate(held_out(task, number))
    asked = [(i, p) for i, p in problems_ if (way, task, i) not in known]
    if task in NEEDLES:  # of every text one question, then the next: the prefix cache has the text
        asked.sort(key=lambda item: item[0] % NUM_FACTS)
    for first in range(0, len(asked), AT_ONCE):
        part = asked[first : first + AT_ONCE]
        bodies = [request(p, is_thinking=bool(i % 2)) for i, p in part]
        for (i, problem), (message, drafts) in zip(part, ask(bodies), strict=True):
            said = {key: message.get(key) for key in ("content", "tool_calls") if message.get(key)}
            yield Result(way, task, i, is_right(problem, message), json.dumps(said), drafts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a folder")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help="or a server's http://...")
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT_TASKS))
    parser.add_argument("--problems", type=int, default=500, help="of each task")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--results", type=Path, help="JSON lines, added to; kept answers count")
    options = parser.parse_args()
    results = read_results(options.results)
    known = {result.key for result in results}
    for way in options.ways:
        with asking(way, options.model, options.concurrency) as ask:
            for task in options.tasks:
                start = time.monotonic()
                new = []
                for result in evaluate(ask, way, task, options.problems, known):
                    new.append(result)
                    if options.results is not None:
                        with options.results.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(asdict(result)) + "\n")
                results += new
                right = sum(result.is_right for result in new)
                seconds = time.monotonic() - start
                print(f"  {way} {task}: {right} of {len(new)} in {seconds:.0f} s", flush=True)
    show(results, options.ways, options.tasks)


def read_results(file: Path | None) -> list[Result]:
    if file is None or not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        Result(**{**line, "drafts": line["drafts"] and tuple(line["drafts"])}) for line in lines
    ]


def show(results: Sequence[Result], ways: Sequence[str], tasks: Sequence[str]) -> None:
    """The table: percent right by task and way, and what a way lost and won against the first."""
    right = {result.key: result.is_right for result in results}
    first = ways[0]
    print(f"| task | n | {first} | " + " | ".join(f"{way} (lost, won)" for way in ways[1:]) + " |")
    print("|---|---|---|" + "---|" * len(ways[1:]))
    for task in tasks:
        numbers = [number for way, of, number in right if (way, of) == (first, task)]
        if not numbers:
            continue
        share = 100 * sum(right[first, task, i] for i in numbers) / len(numbers)
        cells = [f"{share:.1f}"]
        for way in ways[1:]:
            both = [i for i in numbers if (way, task, i) in right]
            if not both:
                cells.append("")
                continue
            lost = sum(right[first, task, i] and not right[way, task, i] for i in both)
            won = sum(right[way, task, i] and not right[first, task, i] for i in both)
            share = 100 * sum(right[way, task, i] for i in both) / len(both)
            count = "" if len(both) == len(numbers) else f" of {len(both)}"
            cells.append(f"{share:.1f}{count} ({lost}, {won})")
        print(f"| {task} | {len(numbers)} | " + " | ".join(cells) + " |")
    drafts = [result.drafts for result in results if result.drafts is not None]
    if drafts:
        good, count = (sum(part) for part in zip(*drafts, strict=True))
        print(f"\nThe draft layer foresaw {100 * good / count:.2f} % of {count} tokens.")


if __name__ == "__main__":
    main()
