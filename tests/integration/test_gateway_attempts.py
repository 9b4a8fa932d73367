"""A gateway's cluster side against fake workers: every fault of a request's life, one by one."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from scission.common.config import AdmissionOptions, DiscoveryOptions, RoutingOptions
from scission.common.errors import (
    CapacityError,
    ContextLengthError,
    DeadlineError,
    EngineError,
    RequestError,
    UnavailableError,
)
from scission.common.metrics import GatewayMetrics, Metrics
from scission.common.types import Epoch, Finish, FinishReason, RequestId, Role, SamplingParams
from scission.protos import inference_pb2
from scission.services.gateway.cluster import Cluster
from scission.services.gateway.engine import (
    EngineEvent,
    GenerationRequest,
    PromptReady,
    ReadyState,
    TokenBatch,
)
from tests.fakes import FakeDecode, FakePrefill, FakeWorker, right_tokens

SILENCE_S = 0.4
PROMPT = [5, 6, 7, 8, 9]
_numbers = itertools.count()


@dataclass
class Answer:
    """What a request brought."""

    prompts: list[PromptReady] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, Finish] = field(default_factory=dict)

    def take(self, event: EngineEvent) -> None:
        match event:
            case PromptReady():
                assert not self.tokens and not self.finishes
                self.prompts.append(event)
            case TokenBatch():
                for token in event.tokens:
                    assert token.choice not in self.finishes
                    ids = self.tokens.setdefault(token.choice, [])
                    assert token.index == len(ids), "indices are consecutive"
                    ids.append(token.token_id)
            case Finish():
                assert event.choice not in self.finishes
                self.finishes[event.choice] = event


class Stack:
    def __init__(
        self,
        prefills: Sequence[FakePrefill],
        decodes: Sequence[FakeDecode],
        admission: AdmissionOptions,
        routing: RoutingOptions,
        epoch: int = 1,
    ) -> None:
        self.prefills, self.decodes = list(prefills), list(decodes)
        self.metrics = Metrics(Role.GATEWAY, "tiny", "0")
        self.cluster = Cluster(
            Epoch(epoch),
            DiscoveryOptions(heartbeat_s=1000, silence_s=SILENCE_S, beat_s=0.1),
            admission,
            routing,
            GatewayMetrics(self.metrics),
            rng=random.Random(0),
        )

    async def join(self, *workers: FakeWorker) -> None:
        """Register workers and wait until they are routed to."""
        for worker in workers:
            self.cluster.registry.register(worker.description)
        async with asyncio.timeout(30):
            while any(
                not self.cluster.registry.takes_requests(
                    self.cluster.registry.workers[worker.worker_id]
                )
                for worker in workers
            ):
                await asyncio.sleep(0.005)

    def request(
        self,
        max_tokens: int = 8,
        n: int = 1,
        prompt: Sequence[int] = PROMPT,
        timeout_s: float = 20,
        **sampling: object,
    ) -> GenerationRequest:
        now = time.monotonic()
        return GenerationRequest(
            request_id=RequestId(f"1-{next(_numbers)}"),
            prompt_token_ids=list(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
            deadline=now + timeout_s,
            arrival=now,
            n=n,
        )

    async def run(self, request: GenerationRequest) -> Answer:
        answer = Answer()
        async for event in self.cluster.generate(request):
            answer.take(event)
        return answer

    def begin(self, request: GenerationRequest) -> tuple[asyncio.Task[None], Answer]:
        """Run a request in the background; the answer grows."""
        answer = Answer()

        async def consume() -> None:
            async for event in self.cluster.generate(request):
                answer.take(event)

        return asyncio.create_task(consume()), answer

    def value(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(
            f"scission_{name}", {"model_name": "tiny", "role": "gateway", **labels}
        )
        return 0.0 if value is None else value


@asynccontextmanager
async def stack(
    num_prefills: int = 1,
    num_decodes: int = 1,
    admission: AdmissionOptions | None = None,
    policy: str = "round_robin",
) -> AsyncIterator[Stack]:
    decodes = [FakeDecode() for _ in range(num_decodes)]
    prefills = [FakePrefill(decodes) for _ in range(num_prefills)]
    ours = Stack(
        prefills,
        decodes,
        admission or AdmissionOptions(),
        RoutingOptions(policy),  # type: ignore[arg-type]
    )
    workers: list[FakeWorker] = [*prefills, *decodes]
    for worker in workers:
        await worker.start()
    watching = asyncio.create_task(ours.cluster.run())
    try:
        await ours.join(*workers)
        yield ours
    finally:
        watching.cancel()
        await ours.cluster.close()
        for worker in workers:
            await worker.kill()


async def until_tokens(answer: Answer, count: int) -> None:
    async with asyncio.timeout(30):
        while len(answer.tokens.get(0, ())) < count:
            await asyncio.sleep(0.002)


def assert_right(answer: Answer, max_tokens: int, n: int = 1) -> None:
    assert len(answer.prompts) == 1
    for choice in range(n):
        assert answer.tokens[choice] == right_tokens(PROMPT, max_tokens, choice)
        assert answer.finishes[choice].reason is FinishReason.LENGTH


# -- no fault


async def test_a_request_brings_the_prompt_then_every_token_then_the_finish() -> None:
    async with stack() as ours:
        ours.prefills[0].cached_tokens = 4
        answer = await ours.run(ours.request(max_tokens=12))
        assert_right(answer, 12)
        assert answer.prompts[0].cached_tokens == 4
        assert not ours.prefills[0].cancels and not ours.decodes[0].cancels


async def test_several_choices_come_from_one_prefill() -> None:
    async with stack() as ours:
        assert_right(await ours.run(ours.request(max_tokens=5, n=3)), 5, n=3)
        assert len(ours.prefills[0].submits) == 1


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_a_request_that_ends_at_its_prefill_opens_no_decode(max_tokens: int) -> None:
    async with stack() as ours:
        answer = await ours.run(ours.request(max_tokens=max_tokens))
        assert answer.tokens.get(0, []) == right_tokens(PROMPT, max_tokens)
        assert answer.finishes[0].reason is FinishReason.LENGTH
        assert not ours.decodes[0].submits


async def test_prompt_logprobs_come_with_the_prompt() -> None:
    async with stack() as ours:
        answer = await ours.run(ours.request(max_tokens=1, prompt_logprobs=0))
        entries = answer.prompts[0].prompt_logprobs
        assert entries is not None and entries[0] is None
        assert [e.logprob for e in entries[1:] if e] == [-1, -2, -3, -4]


async def test_a_first_token_that_ends_the_request_frees_the_decode() -> None:
    async with stack() as ours:
        prefill, decode = ours.prefills[0], ours.decodes[0]
        prefill.stop_at = "queued"
        task, answer = ours.begin(ours.request())
        await prefill.until(lambda: bool(prefill.held))
        item = prefill.held[0]
        prefill.compute(item)
        prefill.emit(item, finishes=[Finish(0, FinishReason.STOP, num_tokens=1)])
        prefill.emit(item, ended=inference_pb2.Ended())
        await task
        assert answer.finishes[0].reason is FinishReason.STOP
        await decode.until(lambda: bool(decode.cancels))
        assert decode.cancels[0].reason == "finished"
        assert not prefill.cancels


async def test_tokens_of_the_decode_wait_for_the_first_token_of_the_prefill() -> None:
    async with stack() as ours:
        prefill, decode = ours.prefills[0], ours.decodes[0]
        prefill.stop_at = "queued"
        task, answer = ours.begin(ours.request(max_tokens=4))
        await prefill.until(lambda: bool(prefill.held))
        item = prefill.held[0]
        decode.take_state((1, item.request.request_id), 0, lambda: None)
        await decode.until(lambda: decode.tokens_sent == 3)
        assert not answer.prompts
        prefill.compute(item)
        await task
        assert_right(answer, 4)


# -- the client leaves, or time does


async def test_a_client_that_leaves_frees_both_workers() -> None:
    async with stack() as ours:
        decode = ours.decodes[0]
        decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=50))
        await until_tokens(answer, 3)
        task.cancel()
        await decode.until(lambda: bool(decode.cancels))
        assert decode.cancels[0].reason == "client_gone"
        assert decode.num_running == 0


async def test_a_client_that_leaves_while_queued_frees_both_workers() -> None:
    async with stack() as ours:
        prefill, decode = ours.prefills[0], ours.decodes[0]
        prefill.stop_at = "queued"
        task, _ = ours.begin(ours.request())
        await prefill.until(lambda: bool(prefill.held))
        task.cancel()
        await prefill.until(lambda: bool(prefill.cancels))
        await decode.until(lambda: bool(decode.cancels))
        assert not prefill.held and decode.num_running == 0


async def test_a_stopped_choice_ends_alone() -> None:
    async with stack() as ours:
        decode = ours.decodes[0]
        decode.limit = 3
        request = ours.request(max_tokens=6, n=2)
        task, answer = ours.begin(request)
        await until_tokens(answer, 3)
        await ours.cluster.stop_choice(request.request_id, 0)
        await decode.until(lambda: bool(decode.cancels))
        assert decode.cancels[0].choice == 0
        assert answer.tokens[1] == right_tokens(PROMPT, 3, 1)
        await ours.cluster.stop_choice(request.request_id, 1)
        await task
        assert 1 not in answer.finishes


@pytest.mark.parametrize("stage", ["queued", "computed"])
async def test_the_deadline_ends_a_request_in_every_state(stage: str) -> None:
    async with stack() as ours:
        prefill, decode = ours.prefills[0], ours.decodes[0]
        prefill.stop_at = stage
        with pytest.raises(DeadlineError):
            await ours.run(ours.request(timeout_s=0.2))
        await prefill.until(lambda: bool(prefill.cancels))
        await decode.until(lambda: bool(decode.cancels))
        assert prefill.cancels[0].reason == decode.cancels[0].reason == "deadline"
        assert 0 < prefill.submits[0].deadline - prefill.submits[0].received_at <= 0.2


# -- deaths


async def kill(worker: FakeWorker) -> None:
    await worker.kill()


async def stop(worker: FakeWorker) -> None:
    worker.freeze()


FAULTS = pytest.mark.parametrize("fault", [kill, stop], ids=["killed", "stopped"])


def serving(workers: "Sequence[FakePrefill | FakeDecode]") -> int:
    return next(i for i, worker in enumerate(workers) if worker.submits)


@FAULTS
@pytest.mark.parametrize("stage", ["queued", "computed"])
async def test_a_prefill_that_dies_before_commit_is_replaced(fault: object, stage: str) -> None:
    async with stack(num_prefills=2) as ours:
        for prefill in ours.prefills:
            prefill.stop_at = stage
        task, answer = ours.begin(ours.request(max_tokens=6))
        async with asyncio.timeout(30):
            while not any(prefill.held for prefill in ours.prefills):
                await asyncio.sleep(0.002)
        if stage == "computed":
            await until_tokens(answer, 1)
        victim = serving(ours.prefills)
        ours.prefills[1 - victim].release()
        began_at = time.monotonic()
        await fault(ours.prefills[victim])  # type: ignore[operator]
        await task
        assert time.monotonic() - began_at < SILENCE_S + 2
        assert_right(answer, 6)
        again = ours.prefills[1 - victim].submits[0].request
        assert again.attempt == 1
        forced = [list(f.token_ids) for f in again.forced]
        assert forced == ([] if stage == "queued" else [right_tokens(PROMPT, 1)])


@FAULTS
async def test_a_prefill_that_dies_after_commit_changes_nothing(fault: object) -> None:
    async with stack(num_prefills=2) as ours:
        decode = ours.decodes[0]
        decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 3)
        await fault(ours.prefills[serving(ours.prefills)])  # type: ignore[operator]
        await asyncio.sleep(SILENCE_S + 0.3)
        decode.release()
        await task
        assert_right(answer, 6)
        assert len(decode.submits) == 1


@FAULTS
async def test_state_that_is_still_held_goes_to_another_decode(fault: object) -> None:
    async with stack(num_decodes=2) as ours:
        for decode in ours.decodes:
            decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 3)
        victim = serving(ours.decodes)
        ours.decodes[1 - victim].release()
        await fault(ours.decodes[victim])  # type: ignore[operator]
        await task
        assert_right(answer, 6)
        prefill = ours.prefills[0]
        assert len(prefill.submits) == 1 and len(prefill.redirects) == 1
        again = ours.decodes[1 - victim].submits[0].request
        assert (again.attempt, list(again.forced[0].token_ids)) == (1, right_tokens(PROMPT, 3))
        assert ours.value("request_redirects_total") == 1


@FAULTS
async def test_state_that_is_gone_is_prefilled_again_with_what_was_delivered(
    fault: object,
) -> None:
    async with stack(num_decodes=2) as ours:
        prefill = ours.prefills[0]
        prefill.keeps_state = False
        for decode in ours.decodes:
            decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 3)
        victim = serving(ours.decodes)
        ours.decodes[1 - victim].release()
        await fault(ours.decodes[victim])  # type: ignore[operator]
        await task
        assert_right(answer, 6)
        again = prefill.submits[1].request
        assert list(again.forced[0].token_ids) == right_tokens(PROMPT, 3)


async def test_several_choices_go_on_after_a_death() -> None:
    async with stack(num_decodes=2) as ours:
        for decode in ours.decodes:
            decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=6, n=3))
        await until_tokens(answer, 3)
        victim = serving(ours.decodes)
        ours.decodes[1 - victim].release()
        await ours.decodes[victim].kill()
        await task
        assert_right(answer, 6, n=3)


async def test_a_decode_that_dies_before_the_state_came_is_replaced() -> None:
    async with stack(num_decodes=2) as ours:
        prefill = ours.prefills[0]
        prefill.stop_at = "computed"
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 1)
        await ours.decodes[serving(ours.decodes)].kill()
        await task
        assert_right(answer, 6)


async def test_without_another_worker_a_stream_ends_with_an_error_in_time() -> None:
    async with stack() as ours:
        decode = ours.decodes[0]
        decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 3)
        began_at = time.monotonic()
        await decode.kill()
        with pytest.raises(UnavailableError):
            await task
        assert time.monotonic() - began_at < 3


async def test_a_worker_that_comes_in_time_takes_over_the_stream() -> None:
    async with stack() as ours:
        decode = ours.decodes[0]
        decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 3)
        await decode.kill()
        other = FakeDecode()
        await other.start()
        ours.prefills[0]._decodes[f"inproc://{other.worker_id}"] = other
        await ours.join(other)
        await task
        assert_right(answer, 6)
        await other.kill()


async def test_a_request_that_saw_two_engines_die_is_not_tried_again() -> None:
    async with stack(num_decodes=3) as ours:
        for decode in ours.decodes:
            decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 3)
        first = serving(ours.decodes)
        await ours.decodes[first].kill()
        rest = [decode for decode in ours.decodes if decode is not ours.decodes[first]]
        async with asyncio.timeout(30):
            while not any(decode.submits for decode in rest):
                await asyncio.sleep(0.002)
        await rest[serving(rest)].kill()
        with pytest.raises(EngineError, match="2 workers"):
            await task


async def test_a_stopped_decode_that_wakes_up_is_told_and_its_tokens_are_dropped() -> None:
    async with stack(num_decodes=2) as ours:
        for decode in ours.decodes:
            decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 3)
        victim = ours.decodes[serving(ours.decodes)]
        for decode in ours.decodes:
            decode.release()
        victim.freeze()
        await task
        assert_right(answer, 6)
        victim.thaw()
        await victim.until(lambda: bool(victim.gone))
        assert victim.num_running == 0
        await ours.join(victim)
        assert_right(await ours.run(ours.request(max_tokens=3)), 3)


async def test_tokens_of_a_superseded_attempt_are_never_delivered() -> None:
    async with stack(num_prefills=2) as ours:
        for prefill in ours.prefills:
            prefill.stop_at = "queued"
        task, answer = ours.begin(ours.request(max_tokens=4))
        async with asyncio.timeout(30):
            while not any(prefill.held for prefill in ours.prefills):
                await asyncio.sleep(0.002)
        first = ours.prefills[serving(ours.prefills)]
        item = first.held[0]
        first.emit(item, retry=inference_pb2.Retry(reason="transfer_failed"))
        async with asyncio.timeout(30):
            while sum(len(prefill.submits) for prefill in ours.prefills) < 2:
                await asyncio.sleep(0.002)
        first.compute(item)  # late, of attempt 0
        for prefill in ours.prefills:
            prefill.release()
        await task
        assert_right(answer, 4)


# -- refusals, retries, failures


async def test_a_worker_that_refuses_is_passed_over() -> None:
    async with stack(num_prefills=2, num_decodes=2) as ours:
        ours.prefills[0].refuse = CapacityError("full")
        ours.decodes[1].refuse = CapacityError("full")
        for _ in range(4):
            assert_right(await ours.run(ours.request()), 8)


@pytest.mark.parametrize("role", ["prefills", "decodes"])
async def test_no_room_anywhere_is_429_at_once(role: str) -> None:
    async with stack(num_prefills=2, num_decodes=2) as ours:
        for worker in getattr(ours, role):
            worker.refuse = CapacityError("full")
        for prefill in ours.prefills:
            prefill.stop_at = "queued"
        began_at = time.monotonic()
        with pytest.raises(CapacityError) as caught:
            await ours.run(ours.request())
        assert time.monotonic() - began_at < 0.1
        assert caught.value.retry_after_s


async def test_a_started_request_waits_for_room_instead_of_failing() -> None:
    async with stack(num_decodes=2) as ours:
        for decode in ours.decodes:
            decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 3)
        victim = serving(ours.decodes)
        other = ours.decodes[1 - victim]
        other.refuse = CapacityError("full")
        other.release()
        await ours.decodes[victim].kill()
        await other.until(lambda: len(other.submits) >= 3)
        other.refuse = None
        await task
        assert_right(answer, 6)


@pytest.mark.parametrize("reason", ["preempted", "transfer_failed", "peer_lost", "no_grant"])
async def test_what_a_decode_gives_back_goes_on(reason: str) -> None:
    async with stack(num_decodes=2) as ours:
        for decode in ours.decodes:
            decode.limit = 3
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 3)
        decode = ours.decodes[serving(ours.decodes)]
        item = decode.submits[0]
        decode.forget((item.gateway_epoch, item.request.request_id), 0)
        for each in ours.decodes:
            each.limit = None
        decode.emit(item, retry=inference_pb2.Retry(reason=reason))
        await task
        assert_right(answer, 6)
        assert ours.value("request_new_attempts_total", reason=reason) == 1


async def test_a_refused_transfer_is_redirected_without_a_second_prefill() -> None:
    async with stack(num_decodes=2) as ours:
        prefill = ours.prefills[0]
        prefill.stop_at = "computed"
        task, answer = ours.begin(ours.request(max_tokens=6))
        await until_tokens(answer, 1)
        first = ours.decodes[serving(ours.decodes)]
        prefill.emit(
            prefill.held[0], retry=inference_pb2.Retry(reason="refused", is_state_retained=True)
        )
        await task
        assert_right(answer, 6)
        assert len(prefill.submits) == 1 and len(prefill.redirects) == 1
        await first.until(lambda: bool(first.cancels))


async def test_attempts_are_bounded() -> None:
    async with stack() as ours:
        ours.decodes[0].commits = False
        prefill = ours.prefills[0]
        prefill.stop_at = "queued"
        task, _ = ours.begin(ours.request())
        for count in range(1, 5):
            await prefill.until(lambda n=count: len(prefill.submits) == n)  # type: ignore[misc]
            prefill.emit(prefill.submits[-1], retry=inference_pb2.Retry(reason="transfer_failed"))
        with pytest.raises(EngineError, match="transfer_failed"):
            await task


async def test_a_failed_request_is_an_error_and_frees_the_other_side() -> None:
    async with stack() as ours:
        prefill, decode = ours.prefills[0], ours.decodes[0]
        prefill.stop_at = "queued"
        task, _ = ours.begin(ours.request())
        await prefill.until(lambda: bool(prefill.held))
        prefill.emit(
            prefill.held[0],
            failed=inference_pb2.Failed(grpc_code="INVALID_ARGUMENT", message="too odd"),
        )
        with pytest.raises(RequestError, match="too odd"):
            await task
        await decode.until(lambda: bool(decode.cancels))


async def test_a_request_that_can_never_fit_is_refused_before_any_work() -> None:
    async with stack() as ours:
        with pytest.raises(ContextLengthError, match="4000"):
            await ours.run(ours.request(max_tokens=5000))
        assert not ours.prefills[0].submits


# -- the cluster


async def test_without_workers_a_request_is_503_at_once() -> None:
    async with stack(num_decodes=0) as ours:
        with pytest.raises(UnavailableError, match="no decode worker"):
            await ours.run(ours.request())
        assert ours.cluster.readiness().state is ReadyState.STARTING


async def test_unequal_layouts_are_never_paired_and_the_field_is_named() -> None:
    async with stack(num_decodes=0) as ours:
        other = FakeDecode(digest={"model": "m", "weights": "other"})
        await other.start()
        await ours.join(other)
        with pytest.raises(UnavailableError, match="differ in weights"):
            await ours.run(ours.request())
        assert "weights" in ours.cluster.readiness().reason
        assert not other.submits
        await other.kill()


async def test_admission_refuses_what_exceeds_the_bounds() -> None:
    admission = AdmissionOptions(max_inflight=2, max_inflight_tokens=12)
    async with stack(admission=admission) as ours:
        ours.prefills[0].stop_at = "queued"
        first, _ = ours.begin(ours.request())
        await ours.prefills[0].until(lambda: bool(ours.prefills[0].held))
        with pytest.raises(CapacityError, match="tokens"):
            await ours.run(ours.request(prompt=range(8)))
        second, _ = ours.begin(ours.request())
        await ours.prefills[0].until(lambda: len(ours.prefills[0].held) == 2)
        with pytest.raises(CapacityError) as caught:
            await ours.run(ours.request(prompt=[1]))
        assert caught.value.retry_after_s == admission.retry_after_s
        for task in (first, second):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        ours.prefills[0].stop_at = ""
        assert_right(await ours.run(ours.request()), 8)


async def test_a_draining_gateway_takes_nothing_new_and_finishes_what_runs() -> None:
    async with stack() as ours:
        ours.decodes[0].limit = 3
        task, answer = ours.begin(ours.request())
        await until_tokens(answer, 3)
        ours.cluster.drain()
        assert ours.cluster.readiness().state is ReadyState.DRAINING
        with pytest.raises(UnavailableError):
            await ours.run(ours.request())
        assert not await ours.cluster.wait_until_idle(0.05)
        ours.decodes[0].release()
        await task
        assert await ours.cluster.wait_until_idle(1)
        assert_right(answer, 8)


async def test_one_gateways_end_leaves_anothers_requests_alone() -> None:
    async with stack() as ours:
        other = Stack(ours.prefills, ours.decodes, AdmissionOptions(), RoutingOptions(), epoch=2)
        await other.join(*ours.prefills, *ours.decodes)
        decode = ours.decodes[0]
        decode.limit = 3
        tasks = [each.begin(each.request(max_tokens=6)) for each in (ours, other)]
        for _, answer in tasks:
            await until_tokens(answer, 3)
        assert decode.num_running == 2
        await other.cluster.close()
        await decode.until(lambda: decode.num_running == 1)
        assert [gone.gateway_epoch for gone in decode.gone] == [2]
        decode.release()
        task, answer = tasks[0]
        await task
        assert_right(answer, 6)
        with suppress(Exception):
            await tasks[1][0]


async def test_the_parts_sum_to_the_time_to_the_first_token() -> None:
    async with stack() as ours:
        ttfts = []
        for _ in range(20):
            request = ours.request(max_tokens=3)
            async for event in ours.cluster.generate(request):
                if isinstance(event, TokenBatch) and event.tokens[0].index == 0:
                    ttfts.append(time.monotonic() - request.arrival)
        parts = {
            part: ours.value("time_to_first_token_part_seconds_sum", part=part)
            for part in ("gateway_prepare", "gateway_queue", "call_out", "token_back")
        }
        count = ours.value("time_to_first_token_part_seconds_count", part="call_out")
        assert count == 20
        # The fake says 3.5 ms for its own parts and takes next to none of it.
        assert sum(parts.values()) <= sum(ttfts)
        assert sum(parts.values()) >= sum(ttfts) * 0.5
