"""The engine one step behind its device: what ends while a step runs takes nothing of others, and
gives everything back once that step is over.
"""

from typing import Any

import pytest
from torch import Tensor

from scission.common.cache.block_pool import State
from tests.unit.services.decode.bed import BLOCK, EOS, Bed, expected_tokens


def behind(**options: Any) -> Bed:
    return Bed(is_captured=True, **options)


def prompt_that_stops(at_least: int = 2) -> list[int]:
    """A prompt whose greedy output meets an end-of-sequence after some tokens."""
    for first in range(1, 400):
        prompt = [1 + first % 36, 1 + first // 36, 7]
        params = Bed().submit("x", prompt, ignore_eos=False, max_tokens=9).params
        tokens = expected_tokens(prompt, params)
        if at_least < len(tokens) < 8 and tokens[-1] == EOS:
            return prompt
    raise AssertionError("no such prompt")


def test_tokens_come_a_turn_later_and_all_the_same() -> None:
    bed = behind()
    asked = bed.start("a", max_tokens=6)
    assert bed.kinds("a") == ["committed"]
    bed.engine.turn()
    assert bed.kinds("a") == ["committed", "tokens"]
    bed.finish_all()
    assert bed.tokens("a") == {0: expected_tokens(asked.prompt, asked.params)[1:]}
    bed.check_all_free()


def test_a_length_that_is_known_beforehand_costs_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    bed = behind()
    passes = []
    forward = bed.model.forward

    def counted(*args: Any) -> Tensor:
        passes.append(args)
        return forward(*args)

    monkeypatch.setattr(bed.model, "forward", counted)
    bed.start("a", max_tokens=6)
    bed.finish_all()
    assert len(passes) == 5  # the first token is the prefill's


def test_a_stop_that_is_not_drops_one_token_and_frees_its_blocks_after_it() -> None:
    bed = behind()
    prompt = prompt_that_stops()
    asked = bed.start("a", prompt, max_tokens=50, ignore_eos=False)
    while "ended" not in bed.kinds("a"):
        assert bed.engine.blocks.counts()[State.ACTIVE]
        bed.engine.turn()
    # a step of it is under way still: nobody else may have its blocks
    assert bed.engine.blocks.counts()[State.ACTIVE]
    assert not bed.engine.is_idle
    bed.engine.turn()
    bed.check_all_free()
    assert bed.engine.is_idle
    assert bed.tokens("a") == {0: expected_tokens(prompt, asked.params)[1:]}


def test_a_cancelled_sequence_holds_its_blocks_until_its_step_is_over() -> None:
    bed = behind()
    other = bed.start("b", [9] * (BLOCK + 1), max_tokens=20)
    bed.start("a", max_tokens=50)
    before = bed.engine.blocks.num_free
    bed.cancel("a")
    bed.engine.turn()
    # the step that was under way has been collected in this turn, after another was submitted
    bed.engine.turn()
    assert bed.engine.blocks.num_free > before
    tokens = bed.tokens("a")
    bed.finish_all()
    assert bed.tokens("a") == tokens
    assert bed.tokens("b") == {0: expected_tokens(other.prompt, other.params)[1:]}
    bed.check_all_free()


def test_blocks_that_run_short_are_looked_for_in_what_ends_first() -> None:
    bed = behind(num_blocks=6, growth_tokens=1, max_model_len=24)
    asked = bed.start("old", [1] * 8, max_tokens=15)
    bed.now += 1
    bed.start("young", [2] * 8, max_tokens=15)
    bed.finish_all()
    assert bed.tokens("old") == {0: expected_tokens(asked.prompt, asked.params)[1:]}
    retry = bed.retry("young")
    assert retry is not None and retry.reason == "preempted"
    bed.check_all_free()


def test_a_failed_step_sends_back_all_and_frees_what_was_under_way() -> None:
    bed = behind()
    bed.start("a", max_tokens=50)
    bed.turns(3)
    bed.model.fails = 1
    bed.engine.turn()
    retry = bed.retry("a")
    assert retry is not None and retry.reason == "engine_error"
    bed.check_all_free()
    asked = bed.start("b", max_tokens=9)
    bed.finish_all()
    assert bed.tokens("b") == {0: expected_tokens(asked.prompt, asked.params)[1:]}


def test_draws_that_need_the_host_wait_for_nobody_else() -> None:
    bed = behind()
    plain = bed.start("a", max_tokens=30)
    special = bed.start("b", [4, 5], max_tokens=9, temperature=1.0, seed=3, presence_penalty=0.5)
    held = bed.start("c", [6, 5], max_tokens=12, ignore_eos=False, min_tokens=10)
    bed.finish_all()
    for asked in (plain, special, held):
        expected = expected_tokens(asked.prompt, asked.params)[1:]
        assert bed.tokens(asked.request_id) == {0: expected}
    bed.check_all_free()


def test_stopping_leaves_nothing_under_way() -> None:
    bed = behind()
    bed.start("a", max_tokens=50)
    bed.turns(2)
    bed.engine.stop()
    bed.engine.run()
    bed.check_all_free()
