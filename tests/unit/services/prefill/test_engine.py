import pytest

from scission.common.cache.block_pool import State
from scission.common.errors import (
    CancelledError,
    CapacityError,
    ContextLengthError,
    DeadlineError,
    EngineError,
    RequestError,
    TransferError,
    UnavailableError,
)
from scission.protos import inference_pb2
from tests.unit.services.prefill.chain_model import VOCAB, next_token
from tests.unit.services.prefill.harness import GATEWAY, Prefill

OTHER = inference_pb2.Destination(worker_id="decode-2", epoch=6, transfer_address="inproc://e")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def prompt(length: int, seed: int = 1) -> list[int]:
    return [(seed * 7 + 13 * i) % VOCAB for i in range(length)]


def hand_over(prefill: Prefill, request_id: str, attempt: int = 0) -> None:
    """The decode grants, takes and commits; the transfer is closed."""
    handle = prefill.handle(request_id, attempt)
    prefill.sender.grant(handle)
    prefill.turn()
    prefill.sender.commit(handle)
    prefill.sender.end(handle)
    prefill.turn()


# --- computing


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 37])
@pytest.mark.parametrize("budget", [1, 3, 4, 7, 64])
def test_the_first_token_does_not_depend_on_the_chunks(length: int, budget: int) -> None:
    prefill = Prefill(budget=budget)
    prefill.submit("a", prompt(length))
    prefill.turn(length + 1)
    assert prefill.first_tokens("a") == [next_token(prompt(length))]
    assert prefill.replies[("a", 0)] == 0.0
    hand_over(prefill, "a")
    assert prefill.kinds("a") == ["prefilled", "tokens", "ended"]
    prefill.advance(10)
    prefill.assert_drained()


def test_prompts_of_mixed_lengths_share_a_step() -> None:
    prefill = Prefill(budget=16, has_prefix_cache=False)
    for name, length in (("a", 3), ("b", 9), ("c", 2), ("d", 30)):
        prefill.submit(name, prompt(length, ord(name)))
    prefill.turn(6)
    assert prefill.model.passes == [
        [(0, 3), (0, 9), (0, 2), (0, 2)],
        [(2, 16)],
        [(16, 30)],
    ]
    for name, length in (("a", 3), ("b", 9), ("c", 2), ("d", 30)):
        assert prefill.first_tokens(name) == [next_token(prompt(length, ord(name)))]


def test_a_chunk_that_is_not_the_last_ends_with_a_block_where_it_can() -> None:
    prefill = Prefill(budget=7, has_prefix_cache=False)
    prefill.submit("a", prompt(15))
    prefill.turn(5)
    assert prefill.model.passes == [[(0, 4)], [(4, 8)], [(8, 15)]]


def test_the_same_arrivals_give_the_same_batches() -> None:
    runs = []
    for _ in range(2):
        prefill = Prefill(budget=10)
        for name in "abcdef":
            prefill.submit(name, prompt(ord(name) % 7 + 5))
            prefill.turn()
        prefill.turn(10)
        runs.append(prefill.model.passes)
    assert runs[0] == runs[1]


def test_the_senior_goes_first() -> None:
    prefill = Prefill(budget=4)
    prefill.submit("young", prompt(8, 1))
    prefill.submit("old", prompt(8, 2), waited_s=5.0)
    prefill.submit("urgent", prompt(8, 3), priority=-1)
    order = []
    for _ in range(8):
        prefill.turn()
        order += [n for n in ("young", "old", "urgent") if prefill.first_tokens(n)]
    assert list(dict.fromkeys(order)) == ["urgent", "old", "young"]


def test_the_first_token_is_told_before_the_transfer_is_finished() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT)
    told_before_finish = []
    finish = prefill.sender.finish

    def spy(*args: object) -> None:
        told_before_finish.append(prefill.first_tokens("a"))
        finish(*args)  # type: ignore[arg-type]

    prefill.sender.finish = spy  # type: ignore[method-assign]
    prefill.turn()
    assert told_before_finish == [[next_token(PROMPT)]]


def test_pieces_are_offered_by_layer_group_while_the_pass_goes_on() -> None:
    prefill = Prefill(budget=8)
    prefill.submit("a", PROMPT)
    prefill.turn(2)
    sent = prefill.sender.sent[prefill.handle("a")]
    assert sent.pieces == [
        ((0, 2), (0, 8)),
        ((2, 4), (0, 8)),
        ((0, 2), (8, 9)),
        ((2, 4), (8, 9)),
    ]
    assert sent.sequences is not None
    assert [t.token_id for t in sent.sequences[0].tokens] == [next_token(PROMPT)]


def test_prefilled_tells_directly_timed_parts() -> None:
    prefill = Prefill(budget=4)
    prefill.submit("first", prompt(4, 9))
    prefill.submit("a", prompt(8))
    prefill.turn()
    for _ in range(2):
        prefill.now += 1.0
        prefill.turn()
    (parts,) = prefill.events("a", "prefilled")
    assert parts.queue_s == pytest.approx(1.0)
    assert parts.compute_s == pytest.approx(1.0)
    assert parts.sample_s == 0.0
    assert parts.grant_wait_s == pytest.approx(1.0)


# --- choices, forced tokens, ends


def test_n_choices_are_sampled_from_one_prefill() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT, n=3)
    prefill.turn()
    assert len(prefill.model.passes) == 1
    (tokens,) = prefill.events("a", "tokens")
    assert [(t.choice, t.index, t.token_id) for t in tokens.tokens] == [
        (choice, 0, next_token(PROMPT)) for choice in range(3)
    ]
    sent = prefill.sender.sent[prefill.handle("a")]
    assert sent.num_sequences == 3
    assert sent.sequences is not None and [s.choice for s in sent.sequences] == [0, 1, 2]


def test_forced_tokens_of_one_choice_are_prefilled_with_the_prompt() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT, forced=[[7, 8, 9]])
    prefill.turn()
    (tokens,) = prefill.events("a", "tokens")
    assert [(t.index, t.token_id) for t in tokens.tokens] == [(3, next_token([*PROMPT, 7, 8, 9]))]
    assert prefill.sender.sent[prefill.handle("a")].num_tokens == len(PROMPT) + 3


def test_of_several_choices_only_those_without_forced_tokens_are_sampled() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT, n=3, forced=[[7], [], [8, 9]])
    prefill.turn()
    (tokens,) = prefill.events("a", "tokens")
    assert [(t.choice, t.index) for t in tokens.tokens] == [(1, 0)]
    sent = prefill.sender.sent[prefill.handle("a")]
    assert sent.num_tokens == len(PROMPT)
    assert sent.sequences is not None
    assert [len(s.tokens) for s in sent.sequences] == [0, 1, 0]


def test_a_request_of_one_token_is_finished_here() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT, max_tokens=1, destination=None)
    prefill.turn()
    assert prefill.kinds("a") == ["prefilled", "tokens", "ended"]
    (tokens,) = prefill.events("a", "tokens")
    assert tokens.finished[0].reason == inference_pb2.FINISH_REASON_LENGTH
    assert tokens.finished[0].num_tokens == 1
    assert not prefill.sender.sent
    prefill.assert_drained()


def test_a_request_of_no_tokens_gets_a_finish_and_no_token() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT, max_tokens=0, n=2, destination=None)
    prefill.turn()
    (tokens,) = prefill.events("a", "tokens")
    assert not tokens.tokens
    assert [(f.choice, f.num_tokens) for f in tokens.finished] == [(0, 0), (1, 0)]
    assert prefill.kinds("a")[-1] == "ended"
    prefill.assert_drained()


def test_a_stop_at_the_first_token_withdraws_the_reservation() -> None:
    prefill = Prefill(eos_token_ids=(next_token(PROMPT),))
    prefill.submit("a", PROMPT)
    prefill.turn()
    (tokens,) = prefill.events("a", "tokens")
    assert tokens.finished[0].reason == inference_pb2.FINISH_REASON_STOP
    handle = prefill.handle("a")
    assert prefill.sender.sent[handle].abort_reason == "finished"
    assert prefill.sender.sent[handle].sequences is None, "nothing is shipped"
    prefill.sender.end(handle)
    prefill.turn()
    prefill.assert_drained()


def test_prompt_logprobs_come_by_chunk_for_every_token_but_the_first() -> None:
    prefill = Prefill(budget=4)
    prefill.submit("warm", PROMPT, max_tokens=1, destination=None)
    prefill.turn(4)
    prefill.submit("a", PROMPT, prompt_logprobs=1, max_tokens=1, destination=None)
    prefill.turn(4)
    messages = prefill.events("a", "prompt_logprobs")
    assert [(m.start, len(m.entries)) for m in messages] == [(1, 4), (5, 4)]
    entries = [entry for m in messages for entry in m.entries]
    for position, entry in enumerate(entries, start=1):
        assert list(entry.top_ids) == [next_token(PROMPT[:position])]
        rank_of = (PROMPT[position] - next_token(PROMPT[:position])) % VOCAB + 1
        assert entry.rank == rank_of
    (prefilled,) = prefill.events("a", "prefilled")
    assert prefilled.cached_tokens == 0, "prompt logprobs skip the cache"
    assert prefill.kinds("a")[-3:] == ["prefilled", "tokens", "ended"]


# --- prefix cache


def test_a_second_prompt_takes_the_common_prefix_from_the_cache() -> None:
    prefill = Prefill(budget=64)
    prefill.submit("a", prompt(18), max_tokens=1, destination=None)
    prefill.turn()
    longer = [*prompt(18), 5, 6, 7]
    prefill.submit("b", longer)
    prefill.turn()
    assert prefill.model.passes[-1] == [(16, 21)]
    assert prefill.first_tokens("b") == [next_token(longer)]
    (prefilled,) = prefill.events("b", "prefilled")
    assert prefilled.cached_tokens == 16
    assert prefill.sender.sent[prefill.handle("b")].pieces[0] == ((0, 4), (0, 16))
    assert prefill.metric("prefix_cache_hits_total") == 16
    assert prefill.metric("prefix_cache_queries_total") == 18 + 21


def test_the_same_prompt_hits_even_where_it_fills_its_blocks() -> None:
    prefill = Prefill(budget=64)
    for name in "ab":
        prefill.submit(name, prompt(16), max_tokens=1, destination=None)
        prefill.turn()
    assert prefill.model.passes[-1] == [(12, 16)]
    assert prefill.first_tokens("b") == prefill.first_tokens("a")


def test_chunk_ends_are_snapshots_too() -> None:
    prefill = Prefill(budget=8)
    prefill.submit("a", prompt(22), max_tokens=1, destination=None)
    prefill.turn(4)
    prefill.submit("b", [*prompt(22)[:9], 0], max_tokens=1, destination=None)
    prefill.turn()
    assert prefill.model.passes[-1] == [(8, 10)]
    assert prefill.first_tokens("b") == [next_token([*prompt(22)[:9], 0])]


def test_another_salt_computes_anew() -> None:
    prefill = Prefill(budget=64)
    for salt in ("a", "b", "a"):
        prefill.submit(f"salt-{salt}-{len(prefill.model.passes)}", prompt(18), salt=salt)
        prefill.turn()
    assert [p[0][0] for p in prefill.model.passes] == [0, 0, 16]


def test_heartbeats_name_where_hits_can_end() -> None:
    prefill = Prefill(budget=64, max_snapshots=1)
    prefill.submit("a", prompt(9), max_tokens=1, destination=None)
    prefill.turn()
    first = prefill.engine.prefix_update(full=False)
    assert len(first.added) == 1 and not first.evicted
    prefill.submit("b", prompt(9, 2), max_tokens=1, destination=None)
    prefill.turn()
    second = prefill.engine.prefix_update(full=False)
    assert list(second.evicted) == list(first.added)
    assert list(prefill.engine.prefix_update(full=True).added) == list(second.added)
    assert not prefill.engine.prefix_update(full=False).added


def test_cached_blocks_make_room_for_prompts() -> None:
    prefill = Prefill(num_blocks=6, budget=64)
    for seed in range(1, 5):
        prefill.submit(f"r{seed}", prompt(17, seed), max_tokens=1, destination=None)
        prefill.turn()
        assert prefill.first_tokens(f"r{seed}") == [next_token(prompt(17, seed))]
    assert prefill.engine.load().free_blocks == 6
    prefill.assert_drained()


# --- room, queue, refusals


def test_a_prompt_waits_until_retained_state_leaves_it_room() -> None:
    prefill = Prefill(num_blocks=4, budget=64)
    prefill.submit("a", prompt(9, 1))
    prefill.submit("b", prompt(9, 2))
    prefill.turn(2)
    assert prefill.blocks(State.RETAINED) == 3
    assert not prefill.first_tokens("b")
    assert prefill.engine.load().num_queued == 1
    prefill.advance(2.5)
    assert prefill.engine.load().expected_wait_s == pytest.approx(2.5, abs=0.01)
    hand_over(prefill, "a")
    prefill.turn()
    assert prefill.engine.load().expected_wait_s == 0.0
    assert prefill.first_tokens("b") == [next_token(prompt(9, 2))], "a's lease gave way"


def test_slots_bound_what_is_retained() -> None:
    prefill = Prefill(num_slots=1, max_snapshots=0, budget=64)
    prefill.submit("a", prompt(5, 1))
    prefill.submit("b", prompt(5, 2))
    prefill.turn(2)
    assert not prefill.first_tokens("b")
    prefill.cancel("a")
    prefill.turn()
    prefill.sender.end(prefill.handle("a"))
    prefill.turn(2)
    assert prefill.first_tokens("b")


def test_a_full_queue_refuses() -> None:
    prefill = Prefill(budget=4, max_queued=2, max_num_seqs=1)
    for name in "abcd":
        prefill.submit(name, prompt(9))
    prefill.turn()
    assert prefill.replies[("b", 0)] == 0.0
    refused = prefill.replies[("c", 0)]
    assert isinstance(refused, CapacityError) and refused.retry_after_s == 1.0
    assert isinstance(prefill.replies[("d", 0)], CapacityError)


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        ({"prompt": []}, RequestError, "empty"),
        ({"prompt": [VOCAB]}, RequestError, "vocabulary"),
        ({"prompt": [1] * 101}, ContextLengthError, "101 tokens"),
        ({"prompt": [1], "destination": None}, RequestError, "destination"),
        ({"prompt": [1], "timeout_s": 0.0}, DeadlineError, "deadline"),
        ({"prompt": [1], "stop_token_ids": (VOCAB,)}, RequestError, "stop_token_ids"),
        ({"prompt": [1], "n": 2, "forced": [[1], [2], [3]]}, RequestError, "3 lists"),
    ],
)
def test_a_bad_request_is_refused_by_name(kwargs: dict, error: type[Exception], says: str) -> None:
    prefill = Prefill(max_model_len=100)
    prefill.submit("a", **kwargs)
    prefill.turn()
    answer = prefill.replies[("a", 0)]
    assert isinstance(answer, error) and says in str(answer)
    prefill.assert_drained()


def test_a_draining_prefill_refuses_and_finishes_what_it_has() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT)
    prefill.turn()
    prefill.engine.drain()
    prefill.submit("b", PROMPT)
    prefill.turn()
    assert isinstance(prefill.replies[("b", 0)], UnavailableError)
    assert prefill.engine.load().is_draining
    assert not prefill.engine.is_idle
    hand_over(prefill, "a")
    prefill.advance(2)
    assert prefill.engine.is_idle


# --- retention, leases, redirects


def test_state_is_kept_for_a_lease_after_commit() -> None:
    prefill = Prefill(commit_lease_s=1.0, has_prefix_cache=False)
    prefill.submit("a", PROMPT)
    prefill.turn()
    hand_over(prefill, "a")
    assert prefill.kinds("a")[-1] == "ended"
    assert prefill.blocks(State.RETAINED) == 3
    prefill.advance(0.9)
    assert prefill.blocks(State.RETAINED) == 3
    prefill.advance(0.2)
    assert prefill.blocks(State.RETAINED) == 0
    prefill.assert_drained()


def test_without_a_grant_the_state_is_kept_until_the_lease_ends() -> None:
    prefill = Prefill(retain_lease_s=5.0)
    prefill.submit("a", PROMPT)
    prefill.turn()
    prefill.advance(4.9)
    assert prefill.kinds("a") == ["prefilled", "tokens"]
    prefill.advance(0.2)
    (retry,) = prefill.events("a", "retry")
    assert retry.reason == "no_grant" and not retry.is_state_retained
    assert prefill.metric("retention_leases_expired_total") == 1
    assert prefill.sender.sent[prefill.handle("a")].abort_reason == "cancelled"
    prefill.sender.end(prefill.handle("a"))
    prefill.turn()
    prefill.assert_drained()


def test_no_lease_runs_while_a_granted_transfer_does() -> None:
    prefill = Prefill(retain_lease_s=5.0)
    prefill.submit("a", PROMPT)
    prefill.turn()
    prefill.sender.grant(prefill.handle("a"))
    prefill.advance(20)
    assert prefill.kinds("a") == ["prefilled", "tokens"]
    prefill.sender.fail(prefill.handle("a"), "stalled")
    prefill.turn()
    (retry,) = prefill.events("a", "retry")
    assert (retry.reason, retry.is_state_retained) == ("transfer_failed", True)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("refuse", "refused"),
        ("mismatch", "layout_mismatch"),
        ("peer_lost", "peer_lost"),
        ("preempted", "preempted"),
        ("stalled", "transfer_failed"),
    ],
)
@pytest.mark.parametrize("turns", [1, 3])
def test_a_lost_transfer_keeps_the_state_for_a_redirect(end: str, reason: str, turns: int) -> None:
    """After one turn the request is still being computed, after three it is retained."""
    prefill = Prefill(budget=4, has_prefix_cache=False)
    prefill.submit("a", PROMPT)
    prefill.turn(turns)
    handle = prefill.handle("a")
    match end:
        case "refuse":
            prefill.sender.refuse(handle)
        case "mismatch":
            prefill.sender.refuse(handle, "layout_mismatch", "numerics")
        case _:
            prefill.sender.fail(handle, end)
    prefill.sender.end(handle)
    prefill.turn()
    (retry,) = prefill.events("a", "retry")
    assert (retry.reason, retry.is_state_retained) == (reason, True)
    assert "numerics" in retry.detail or end != "mismatch"
    prefill.redirect("a", 1, OTHER)
    prefill.turn(4)
    assert isinstance(prefill.replies[("a", 1)], float)
    assert len(prefill.model.passes) == 3, "nothing is computed twice"
    assert prefill.first_tokens("a", attempt=1) == [next_token(PROMPT)]
    sent = prefill.sender.sent[prefill.handle("a", 1)]
    assert sent.destination.worker_id == OTHER.worker_id
    hand_over(prefill, "a", 1)
    assert prefill.kinds("a", 1) == ["prefilled", "tokens", "ended"]
    prefill.advance(10)
    prefill.assert_drained()


def test_a_redirect_supersedes_a_transfer_that_goes_on() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT)
    prefill.turn()
    prefill.redirect("a", 2, OTHER)
    prefill.turn()
    assert prefill.sender.sent[prefill.handle("a", 0)].abort_reason == "superseded"
    prefill.sender.commit(prefill.handle("a", 0))  # too late
    prefill.turn()
    assert "ended" not in prefill.kinds("a", 0) + prefill.kinds("a", 2)
    prefill.sender.end(prefill.handle("a", 0))
    hand_over(prefill, "a", 2)
    assert prefill.kinds("a", 2)[-1] == "ended"


def test_a_committed_state_can_be_redirected_within_its_lease() -> None:
    prefill = Prefill(commit_lease_s=1.0)
    prefill.submit("a", PROMPT)
    prefill.turn()
    hand_over(prefill, "a")
    prefill.redirect("a", 1, OTHER)
    prefill.advance(0.5)
    hand_over(prefill, "a", 1)
    assert prefill.kinds("a", 1) == ["prefilled", "tokens", "ended"]
    prefill.advance(2)
    prefill.redirect("a", 2, OTHER)
    prefill.turn()
    assert isinstance(prefill.replies[("a", 2)], TransferError)
    prefill.assert_drained()


def test_a_queued_request_is_redirected_without_losing_its_place() -> None:
    prefill = Prefill(budget=4, max_num_seqs=1)
    prefill.submit("a", prompt(8))
    prefill.submit("b", prompt(8, 2))
    prefill.turn()
    prefill.redirect("b", 1, OTHER)
    prefill.turn(4)
    assert prefill.sender.sent[prefill.handle("b", 1)].destination.worker_id == OTHER.worker_id
    assert prefill.kinds("b", 0) == []


def test_a_redirect_of_what_is_gone_or_older_is_refused() -> None:
    prefill = Prefill()
    prefill.redirect("a", 1)
    prefill.turn()
    assert isinstance(prefill.replies[("a", 1)], TransferError)
    prefill.submit("a", PROMPT, attempt=3)
    prefill.turn()
    prefill.redirect("a", 3)
    prefill.turn()
    assert isinstance(prefill.replies[("a", 3)], CancelledError)


# --- attempts, cancels, deadlines


def test_a_higher_attempt_supersedes_a_lower_one() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT)
    prefill.turn()
    prefill.submit("a", PROMPT, attempt=1)
    prefill.turn()
    assert prefill.sender.sent[prefill.handle("a", 0)].abort_reason == "superseded"
    assert prefill.first_tokens("a", attempt=1) == [next_token(PROMPT)]
    prefill.submit("a", PROMPT, attempt=0)
    prefill.turn()
    assert isinstance(prefill.replies[("a", 0)], CancelledError)
    assert prefill.kinds("a", 0) == ["prefilled", "tokens"]


def test_a_repeated_submission_changes_nothing() -> None:
    prefill = Prefill()
    for _ in range(2):
        prefill.submit("a", PROMPT)
        prefill.turn()
    assert prefill.kinds("a") == ["prefilled", "tokens"]


def test_a_cancel_may_overtake_its_submission() -> None:
    prefill = Prefill()
    prefill.cancel("a", attempt=1)
    prefill.submit("a", PROMPT, attempt=1)
    prefill.submit("b", PROMPT, attempt=1)
    prefill.turn()
    assert isinstance(prefill.replies[("a", 1)], CancelledError)
    assert prefill.first_tokens("b")
    prefill.submit("a", PROMPT, attempt=2)
    prefill.turn()
    assert prefill.first_tokens("a", attempt=2)


def test_a_cancel_of_an_older_attempt_is_ignored() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT, attempt=2)
    prefill.cancel("a", attempt=1)
    prefill.turn()
    assert prefill.first_tokens("a")


def test_cancelling_while_computing_frees_what_was_not_offered_at_once() -> None:
    prefill = Prefill(budget=4, has_prefix_cache=False)
    prefill.submit("a", prompt(20))
    prefill.turn()
    assert prefill.blocks(State.ACTIVE) == 5
    prefill.cancel("a")
    prefill.turn()
    assert prefill.blocks(State.QUARANTINED) == 1, "the one block that the sender may read"
    assert prefill.blocks(State.FREE) == 63
    assert prefill.slots(State.FREE) == prefill.store.slots.total
    assert prefill.sender.sent[prefill.handle("a")].abort_reason == "cancelled"
    prefill.sender.end(prefill.handle("a"))
    prefill.turn()
    prefill.assert_drained()


def test_cancelling_while_shipping_quarantines_until_the_last_read() -> None:
    prefill = Prefill(has_prefix_cache=False)
    prefill.submit("a", PROMPT)
    prefill.turn()
    prefill.cancel("a")
    prefill.turn()
    assert prefill.blocks(State.QUARANTINED) == 3
    assert prefill.slots(State.QUARANTINED) == 1
    prefill.sender.end(prefill.handle("a"))
    prefill.turn()
    prefill.assert_drained()


def test_a_request_without_transfer_is_freed_at_once() -> None:
    prefill = Prefill(budget=4)
    prefill.submit("a", prompt(20), max_tokens=1, destination=None)
    prefill.turn()
    prefill.cancel("a")
    prefill.turn()
    prefill.assert_drained()


def test_cancelling_every_choice_cancels_the_request() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT, n=2)
    prefill.turn()
    prefill.cancel("a", choice=0)
    prefill.turn()
    assert prefill.sender.sent[prefill.handle("a")].abort_reason is None
    prefill.cancel("a", choice=1)
    prefill.turn()
    assert prefill.sender.sent[prefill.handle("a")].abort_reason == "cancelled"


def test_a_lost_gateway_cancels_its_requests_alone() -> None:
    prefill = Prefill(budget=4)
    prefill.submit("a", prompt(9, 1))
    prefill.submit("b", prompt(9, 2), gateway=GATEWAY + 1)
    prefill.submit("c", prompt(9, 3))
    prefill.turn()
    prefill.lose_gateway()
    prefill.turn(6)
    assert not prefill.first_tokens("a") and not prefill.first_tokens("c")
    assert prefill.first_tokens("b")


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_the_deadline_holds_in_every_state(turns: int) -> None:
    """Queued, computing, waiting for a grant."""
    prefill = Prefill(budget=4)
    prefill.submit("a", PROMPT, timeout_s=1.0)
    if turns == 0:
        prefill.submit("before", prompt(64, 2), waited_s=9.0, max_tokens=1, destination=None)
        turns = 1
    prefill.turn(turns)
    prefill.advance(1.1)
    (failed,) = prefill.events("a", "failed")
    assert failed.grpc_code == "DEADLINE_EXCEEDED"
    for handle in list(prefill.sender.sent):
        assert prefill.sender.sent[handle].abort_reason == "deadline"
        prefill.sender.end(handle)
    prefill.turn(40)
    prefill.assert_drained()


def test_the_deadline_holds_while_shipping_and_ends_a_lease_silently() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT, timeout_s=1.0)
    prefill.submit("b", prompt(5, 2), timeout_s=1.0)
    prefill.turn()
    for name in "ab":
        prefill.sender.grant(prefill.handle(name))
    prefill.turn()
    prefill.sender.fail(prefill.handle("b"), "deadline")
    prefill.sender.end(prefill.handle("b"))
    prefill.advance(1.1)
    for name in "ab":
        assert prefill.kinds(name)[-1] == "failed"


# --- failures


def test_a_failed_step_fails_its_requests_and_the_loop_goes_on() -> None:
    prefill = Prefill(budget=4)
    prefill.submit("a", PROMPT)
    prefill.turn()
    prefill.model.failures = 1
    prefill.turn()
    (failed,) = prefill.events("a", "failed")
    assert failed.grpc_code == "INTERNAL"
    assert "bus" not in failed.message, "what failed inside stays in the log"
    prefill.sender.end(prefill.handle("a"))
    prefill.turn()
    prefill.submit("b", PROMPT)
    prefill.turn(4)
    assert prefill.first_tokens("b") == [next_token(PROMPT)]
    hand_over(prefill, "b")
    prefill.advance(10)
    prefill.assert_drained()


def test_repeated_failures_end_the_engine() -> None:
    prefill = Prefill()
    prefill.model.failures = 3
    for name in "ab":
        prefill.submit(name, PROMPT)
        prefill.turn()
    prefill.submit("c", PROMPT)
    with pytest.raises(EngineError):
        prefill.turn()


def test_a_success_forgives_earlier_failures() -> None:
    prefill = Prefill()
    for name in "abcdef":
        prefill.model.failures = int(name in "abde")
        prefill.submit(name, PROMPT, max_tokens=1, destination=None)
        prefill.turn()
    assert [bool(prefill.first_tokens(name)) for name in "cf"] == [True, True]


def test_stopping_sends_back_what_still_runs() -> None:
    prefill = Prefill(budget=4)
    prefill.submit("a", PROMPT)
    prefill.submit("b", prompt(20, 2))
    prefill.turn(2)
    prefill.engine.stop()
    prefill.engine.run()
    for name in "ab":
        (retry,) = prefill.events(name, "retry")
        assert (retry.reason, retry.is_state_retained) == ("draining", False)


# --- beats and load


def test_the_loop_beats_each_half_second_with_its_load() -> None:
    prefill = Prefill(budget=4)
    prefill.submit("a", prompt(40))
    for _ in range(6):
        prefill.advance(0.25)
    assert len(prefill.streams.beats) == 3
    load = prefill.streams.beats[-1]
    assert load.num_running == 1 and load.queued_tokens > 0
    assert load.expected_wait_s > 0 or load.queued_tokens == 0
    assert load.total_blocks == 64
    assert prefill.metric("kv_blocks", state="active") == 10
    assert prefill.metric("kv_transfer_stalls_total") == 1
    assert prefill.metric("kv_transfers_in_flight") == 0
    prefill.sender.grant(prefill.handle("a"))
    prefill.advance(0.5)
    assert prefill.metric("kv_transfers_in_flight") == 1


def test_a_long_step_beats_between_its_layers() -> None:
    prefill = Prefill()
    prefill.submit("a", PROMPT)
    offer = prefill.sender.piece_ready

    def slow(*args: object) -> None:
        prefill.now += 0.6
        offer(*args)  # type: ignore[arg-type]

    prefill.sender.piece_ready = slow  # type: ignore[method-assign]
    prefill.turn()
    assert len(prefill.streams.beats) == 2


def test_all_events_of_a_turn_for_a_gateway_travel_together() -> None:
    prefill = Prefill(budget=64)
    for name in "abc":
        prefill.submit(name, prompt(9, ord(name)), max_tokens=1, destination=None)
    prefill.turn()
    assert prefill.streams.num_messages == 1
