"""What a sequence's parameters mean for its draws, and when a choice ends."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scission.common.errors import RequestError
from scission.common.sampling import (
    SequenceSampling,
    check_sampling,
    finish_reason,
    prompt_logprobs,
    sample,
)
from scission.common.types import Finish, FinishReason, SamplingParams

VOCAB = 61


def logits_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed))


def sequence(
    *, choice: int = 0, prompt: tuple[int, ...] = (1, 2, 3), **params: Any
) -> SequenceSampling:
    params.setdefault("max_tokens", 16)
    params.setdefault("temperature", 0.0)
    return SequenceSampling(SamplingParams(**params), choice, prompt, eos_token_ids={0})


def tokens_of(logits: torch.Tensor, *sequences: SequenceSampling) -> list[int]:
    return [token_id for token_id, _ in sample(logits, sequences)]


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "top_k": st.sampled_from([0, 5]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "logit_bias": st.sampled_from([{}, {5: 3.0}]),
        "allowed_token_ids": st.sampled_from([(), (3, 4, 5, 6)]),
        "bad_token_ids": st.sampled_from([(), (4,)]),
        "min_tokens": st.sampled_from([0, 4]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(PARAMS, min_size=2, max_size=6), st.integers(0, 3))
def test_a_sequence_draws_the_same_beside_any_batch_mates(
    params: list[dict[str, Any]], steps: int
) -> None:
    logits = logits_of(len(params))
    sequences = [sequence(**p) for p in params]
    for s in sequences:
        for token_id in range(steps):
            s.append(token_id)
    together = sample(logits, sequences)
    assert together == [sample(logits[i : i + 1].clone(), [s])[0] for i, s in enumerate(sequences)]


def test_draws_depend_on_seed_choice_and_position() -> None:
    flat = torch.zeros(1, VOCAB)
    first = tokens_of(flat, sequence(temperature=1.0, seed=7))
    assert first == tokens_of(flat, sequence(temperature=1.0, seed=7))
    later = sequence(temperature=1.0, seed=7)
    later.append(1)
    others = [
        tokens_of(flat, sequence(temperature=1.0, seed=8)),
        tokens_of(flat, sequence(temperature=1.0, seed=7, choice=1)),
        tokens_of(flat, later),
    ]
    assert first not in others


def test_plain_greedy_rows_are_not_adjusted() -> None:
    assert sequence().is_plain
    assert sequence(top_p=0.5, top_k=3, min_p=0.2, logprobs=5).is_plain
    for special in (
        {"logit_bias": {1: 1.0}},
        {"presence_penalty": 0.1},
        {"min_tokens": 1},
        {"temperature": 1.0},
    ):
        assert not sequence(**special).is_plain


def test_end_of_sequence_and_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 0], logits[0, 9], logits[0, 3] = 9.0, 8.0, 7.0
    s = sequence(min_tokens=1, stop_token_ids=(9,))
    assert tokens_of(logits, s) == [3]
    s.append(3)
    assert tokens_of(logits, s) == [0]
    assert tokens_of(logits, sequence(min_tokens=1, ignore_eos=True)) == [0]


def test_penalties_see_prompt_and_output_as_defined() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 1], logits[0, 7], logits[0, 8] = 2.0, 1.8, 1.5
    assert tokens_of(logits, sequence(presence_penalty=1.0)) == [1]  # token 1 is in the prompt only
    assert tokens_of(logits, sequence(repetition_penalty=1.2)) == [7]
    s = sequence(frequency_penalty=0.2)
    for expected in (1, 1, 7, 1, 8):
        # 2.0 -> 1.8, tied with 7 and the lower id -> 1.6 against 1.8 -> 1.6 each, 1 first -> 1.4
        # against 1.5
        if expected == 8:
            logits[0, 7] = 0.0
        assert tokens_of(logits, s) == [expected]
        s.append(expected)


def test_logprobs_are_raw_whatever_was_drawn() -> None:
    logits = logits_of(1)
    ((drawn, logprobs),) = sample(
        logits, [sequence(temperature=2.0, logit_bias={11: 100.0}, logprobs=2)]
    )
    assert drawn == 11
    raw = logits.log_softmax(-1)[0]
    assert logprobs is not None
    assert logprobs.logprob == raw[11].item()
    assert logprobs.rank == int((raw > raw[11]).sum()) + 1
    assert list(logprobs.top_ids) == raw.topk(2).indices.tolist()


def test_each_row_gets_the_alternatives_it_asked_for() -> None:
    drawn = sample(logits_of(4), [sequence(logprobs=k) for k in (None, 0, 3, 5)])
    assert [None if lp is None else len(lp.top_ids) for _, lp in drawn] == [None, 0, 3, 5]


def test_prompt_logprobs_of_minus_one_cover_the_vocabulary() -> None:
    logits = logits_of(2)
    whole = prompt_logprobs(logits, [4, 5], -1)
    assert [len(entry.top_ids) for entry in whole] == [VOCAB, VOCAB]
    assert [entry.logprob for entry in whole] == logits.log_softmax(-1)[[0, 1], [4, 5]].tolist()
    assert prompt_logprobs(logits[:0], [], 1) == []


STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.mark.parametrize(
    ("params", "tokens", "context_len", "expected"),
    [
        ({}, [5], 4, None),
        ({}, [0], 4, Finish(0, STOP, None, 1)),
        ({"ignore_eos": True}, [0], 4, None),
        ({"stop_token_ids": (7,)}, [7], 4, Finish(0, STOP, 7, 1)),
        ({"stop_token_ids": (0,), "ignore_eos": True}, [0], 4, Finish(0, STOP, 0, 1)),
        ({"max_tokens": 2}, [5, 5], 5, Finish(0, LENGTH, None, 2)),
        ({"max_tokens": 2}, [5, 0], 5, Finish(0, STOP, None, 2)),
        ({"min_tokens": 2}, [0], 4, None),
        ({}, [5], 32, Finish(0, LENGTH, None, 1)),
    ],
    ids=str,
)
def test_finish_reasons(
    params: dict[str, Any], tokens: list[int], context_len: int, expected: Finish | None
) -> None:
    s = sequence(**params)
    for token_id in tokens:
        s.append(token_id)
    assert finish_reason(s, tokens[-1], {0}, context_len, 32) == expected


@pytest.mark.parametrize(
    "params",
    [{"logit_bias": {99: 1.0}}, {"allowed_token_ids": (-1,)}, {"stop_token_ids": (VOCAB,)}],
    ids=str,
)
def test_unknown_token_ids_are_refused_by_name(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(params))} names token"):
        check_sampling(SamplingParams(max_tokens=1, **params), VOCAB)
