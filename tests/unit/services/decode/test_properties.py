"""Whatever happens in whatever order: nothing is lost, and no token is wrong."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scission.common.errors import ScissionError
from scission.common.transfer.events import TransferHandle
from tests.unit.services.decode.bed import Bed, expected_tokens

NAMES = ("a", "b", "c", "d")
PROMPTS = {"a": [1, 2, 3], "b": [4] * 4, "c": [5, 6] * 5, "d": [7]}
PARAMS: dict[str, dict[str, Any]] = {
    "a": {"max_tokens": 12},
    "b": {"max_tokens": 9, "temperature": 1.0, "seed": 5, "repetition_penalty": 1.2},
    "c": {"max_tokens": 20, "temperature": 0.8, "num_choices": 2, "top_k": 20},
    "d": {"max_tokens": 7, "num_choices": 3, "temperature": 1.0, "presence_penalty": 0.5},
}
EVENTS = ("submit", "reserve", "ship", "turn", "turn", "turn", "cancel", "choice", "lose", "wait")


def play(bed: Bed, events: list[tuple[str, str]], *, with_attempts: bool) -> None:
    """Let things happen to four requests; then end them all."""
    attempts = dict.fromkeys(NAMES, -1)
    handles: dict[str, TransferHandle] = {}
    for event, name in events:
        attempt = attempts[name]
        match event:
            case "submit" if with_attempts or attempt < 0:
                attempts[name] += 1
                handles.pop(name, None)
                bed.submit(
                    name, PROMPTS[name], attempt=attempts[name], timeout_s=60, **PARAMS[name]
                )
            case "reserve" if attempt >= 0 and name not in handles:
                handles[name] = bed.reserve(name, attempt=attempt)
            case "ship" if name in handles and handles[name] in bed.receiver.granted:
                if all(d.handle != handles[name] for d in bed.receiver.deliveries):
                    bed.ship(handles[name])
            case "turn":
                bed.engine.turn()
            case "cancel" if attempt >= 0:
                bed.cancel(name, attempt=attempt)
            case "choice" if attempt >= 0:
                bed.cancel(name, attempt=attempt, choice=0)
            case "lose" if name in handles:
                over = {*bed.receiver.aborted, *bed.receiver.refused, *bed.receiver.committed}
                if handles[name] not in over:
                    bed.fail(handles[name], "peer_lost")
            case "wait":
                bed.now += 3.0
        bed.engine.blocks.check()
        bed.engine.slots.check()
    bed.turns(60)
    bed.now += 61
    bed.engine.turn()


def check_tokens(bed: Bed) -> None:
    for (name, attempt), asked in bed.asked.items():
        for choice, tokens in bed.tokens(name, attempt).items():
            expected = expected_tokens(asked.prompt, asked.params, choice)[1:]
            assert tokens == expected[: len(tokens)]


BOTH = pytest.mark.parametrize("is_captured", [False, True], ids=["chunked", "captured"])
ORDERS = st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from(NAMES)), max_size=60)


@BOTH
@settings(max_examples=150)
@given(ORDERS, st.integers(8, 14))
def test_any_order_of_events_frees_everything_and_gives_right_tokens(
    is_captured: bool, events: list[tuple[str, str]], num_blocks: int
) -> None:
    bed = Bed(
        num_blocks=num_blocks,
        num_slots=5,
        growth_tokens=3,
        max_model_len=40,
        is_captured=is_captured,
    )
    play(bed, events, with_attempts=True)
    assert bed.engine.is_idle
    bed.check_all_free()
    check_tokens(bed)
    for asked in bed.asked.values():
        assert len(asked.replies) == 1


@BOTH
@settings(max_examples=40)
@given(ORDERS)
def test_every_attempt_ends_once_at_most_and_says_nothing_after(
    is_captured: bool, events: list[tuple[str, str]]
) -> None:
    bed = Bed(
        num_blocks=10, num_slots=4, growth_tokens=3, max_model_len=40, is_captured=is_captured
    )
    play(bed, events, with_attempts=False)
    for name, attempt in bed.asked:
        kinds = bed.kinds(name, attempt)
        ends = [kind for kind in kinds if kind in ("ended", "retry", "failed")]
        assert len(ends) <= 1
        assert not ends or kinds[-1] == ends[0]
        assert "tokens" not in kinds or kinds[0] == "committed"


@BOTH
@settings(max_examples=40)
@given(st.permutations(NAMES), st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_tokens_do_not_depend_on_batch_mates(
    is_captured: bool, order: list[str], pauses: list[int]
) -> None:
    bed = Bed(num_blocks=200, is_captured=is_captured)
    for name, pause in zip(order, pauses, strict=True):
        bed.start(name, PROMPTS[name], **PARAMS[name])
        bed.turns(pause)
    bed.finish_all()
    for name in NAMES:
        asked = bed.asked[name, 0]
        assert not isinstance(asked.replies[0], ScissionError)
        assert bed.tokens(name) == {
            choice: expected_tokens(asked.prompt, asked.params, choice)[1:]
            for choice in range(asked.num_choices)
        }


@BOTH
@settings(max_examples=40)
@given(st.sampled_from(NAMES), st.data())
def test_replaying_any_prefix_of_an_output_reproduces_the_rest(
    is_captured: bool, name: str, data: st.DataObject
) -> None:
    bed = Bed(num_blocks=200, is_captured=is_captured)
    params = PARAMS[name]
    asked = bed.submit(name, PROMPTS[name], **params)
    whole = [
        expected_tokens(asked.prompt, asked.params, choice) for choice in range(asked.num_choices)
    ]
    known = [data.draw(st.integers(0, len(tokens) - 2)) for tokens in whole]
    forced = [tokens[:count] for tokens, count in zip(whole, known, strict=True)]
    bed.start(name, PROMPTS[name], attempt=1, forced=forced, **params)
    bed.finish_all()
    tokens = bed.tokens(name, 1)
    for choice, output in enumerate(whole):
        # the prefill draws where its state ends: it computes the forced tokens of a single choice
        is_drawn = asked.num_choices == 1 or known[choice] == 0
        assert tokens[choice] == output[known[choice] + is_drawn :]
