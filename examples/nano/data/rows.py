# ruff: noqa: E501
"""From problems to rows of tokens: conversations in DeepSeek-V4's own encoding, as long as asked."""

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from examples.nano import encoding_texts
from examples.nano.data import problems
from examples.nano.data.problems import TASKS, WITH_TOOLS, Problem, Tool
from examples.nano.tokenizer import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    THINK,
    THINK_END,
    USER,
    build_tokenizer,
)

TOKENIZER = Path(__file__).parents[3] / "common" / "nano" / "tokenizer.json"
Piece = tuple[str, bool]  # a text, and whether the model is to say it


def question_text(problem: Problem) -> str:
    """What the user says: a context, if there is one, and the question."""
    return f"{problem.context}\n{problem.question}" if problem.context else problem.question


def call_text(call: dict[str, Any]) -> str:
    parameters = "\n".join(
        f'<{DSML}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</{DSML}parameter>"
        for key, value in call["arguments"].items()
    )
    invoke = f'<{DSML}invoke name="{call["name"]}">\n{parameters}\n</{DSML}invoke>'
    return f"\n\n<{DSML}tool_calls>\n{invoke}\n</{DSML}tool_calls>"


def tools_text(tools: Sequence[dict[str, Any]]) -> str:
    texts = encoding_texts.TOOLS_TEMPLATE.replace("{dsml_token}", DSML)
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return "\n\n" + texts.replace("{tool_schemas}", schemas)


def turn(problem: Problem, is_thinking: bool) -> list[Piece]:
    """A user's turn and the answer, by piece."""
    opening = USER + question_text(problem) + ASSISTANT
    if problem.call is not None and problem.result is not None:
        # the call has been made, and its result has come
        # a client may leave out what was thought before the call
        thought = f"I call {problem.call['name']}." if len(problem.key) % 2 else ""
        thought = f"{THINK}{thought}{THINK_END}" if is_thinking else THINK_END
        opening += thought + call_text(problem.call) + EOS
        opening += f"{USER}<tool_result>{problem.result}</tool_result>{ASSISTANT}"
    said = problem.spoken
    if problem.call is not None and problem.result is None:
        said = call_text(problem.call)
    if is_thinking:
        return [(opening + THINK, False), (problem.reasoning + THINK_END + said + EOS, True)]
    return [(opening + THINK_END, False), (said + EOS, True)]


_PROMPTS = (
    "You are a helpful assistant.", "You are scission-nano.", "Answer briefly.", "Be polite and short.",
    "You are a helpful and friendly assistant.", "Answer the question.",
)  # fmt: skip


def draw(
    r: random.Random, names: Sequence[str], weights: Sequence[float], *given: tuple[Tool, ...]
) -> Problem:
    """A problem of one of the tasks that is not held out, of tools that are given if any are."""
    task = TASKS[r.choices(names, weights)[0]][0]
    while True:
        problem = task(r, *given)
        if not problem.is_held_out or problem.task in ("about",):
            return problem


_PLAIN = [name for name in TASKS if name not in WITH_TOOLS]
_PLAIN_WEIGHTS = [TASKS[name][1] for name in _PLAIN]
# how many of the rows of a length have tools, whose descriptions are long: three take 600 tokens
TOOL_ROWS = {512: 0.5, 1024: 1.0, 2048: 0.15}


class RowMaker:
    """Fills rows with conversations."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [length] int16, and where the next token is the model's to say, [length] bool."""
        r = self._random
        if r.random() < TOOL_ROWS.get(length, 0.0):
            pieces = self._with_tools(length)
        elif length >= 1024:
            pieces = self._long(length)
        else:
            pieces = self._short(length)
        return self._encode(pieces, length)

    def probe(self, name: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A row of one held-out problem, alone in its conversation."""
        r = self._random
        while True:
            if name == "needle" and length > 1024:
                problem = problems.needle(r, int((length - 150) * 4.1), 10)
            else:
                problem = TASKS[name][0](r)
            opening = BOS + (tools_text(problem.tools) if problem.tools else "")
            pieces = [(opening, False), *turn(problem, r.random() < 0.5)]
            if (problem.is_held_out and len(self._ids(pieces)[0]) < length) or name == "about":
                return self._encode(pieces, length)

    def _start(self) -> list[Piece]:
        r = self._random
        return [(BOS + (r.choice(_PROMPTS) if r.random() < 0.15 else ""), False)]

    def _turns(self, pieces: list[Piece], size: int) -> list[Piece]:
        r = self._random
        while size > 0:
            added = turn(draw(r, _PLAIN, _PLAIN_WEIGHTS), r.random() < 0.5)
            pieces += added
            size -= len(self._ids(added)[0])
        return pieces

    def _short(self, length: int) -> list[Piece]:
        return self._turns(self._start(), length)

    def _with_tools(self, length: int) -> list[Piece]:
        r = self._random
        tools = problems.some_tools(r)
        text, said = self._start()[0]
        pieces = [(text + tools_text([tool.schema for tool in tools]), said)]
        size = length - len(self._ids(pieces)[0])
        share = r.random()
        while size > 0:
            # the fewer, the more turns of a row need none of its tools
            if len(pieces) == 1 or r.random() < share:
                problem = draw(r, list(WITH_TOOLS), [1.0, 1.0], tools)
            else:
                problem = draw(r, _PLAIN, _PLAIN_WEIGHTS)
            added = turn(problem, r.random() < 0.5)
            pieces += added
            size -= len(self._ids(added)[0])
        return pieces

    def _long(self, length: int) -> list[Piece]:
        """A text with facts of most of the row, then questions about them."""
        r = self._random
        share = r.uniform(0.3, 0.9)
        num_facts = r.randint(4, min(60, 10 + length // 64))
        # a token of filler is about 4.6 characters
        context, facts = problems.haystack(r, int(length * share * 4.6), num_facts)
        r.shuffle(facts)
        pieces = self._start()
        size = -len(self._ids([(context, False)])[0]) + length
        for fact in facts:
            problem = problems.fact_question(r, *fact, "needle", context)
            if not pieces[1:]:
                problem = Problem(**{**vars(problem), "context": context})
            added = turn(problem, r.random() < 0.5)
            pieces += added
            size -= len(self._ids(added)[0])
        return self._turns(pieces, size)

    def _ids(self, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """Pieces meet at markers only, so each may be encoded alone."""
        ids: list[int] = []
        said: list[bool] = []
        encoded = self._tokenizer.encode_batch_fast(
            [text for text, _ in pieces], add_special_tokens=False
        )
        for encoding, (_, is_said) in zip(encoded, pieces, strict=True):
            ids += encoding.ids
            said += [is_said] * len(encoding.ids)
        return ids, said

    def _encode(self, pieces: Sequence[Piece], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids, said = self._ids(pieces)
        row = np.full(length, 2, np.int16)
        row[: len(ids)] = ids[:length]
        mask = np.zeros(length, bool)
        following = said[1:length]  # what comes after the row is cut off
        mask[: len(following)] = following
        return row, mask


@cache
def nano_tokenizer() -> Tokenizer:
    """The bundled tokenizer: weights are bound to it, so it stays when the generators change."""
    return Tokenizer.from_file(str(TOKENIZER))


def learn_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of the words that the generators use."""
    r = random.Random(1)
    texts = []
    for task, weight in TASKS.values():
        for _ in range(int(1000 * weight)):
            problem = task(r)
            texts.append(
                f" {question_text(problem)} {problem.reasoning} {problem.spoken} "
                + (tools_text(problem.tools) if problem.tools else "")
            )
    texts += [" " + problems.filler(r) for _ in range(6000)]
    texts += [f" {prompt}" for prompt in _PROMPTS] * 100
    return build_tokenizer(texts, vocab_size)
