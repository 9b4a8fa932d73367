"""A request's life in the decode engine: announced, granted, arrived, decoded, ended; or not."""

from collections.abc import Sequence
from typing import Any

import pytest

from scission.common.cache.block_pool import State
from scission.common.errors import (
    CancelledError,
    CapacityError,
    ContextLengthError,
    EngineError,
    RequestError,
    ScissionError,
    UnavailableError,
)
from scission.common.model.batch import SequenceChunk
from scission.protos import inference_pb2, transfer_pb2
from tests.unit.services.decode.bed import BLOCK, EOS, Bed, Delivery, expected_tokens, first_token


def test_a_request_decodes_what_the_model_gives() -> None:
    bed = Bed()
    asked = bed.start("a", [3, 1, 4, 1, 5], max_tokens=20)
    bed.finish_all()
    # the first token is the prefill's and is not sent again
    assert bed.tokens("a") == {0: expected_tokens(asked.prompt, asked.params)[1:]}
    assert bed.events("a")[1].tokens.tokens[0].index == 1
    assert bed.kinds("a") == ["committed", "tokens", "ended"]
    bed.check_all_free()


def test_a_step_advances_every_sequence_by_one_token() -> None:
    bed = Bed()
    for name in "abc":
        bed.start(name, [ord(name) % 30, 2], max_tokens=30)
    before = {name: len(bed.tokens(name)[0]) for name in "abc"}
    bed.turns(5)
    assert {name: len(bed.tokens(name)[0]) for name in "abc"} == {n: before[n] + 5 for n in "abc"}


def test_nothing_is_held_until_the_reservation() -> None:
    bed = Bed()
    bed.submit("a")
    bed.engine.turn()
    bed.check_all_free()


def test_no_token_before_the_commit() -> None:
    bed = Bed()
    bed.submit("a")
    handle = bed.reserve("a")
    bed.turns(3)
    assert bed.events("a") == []
    bed.ship(handle)
    bed.engine.turn()
    assert bed.receiver.committed == [handle]
    assert bed.kinds("a") == ["committed", "tokens"]


def test_choices_are_forked_from_one_state_and_share_full_blocks() -> None:
    bed = Bed()
    prompt = list(range(1, 2 * BLOCK + 2))
    asked = bed.start("a", prompt, num_choices=3, temperature=1.0, seed=11, max_tokens=8)
    # two shared blocks, and for each choice what 16 - 8 tokens need
    assert bed.engine.blocks.total - bed.engine.blocks.num_free == 2 + 3 * 2
    bed.finish_all()
    assert bed.tokens("a") == {
        choice: expected_tokens(prompt, asked.params, choice)[1:] for choice in range(3)
    }
    bed.check_all_free()


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_forks_at_and_beside_a_block_boundary_are_right(length: int) -> None:
    bed = Bed()
    prompt = list(range(1, length + 1))
    asked = bed.start("a", prompt, num_choices=2, temperature=1.0, max_tokens=7)
    bed.finish_all()
    assert bed.tokens("a") == {c: expected_tokens(prompt, asked.params, c)[1:] for c in (0, 1)}


def test_forced_tokens_are_fed_and_never_sent_again() -> None:
    bed = Bed()
    asked = bed.start("a", max_tokens=10)
    bed.finish_all()
    whole = expected_tokens(asked.prompt, asked.params)
    again = bed.start("b", max_tokens=10, forced=[whole[:4]])
    bed.finish_all()
    assert bed.tokens("b") == {0: whole[5:]}
    assert bed.events("b")[1].tokens.tokens[0].index == 5
    assert again.forced == [whole[:4]]


def test_state_kept_from_before_the_forced_tokens_is_caught_up() -> None:
    bed = Bed()
    asked = bed.submit("a", max_tokens=10)
    whole = expected_tokens(asked.prompt, asked.params)
    bed.submit("b", max_tokens=10, forced=[whole[:4]])
    handle = bed.reserve("b", num_tokens=len(asked.prompt))
    bed.engine.turn()
    manifest = transfer_pb2.Manifest(num_tokens=len(asked.prompt))
    manifest.sequences.add(choice=0).tokens.add(choice=0, index=0, token_id=whole[0])
    bed.receiver.deliveries.append(Delivery(handle, asked.prompt, manifest))
    bed.turns(20)
    assert bed.tokens("b") == {0: whole[4:]}


def test_catching_up_is_bounded_and_does_not_stall_the_batch() -> None:
    batches: list[list[int]] = []

    def watch(chunks: Sequence[SequenceChunk]) -> None:
        batches.append([len(chunk.token_ids) for chunk in chunks])

    bed = Bed(num_blocks=600, max_model_len=1600, on_batch=watch)
    bed.start("a", max_tokens=1000)
    asked = bed.asked["a", 0]
    forced = [[1 + i % 30 for i in range(300)], [1 + i % 29 for i in range(400)]]
    bed.start("b", asked.prompt, num_choices=2, forced=forced, max_tokens=500)
    bed.turns(4)
    assert all(batch[0] == 1 for batch in batches)
    assert max(sum(batch[1:]) for batch in batches) <= 256
    # 300 + 400 tokens over three steps, then both advance by one token a step
    assert [1, 1, 1] in batches
    assert len(bed.tokens("b")[0]) > 0
    assert bed.events("b")[1].tokens.tokens[0].index == 300


def test_tokens_of_a_step_travel_in_one_message_per_gateway() -> None:
    bed = Bed()
    for name, gateway in (("a", 1), ("b", 1), ("c", 2)):
        bed.start(name, max_tokens=50, gateway=gateway)
    bed.streams.emitted.clear()
    bed.engine.turn()
    assert sorted((gateway, len(events)) for gateway, events in bed.streams.emitted) == [
        (1, 2),
        (2, 1),
    ]


def test_eos_ends_a_choice_and_others_go_on() -> None:
    bed = Bed()
    prompt = [2, 9]
    asked = bed.start(
        "a",
        prompt,
        num_choices=3,
        temperature=1.0,
        max_tokens=60,
        ignore_eos=False,
        logit_bias={EOS: 2.0},
    )
    bed.finish_all()
    assert bed.tokens("a") == {
        c: tokens[1:]
        for c in range(3)
        if len(tokens := expected_tokens(prompt, asked.params, c)) > 1
    }
    finishes = [f for event in bed.events("a") for f in event.tokens.finished]
    assert {f.reason for f in finishes} == {inference_pb2.FINISH_REASON_STOP}
    bed.check_all_free()


def test_a_choice_that_ended_at_its_first_token_is_not_decoded() -> None:
    bed = Bed()
    prompt = [4, 4]
    bed.submit("a", prompt, num_choices=2, temperature=1.0, max_tokens=4)
    params = bed.asked["a", 0].params
    first = first_token(prompt, params, 0)
    bed.submit("b", prompt, num_choices=2, temperature=1.0, max_tokens=4, stop_token_ids=(first,))
    handle = bed.reserve("b")
    bed.engine.turn()
    bed.ship(handle)
    bed.turns(8)
    assert set(bed.tokens("b")) == {1}
    assert bed.kinds("b")[-1] == "ended"


def test_the_context_ends_a_request() -> None:
    bed = Bed(max_model_len=12)
    asked = bed.start("a", list(range(1, 9)), max_tokens=50)
    bed.finish_all()
    assert bed.tokens("a") == {0: expected_tokens(asked.prompt, asked.params, 0, 12)[1:]}
    last = bed.events("a")[-2].tokens
    assert last.finished[0].reason == inference_pb2.FINISH_REASON_LENGTH
    assert last.finished[0].num_tokens == 4


def test_logprobs_come_with_the_tokens() -> None:
    bed = Bed()
    bed.start("a", logprobs=3)
    token = bed.events("a")[1].tokens.tokens[0]
    assert token.logprobs.rank == 1
    assert token.logprobs.top_ids[0] == token.token_id
    assert len(token.logprobs.top_logprobs) == 3


# Admission


def test_reservations_wait_for_room_and_are_granted_in_order() -> None:
    bed = Bed(num_blocks=4, growth_tokens=BLOCK, max_model_len=16)
    bed.start("a", [1] * 9, max_tokens=2)  # three of four blocks
    handles = []
    for name in "bc":
        bed.submit(name, [1] * 6, max_tokens=2)
        handles.append(bed.reserve(name))
        bed.engine.turn()
    # "a" has finished meanwhile
    assert list(bed.receiver.granted)[1:] == handles
    assert not bed.receiver.waits


@pytest.mark.parametrize("is_captured", [False, True], ids=["chunks", "one behind"])
def test_room_is_granted_in_the_turn_that_frees_it(is_captured: bool) -> None:
    bed = Bed(num_slots=1, is_captured=is_captured)
    bed.start("a", max_tokens=6)
    bed.submit("b")
    waiting = bed.reserve("b")
    bed.engine.turn()
    assert waiting in bed.receiver.waits
    while bed.engine.slots.counts()[State.ACTIVE]:
        bed.engine.turn()
    # the thread sleeps until the next beat after this turn: nothing runs any more
    assert waiting in bed.receiver.granted


def test_a_large_reservation_is_not_overtaken_by_small_ones() -> None:
    bed = Bed(num_blocks=6, growth_tokens=1, max_model_len=24)
    bed.start("a", [1] * 12, max_tokens=9)
    bed.submit("large", [1] * 15, max_tokens=2)
    bed.submit("small", [1] * 2, max_tokens=2)
    large, small = bed.reserve("large"), bed.reserve("small")
    bed.engine.turn()
    assert bed.receiver.waits == {large: 0, small: 1}
    while large not in bed.receiver.granted:
        assert small not in bed.receiver.granted
        bed.engine.turn()
    bed.engine.turn()
    assert small in bed.receiver.granted


def test_seniority_of_earlier_attempts_goes_first() -> None:
    bed = Bed(num_slots=1)
    bed.start("a", max_tokens=20)
    bed.submit("young")
    bed.submit("old", waited_s=30.0)
    young, old = bed.reserve("young"), bed.reserve("old")
    bed.engine.turn()
    assert bed.receiver.waits == {young: 0, old: 0}
    bed.cancel("a")
    bed.engine.turn()
    assert list(bed.receiver.granted)[1:] == [old]


def test_a_reservation_may_come_before_its_announcement() -> None:
    bed = Bed()
    asked = bed.submit("a")
    bed.inbox.drain(0)
    handle = bed.receiver.reserve("a", 0, len(asked.prompt))
    bed.engine.turn()
    assert bed.receiver.waits == {handle: 0}
    bed.submit("a")
    bed.engine.turn()
    assert handle in bed.receiver.granted


def test_a_reservation_that_nobody_announces_is_refused_after_its_time() -> None:
    bed = Bed(reserve_wait_s=1.0)
    handle = bed.receiver.reserve("a", 0, 3)
    bed.engine.turn()
    bed.turns(1, step_s=0.9)
    assert not bed.receiver.refused
    bed.turns(1, step_s=0.2)
    assert bed.receiver.refused == {handle: "unknown_request"}


def test_unannounced_reservations_hold_nobody_up() -> None:
    bed = Bed()
    bed.receiver.reserve("ghost", 0, 3)
    bed.submit("a")
    handle = bed.reserve("a")
    bed.engine.turn()
    assert handle in bed.receiver.granted


def test_a_full_queue_refuses() -> None:
    bed = Bed(max_queued=2)
    handles = [bed.receiver.reserve(f"ghost{i}", 0, 3) for i in range(3)]
    bed.engine.turn()
    assert bed.receiver.refused == {handles[2]: "full"}


def test_the_growth_reserve_is_bounded_by_max_tokens_and_the_setting() -> None:
    bed = Bed(growth_tokens=3 * BLOCK)
    bed.submit("short", [1] * BLOCK, max_tokens=2)
    bed.submit("long", [1] * BLOCK, max_tokens=100)
    bed.reserve("short")
    bed.engine.turn()
    free = bed.engine.blocks.num_free
    assert bed.engine.blocks.total - free == 2
    bed.reserve("long")
    bed.engine.turn()
    assert free - bed.engine.blocks.num_free == 4


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"prompt": [1] * 300}, ContextLengthError),
        ({"prompt": [99]}, RequestError),
        ({"prompt": []}, RequestError),
        ({"num_choices": 17}, ContextLengthError),
        ({"logit_bias": {99: 1.0}}, RequestError),
        ({"forced": [[1] * 300]}, ContextLengthError),
    ],
    ids=str,
)
def test_what_can_never_run_is_refused_at_once(
    kwargs: dict[str, Any], error: type[ScissionError]
) -> None:
    bed = Bed()
    asked = bed.submit("a", **kwargs)
    bed.engine.turn()
    assert isinstance(asked.replies[0], error)
    assert bed.engine.is_idle


def test_a_reservation_for_more_than_the_request_is_refused() -> None:
    bed = Bed()
    bed.submit("a")
    handle = bed.reserve("a", num_tokens=150)
    bed.engine.turn()
    assert bed.receiver.refused == {handle: "too_large"}
    bed.check_all_free()


def test_announcements_are_bounded() -> None:
    bed = Bed(max_queued=2, max_num_seqs=1)
    replies = [bed.submit(name).replies for name in "abcd"]
    bed.engine.turn()
    assert [isinstance(r[0], CapacityError) for r in replies] == [False, False, False, True]


# Preemption


def test_the_youngest_is_preempted_when_blocks_run_out() -> None:
    bed = Bed(num_blocks=6, growth_tokens=1, max_model_len=24)
    asked = bed.start("old", [1] * 8, max_tokens=15)
    bed.now += 1
    bed.start("young", [2] * 8, max_tokens=15)
    bed.finish_all()
    assert bed.tokens("old") == {0: expected_tokens(asked.prompt, asked.params)[1:]}
    retry = bed.retry("young")
    assert retry is not None and retry.reason == "preempted"
    assert bed.kinds("young")[-1] == "retry"
    bed.check_all_free()


def test_an_arriving_request_can_be_the_youngest() -> None:
    bed = Bed(num_blocks=6, growth_tokens=1, max_model_len=24)
    bed.start("old", [1] * 8, max_tokens=15)
    bed.now += 1
    bed.submit("young", [2] * 8, max_tokens=15)
    handle = bed.reserve("young")
    bed.finish_all()
    assert bed.receiver.aborted == {handle: "preempted"}
    assert bed.kinds("old")[-1] == "ended"


# Ends


def hand_over_to(bed: Bed, phase: str) -> None:
    """Bring request "a" into a phase."""
    bed.submit("a", max_tokens=50, timeout_s=10.0)
    if phase == "waiting":
        for i in range(bed.engine.slots.total):
            bed.start(f"other{i}", max_tokens=100)
    if phase != "announced":
        handle = bed.reserve("a")
        bed.engine.turn()
        if phase == "running":
            bed.ship(handle)
    bed.engine.turn()


PHASES = ["announced", "waiting", "arriving", "running"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("end", ["cancel", "gateway", "deadline", "supersede"])
def test_every_end_frees_everything_in_every_phase(phase: str, end: str) -> None:
    bed = Bed(num_slots=2)
    hand_over_to(bed, phase)
    others = bed.engine.slots.total - bed.engine.slots.num_free - (phase in ("arriving", "running"))
    match end:
        case "cancel":
            bed.cancel("a")
        case "gateway":
            bed.submit("mine", gateway=2)
            bed.gateway_gone(1)
            others = 0
        case "deadline":
            bed.now += 10.0
        case "supersede":
            bed.submit("a", attempt=1)
    bed.engine.turn()
    bed.streams.emitted.clear()
    bed.turns(3)
    assert bed.events("a") == []
    assert bed.engine.slots.total - bed.engine.slots.num_free == others
    bed.engine.blocks.check()
    if phase in ("waiting", "arriving"):
        assert len(bed.receiver.aborted) == 1


def test_the_deadline_is_told_as_a_failure() -> None:
    bed = Bed()
    hand_over_to(bed, "running")
    bed.now += 10.0
    bed.engine.turn()
    assert bed.events("a")[-1].failed.grpc_code == "DEADLINE_EXCEEDED"


def test_a_higher_attempt_supersedes_and_a_lower_one_is_refused() -> None:
    bed = Bed()
    bed.start("a", attempt=2, max_tokens=50)
    low = bed.submit("a", attempt=1)
    stale = bed.reserve("a", attempt=1)
    bed.engine.turn()
    assert isinstance(low.replies[0], CancelledError)
    assert bed.receiver.refused == {stale: "superseded"}
    high = bed.start("a", attempt=3)
    bed.finish_all()
    assert bed.kinds("a", 2) == ["committed", "tokens"]
    assert bed.tokens("a", 3) == {0: expected_tokens(high.prompt, high.params)[1:]}


def test_a_cancel_that_overtakes_its_submit_wins() -> None:
    bed = Bed()
    bed.cancel("a", attempt=1)
    asked = [bed.submit("a", attempt=attempt) for attempt in (0, 1, 2)]
    bed.engine.turn()
    assert [isinstance(a.replies[0], CancelledError) for a in asked] == [True, True, False]


def test_a_cancel_of_a_lower_attempt_changes_nothing() -> None:
    bed = Bed()
    bed.start("a", attempt=1)
    bed.cancel("a", attempt=0)
    bed.finish_all()
    assert bed.kinds("a", 1)[-1] == "ended"


def test_one_choice_can_be_cancelled() -> None:
    bed = Bed()
    asked = bed.start("a", num_choices=3, temperature=1.0, max_tokens=20)
    bed.cancel("a", choice=1)
    bed.finish_all()
    tokens = bed.tokens("a")
    for choice in (0, 2):
        assert tokens[choice] == expected_tokens(asked.prompt, asked.params, choice)[1:]
    assert len(tokens[1]) == 1
    bed.check_all_free()


@pytest.mark.parametrize("phase", PHASES)
def test_cancelling_all_choices_one_by_one_ends_the_request(phase: str) -> None:
    bed = Bed(num_slots=2)
    hand_over_to(bed, phase)
    bed.cancel("a", choice=0)
    bed.engine.turn()
    assert bed.events("a")[-1].WhichOneof("event") == "ended"


def test_choice_cancelled_while_its_state_arrives_is_never_run() -> None:
    bed = Bed()
    asked = bed.submit("a", num_choices=2, temperature=1.0)
    handle = bed.reserve("a")
    bed.engine.turn()
    bed.cancel("a", choice=0)
    bed.engine.turn()
    bed.ship(handle)
    bed.turns(10)
    assert bed.tokens("a") == {1: expected_tokens(asked.prompt, asked.params, 1)[1:]}
    bed.check_all_free()


@pytest.mark.parametrize("phase", ["waiting", "arriving", "running"])
@pytest.mark.parametrize(
    ("reason", "retried"),
    [("peer_lost", "peer_lost"), ("stalled", "transfer_failed"), ("finished", None)],
)
def test_a_lost_transfer_frees_and_is_told_unless_it_was_expected(
    phase: str, reason: str, retried: str | None
) -> None:
    bed = Bed(num_slots=2)
    hand_over_to(bed, phase)
    handle = next(h for h in (*bed.receiver.waits, *bed.receiver.granted) if h.request_id == "a")
    free = bed.engine.slots.num_free
    bed.abort(handle, reason)
    bed.engine.turn()
    retry = bed.retry("a")
    assert (retry.reason if retry else None) == retried
    assert bed.engine.slots.num_free == free + (phase != "waiting")
    bed.cancel("a")
    bed.turns(2)
    assert handle not in bed.receiver.aborted


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "num_tokens", 2),
        lambda m: setattr(m.sequences[0], "choice", 1),
        lambda m: setattr(m.sequences[0].tokens[0], "index", 1),
        lambda m: setattr(m.sequences[0].tokens[0], "token_id", 99),
        lambda m: m.sequences[0].ClearField("tokens"),
        lambda m: m.sequences.append(m.sequences[0]),
    ],
    ids=["num_tokens", "choice", "index", "token_id", "nothing_to_feed", "twice"],
)
def test_a_manifest_that_does_not_fit_is_never_committed(change: Any) -> None:
    bed = Bed()
    bed.submit("a")
    handle = bed.reserve("a")
    bed.engine.turn()
    bed.ship(handle)
    change(bed.receiver.deliveries[0].manifest)
    bed.engine.turn()
    assert bed.receiver.committed == []
    assert bed.receiver.aborted == {handle: "corrupt"}
    retry = bed.retry("a")
    assert retry is not None and retry.reason == "transfer_failed"
    bed.check_all_free()


def test_a_failing_step_sends_its_batch_back_and_the_next_requests_run() -> None:
    bed = Bed()
    for name in "ab":
        bed.start(name, max_tokens=50)
    bed.model.fails = 1
    bed.engine.turn()
    for name in "ab":
        retry = bed.retry(name)
        assert retry is not None and retry.reason == "engine_error"
    bed.check_all_free()
    asked = bed.start("c")
    bed.finish_all()
    assert bed.tokens("c") == {0: expected_tokens(asked.prompt, asked.params)[1:]}


def test_steps_that_keep_failing_end_the_process() -> None:
    bed = Bed()
    bed.model.fails = 99
    bed.start("a")
    bed.start("b")
    with pytest.raises(EngineError, match="in a row"):
        bed.start("c")


def test_draining_finishes_what_runs_and_sends_the_rest_back() -> None:
    bed = Bed(num_slots=2)
    bed.start("running", max_tokens=30)
    bed.submit("announced")
    bed.submit("arriving")
    arriving = bed.reserve("arriving")
    bed.engine.turn()
    bed.submit("waiting")
    waiting = bed.reserve("waiting")
    bed.engine.turn()
    bed.engine.drain()
    late = bed.submit("late")
    ghost = bed.receiver.reserve("ghost", 0, 3)
    bed.engine.turn()
    assert isinstance(late.replies[0], UnavailableError)
    assert bed.receiver.refused == {ghost: "draining"}
    assert bed.receiver.aborted == {waiting: "draining"}
    for name in ("announced", "waiting"):
        retry = bed.retry(name)
        assert retry is not None and retry.reason == "draining"
    bed.ship(arriving)
    bed.finish_all()
    assert bed.kinds("running")[-1] == bed.kinds("arriving")[-1] == "ended"
    bed.now += 0.5
    bed.engine.turn()
    assert bed.streams.beats[-1].is_draining


def test_stopping_sends_everything_back_and_closes_the_receiver() -> None:
    bed = Bed()
    bed.start("a", max_tokens=100)
    bed.engine.stop()
    bed.engine.run()
    retry = bed.retry("a")
    assert retry is not None and retry.reason == "draining"
    assert bed.receiver.is_closed
    bed.check_all_free()


# Signs of life


def test_the_loop_beats_twice_a_second_idle_or_busy() -> None:
    bed = Bed()
    bed.turns(10, step_s=0.25)
    assert len(bed.streams.beats) == 5
    bed.start("a", max_tokens=100)
    bed.turns(10, step_s=0.25)
    assert len(bed.streams.beats) == 10
    load = bed.streams.beats[-1]
    assert (load.num_running, load.total_blocks) == (1, 64)
    assert load.free_blocks < 64


def test_the_load_counts_those_that_wait() -> None:
    bed = Bed(num_slots=1)
    bed.start("a", max_tokens=100)
    bed.submit("b", [1, 2])
    bed.reserve("b")
    bed.turns(1, step_s=0.5)
    load = bed.engine.load()
    assert (load.num_queued, load.queued_tokens) == (1, 2)


def test_metrics_count_tokens_steps_and_ends() -> None:
    bed = Bed()
    bed.start("a", max_tokens=6)
    bed.finish_all()
    text = bed.metrics.render()[0].decode()
    samples = {
        line.split("{")[0] + (',outcome="finished"' if 'outcome="finished"' in line else ""): line
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert samples["scission_decode_generated_tokens_total"].endswith(" 5.0")
    assert samples["scission_iteration_tokens_count"].endswith(" 5.0")
    assert samples['scission_engine_requests_total,outcome="finished"'].endswith(" 1.0")
