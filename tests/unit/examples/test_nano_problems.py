"""What scission-nano is trained on: held-out problems stay out, prompts are the served ones."""

import asyncio
import json
import random

import numpy as np
import pytest
import torch

from examples.nano.data.problems import LONG_CONTEXT, TASKS, WITH_TOOLS, Problem
from examples.nano.data.rows import RowMaker, draw, nano_tokenizer, tools_text, turn
from examples.nano.evaluate import NEEDLES, held_out, is_right, request
from examples.nano.network import best_entries
from examples.nano.tokenizer import ASSISTANT, BOS
from examples.nano.train import leave_out_if_not_finite
from scission.common.config import ModelOptions
from scission.common.model_source import BUNDLED
from scission.services.gateway.model_folder import read_model_folder
from scission.services.gateway.openai.conversation import read_conversation
from scission.services.gateway.openai.schemas import ConversationBody

TYPES = {"string": str, "integer": int}


@pytest.mark.parametrize("task", [task for task in TASKS if task != "about"])
def test_training_never_draws_a_problem_of_the_evaluation(task: str) -> None:
    r = random.Random(3)
    drawn = {draw(r, [task], [1.0]).key for _ in range(400)}
    asked = held_out(task, 30)
    assert asked and all(problem.is_held_out for problem in asked)
    assert drawn.isdisjoint(problem.key for problem in asked)


def test_a_long_text_is_asked_for_different_facts() -> None:
    asked = held_out("needle-2k", 20)
    assert len({problem.context for problem in asked}) == 2
    assert len({(problem.context, problem.question) for problem in asked}) == 20
    ids = nano_tokenizer().encode(asked[0].context).ids
    assert NEEDLES["needle-2k"] * 0.95 < len(ids) < NEEDLES["needle-2k"] * 1.05


@pytest.mark.parametrize("task", WITH_TOOLS)
def test_a_call_is_what_its_schema_says(task: str) -> None:
    r = random.Random(4)
    for _ in range(300):
        problem = TASKS[task][0](r)
        assert problem.call is not None
        (tool,) = [tool for tool in problem.tools if tool["name"] == problem.call["name"]]
        properties = tool["parameters"]["properties"]
        arguments = problem.call["arguments"]
        assert list(arguments) == tool["parameters"]["required"] == list(properties)
        for name, value in arguments.items():
            assert type(value) is TYPES[properties[name]["type"]]


def test_a_row_of_1024_tokens_holds_three_tools_and_the_last_answer() -> None:
    r, tokenizer = random.Random(5), nano_tokenizer()
    for _ in range(300):
        problem = TASKS["tool_result"][0](r)
        text = tools_text(problem.tools) + "".join(piece for piece, _ in turn(problem, True))
        assert len(tokenizer.encode(text).ids) < 1024


@pytest.mark.parametrize("length", [256, 512, 1024, 2048])
def test_a_row_asks_for_nothing_past_its_end(length: int) -> None:
    maker = RowMaker(nano_tokenizer(), 6)
    for _ in range(8):
        ids, mask = maker.row(length)
        assert ids.shape == mask.shape == (length,)
        assert not mask[-1]
        # a conversation's start is never said
        assert not np.any(ids[1:][mask[:-1]] == nano_tokenizer().token_to_id(BOS))


@pytest.mark.parametrize("is_thinking", [False, True], ids=["direct", "thinking"])
@pytest.mark.parametrize("task", TASKS)
def test_a_trained_prompt_is_the_served_one(task: str, is_thinking: bool) -> None:
    chat_format = read_model_folder(ModelOptions(BUNDLED)).chat_format
    r = random.Random(7)
    for _ in range(5):
        problem: Problem = TASKS[task][0](r)
        (opening, _), (said, _) = turn(problem, is_thinking)
        body = ConversationBody.model_validate(request(problem, is_thinking=is_thinking))
        rendered = asyncio.run(chat_format.render(read_conversation(body)))
        tools = tools_text(problem.tools) if problem.tools else ""
        served = rendered.prompt
        if problem.result is not None and is_thinking:
            # the request leaves out what was thought before the call, as a part of the rows does
            last = opening.rindex(ASSISTANT)
            first = opening.index(ASSISTANT)
            head, call = opening[:first], opening[opening.index("</think>") : last]
            opening = f"{head}{ASSISTANT}<think>{call}{opening[last:]}"
        assert served == BOS + tools + opening
        assert said


@pytest.mark.parametrize("task", [*LONG_CONTEXT, "add", "json", "tool_call"])
def test_the_right_answer_counts_and_another_does_not(task: str) -> None:
    problem = TASKS[task][0](random.Random(8))
    right = {"content": problem.answer, "tool_calls": []}
    wrong = {"content": problem.answer + "0"}
    if problem.call is not None:
        function = {
            "name": problem.call["name"],
            "arguments": json.dumps(problem.call["arguments"]),
        }
        right["tool_calls"] = [{"function": function}]
    assert is_right(problem, right)
    assert not is_right(problem, wrong)


def test_a_gradient_that_is_not_finite_is_left_out_with_its_layer() -> None:
    stack, scale = torch.zeros(2, 3), torch.zeros(2)
    stack.grad = torch.tensor([[1.0, float("nan"), 2.0], [3.0, 4.0, 5.0]])
    scale.grad = torch.tensor([float("inf"), 1.0])
    assert int(leave_out_if_not_finite({"stack": stack, "scale": scale})) == 2
    assert stack.grad.tolist() == [[0, 0, 0], [3, 4, 5]]
    assert scale.grad.tolist() == [0, 1]


def test_of_equal_scores_the_first_entries_are_best() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    assert best_entries(scores, 3).tolist() == [
        [True, True, False, True, False],
        [True, True, True, False, False],
    ]
