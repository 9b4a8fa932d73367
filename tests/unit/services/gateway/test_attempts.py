"""A request's attempts under any order of events, refusals, preemptions and deaths, on a clock that
jumps to the next timer.

The fake engines are as unpredictable as can be: they never draw the same token twice. So every
token remembers which ones its engine believed to come before it, and a delivered sequence is right
only if each token believed in exactly the ones delivered before it.
"""

import asyncio
import random
import selectors
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scission.common.config import AdmissionOptions, RoutingOptions
from scission.common.errors import CapacityError, ScissionError, TransferError
from scission.common.inference_messages import tokens_to_proto
from scission.common.metrics import GatewayMetrics, Metrics
from scission.common.types import (
    Epoch,
    Finish,
    FinishReason,
    RequestId,
    Role,
    SamplingParams,
    Token,
)
from scission.protos import cluster_pb2, inference_pb2
from scission.services.gateway.attempts import RequestRun
from scission.services.gateway.engine import GenerationRequest, PromptReady, TokenBatch
from scission.services.gateway.registry import PrefixIndex, Worker
from scission.services.gateway.router import Router

MAX_TOKENS = 5
Request = inference_pb2.PrefillRequest | inference_pb2.DecodeRequest | inference_pb2.RedirectRequest


class JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting, time passes."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found and timeout:
            self.now += timeout
        return found


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


@dataclass
class Call:
    request: Request
    answer: "asyncio.Future[inference_pb2.SubmitReply]"


class FakeLink:
    """What RequestRun sees of a worker, and behind it the worker itself, moved by the test."""

    def __init__(self, role: Role, name: str) -> None:
        self.role = role
        self.worker_id = name
        self.is_live = True
        self.sinks: dict[str, RequestRun] = {}
        self.load = inference_pb2.Load()
        self.unreported_tokens = self.unreported_requests = 0
        self.sent_at = self.clock_offset_s = 0.0
        self.destination = inference_pb2.Destination(worker_id=name)
        self.calls: deque[Call] = deque()
        self.events: deque[inference_pb2.RequestEvent] = deque()
        self.cancelled = -1
        # The engine's state of the one request.
        self.attempt = -1
        self.forced: list[int] = []
        self.target = ""  # prefill: the decode to ship to
        self.sampled: int | None = None  # prefill: the token after the forced ones
        self.is_shipped = False
        self.history: list[int] | None = None  # decode: running after these tokens

    def submit(self, request: Request) -> Coroutine[None, None, inference_pb2.SubmitReply]:
        return self._call(request)

    redirect = submit

    async def _call(self, request: Request) -> inference_pb2.SubmitReply:
        call = Call(request, asyncio.get_running_loop().create_future())
        self.calls.append(call)
        return await call.answer

    def cancel(self, request_id: str, attempt: int, reason: str, choice: int | None = None) -> None:
        self.cancelled = max(self.cancelled, attempt)
        if self.attempt <= attempt:
            self.reset()

    def reset(self) -> None:
        self.attempt = -1
        self.target = ""
        self.sampled = self.history = None
        self.is_shipped = False

    def die(self) -> None:
        self.is_live = False
        self.reset()
        self.events.clear()
        for call in self.calls:
            if not call.answer.done():
                call.answer.set_exception(TransferError("gone"))
        self.calls.clear()
        sinks, self.sinks = self.sinks, {}
        for sink in sinks.values():
            sink.on_worker_lost(self, "killed")  # type: ignore[arg-type]

    def emit(self, tokens: Iterable[Token] = (), **event: object) -> None:
        tokens = list(tokens)
        if tokens:
            last = tokens[-1].index
            is_last = last + 1 == MAX_TOKENS
            finishes = [Finish(0, FinishReason.LENGTH, num_tokens=last + 1)] if is_last else []
            event["tokens"] = tokens_to_proto(tokens, finishes)
        self.events.append(
            inference_pb2.RequestEvent(
                request_id="1-0",
                attempt=self.attempt,
                **event,  # type: ignore[arg-type]
            )
        )


class FakeRegistry:
    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self.prefix_index = PrefixIndex()

    def available(self, role: Role) -> list[Worker]:
        return [w for w in self.workers if w.role is role and w.link.is_live]

    def explain(self) -> str:
        return ""


class World:
    """Two prefills, two decodes, one request; `actions` is what may happen next."""

    def __init__(self, loop: JumpingLoop, num_each: int = 2) -> None:
        self.loop = loop
        self.links = [FakeLink(role, f"{role}-{i}") for role in (P, D) for i in range(num_each)]
        workers = [
            Worker(
                cluster_pb2.WorkerDescription(worker_id=link.worker_id, role=link.role),
                link,  # type: ignore[arg-type]
            )
            for link in self.links
        ]
        metrics = GatewayMetrics(Metrics(Role.GATEWAY, "tiny", "0"))
        router = Router(
            FakeRegistry(workers),  # type: ignore[arg-type]
            RoutingOptions("round_robin"),
            metrics,
            random.Random(0),
        )
        now = loop.time()
        request = GenerationRequest(
            request_id=RequestId("1-0"),
            prompt_token_ids=[1, 2, 3],
            sampling=SamplingParams(max_tokens=MAX_TOKENS),
            deadline=now + 1000,
            arrival=now,
        )
        self.tokens: list[int] = []
        self.believed: list[tuple[int, ...]] = []  # token id -> the tokens before it
        self.num_prompts = 0
        self.is_finished = False
        self.budget = {"death": 1, "refusal": 3, "preemption": 2, "no_grant": 2, "fault": 1}
        self.run = RequestRun(
            request, Epoch(1), router, AdmissionOptions(), metrics, clock=loop.time
        )
        self.run.start()
        self.consumer = loop.create_task(self.consume())

    async def consume(self) -> None:
        try:
            while (event := await self.run.next_event()) is not None:
                if isinstance(event, PromptReady):
                    self.num_prompts += 1
                elif isinstance(event, TokenBatch):
                    assert self.num_prompts == 1 and not self.is_finished
                    for token in event.tokens:
                        assert token.index == len(self.tokens)
                        self.tokens.append(token.token_id)
                else:
                    self.is_finished = True
        finally:
            self.run.close()

    def draw(self, history: Sequence[int]) -> int:
        """A token that was never drawn before, to follow these."""
        self.believed.append(tuple(history))
        return len(self.believed) - 1

    @property
    def is_right(self) -> bool:
        return len(self.tokens) == MAX_TOKENS and all(
            self.believed[token_id] == tuple(self.tokens[:index])
            for index, token_id in enumerate(self.tokens)
        )

    def link(self, worker_id: str) -> FakeLink:
        return next(link for link in self.links if link.worker_id == worker_id)

    def actions(self, *, is_fair: bool) -> list[Callable[[], None]]:
        """Every step that may come next; only those that help when `is_fair`."""
        found: list[Callable[[], None]] = []
        for link in self.links:
            if not link.is_live:
                found.append(partial(setattr, link, "is_live", True))
                continue
            if link.events:
                found.append(partial(self.deliver, link))
            if link.calls:
                found.append(partial(self.accept, link))
            if link.role is P:
                found += self.prefill_actions(link, is_fair)
            elif link.history is not None:
                found.append(partial(self.decode_one, link))
                if not is_fair:
                    found.append(partial(self.spend, "preemption", link, "preempted"))
                    found.append(partial(self.spend, "fault", link, "transfer_failed"))
            if not is_fair:
                if link.calls:
                    found.append(partial(self.refuse, link))
                found.append(partial(self.kill, link))
        return found

    def prefill_actions(self, link: FakeLink, is_fair: bool) -> list[Callable[[], None]]:
        if link.attempt < 0:
            return []
        if link.sampled is None:
            return [lambda: self.compute(link)]
        if link.is_shipped:
            return [] if is_fair else [link.reset]  # the lease has ended
        found: list[Callable[[], None]] = []
        if link.target:
            decode = self.link(link.target)
            if decode.is_live and decode.attempt == link.attempt and decode.history is None:
                found.append(lambda: self.ship(link, decode))
            if not is_fair:
                found.append(lambda: self.spend("no_grant", link, "no_grant"))
        return found

    def deliver(self, link: FakeLink) -> None:
        event = link.events.popleft()
        sink = link.sinks.get(event.request_id)
        if sink is not None:
            sink.on_event(link, event)  # type: ignore[arg-type]

    def accept(self, link: FakeLink) -> None:
        call = link.calls.popleft()
        request = call.request
        if isinstance(request, inference_pb2.RedirectRequest):
            if link.attempt < 0:
                call.answer.set_exception(TransferError("nothing is retained"))
                return
            link.attempt = request.attempt
            link.target = request.destination.worker_id
            link.is_shipped = False
            if link.sampled is not None:
                self.say_computed(link)
        elif request.attempt > max(link.attempt, link.cancelled):
            link.reset()
            link.attempt = request.attempt
            link.forced = list(request.forced[0].token_ids) if request.forced else []
            if isinstance(request, inference_pb2.PrefillRequest):
                link.target = request.destination.worker_id
        call.answer.set_result(inference_pb2.SubmitReply())

    def refuse(self, link: FakeLink) -> None:
        # A request that nobody has begun may be sent away; that is not what is tested here.
        if self.budget["refusal"] and self.num_prompts and not self.run._is_over:
            self.budget["refusal"] -= 1
            error: ScissionError = CapacityError("full")
            link.calls.popleft().answer.set_exception(error)

    def compute(self, link: FakeLink) -> None:
        link.sampled = self.draw(link.forced)
        self.say_computed(link)

    def say_computed(self, link: FakeLink) -> None:
        assert link.sampled is not None
        link.emit(prefilled=inference_pb2.Prefilled())
        link.emit([Token(0, len(link.forced), link.sampled)])
        if not link.target:
            link.emit(ended=inference_pb2.Ended())

    def ship(self, prefill: FakeLink, decode: FakeLink) -> None:
        prefill.is_shipped = True
        assert prefill.sampled is not None
        sent = [*prefill.forced, prefill.sampled]
        # After a redirect more may have been delivered than the prefill knows of.
        decode.history = list(sent if len(sent) > len(decode.forced) else decode.forced)
        decode.emit(committed=inference_pb2.Committed())
        prefill.emit(ended=inference_pb2.Ended())
        if len(decode.history) == MAX_TOKENS:
            decode.emit(ended=inference_pb2.Ended())
            decode.reset()

    def decode_one(self, link: FakeLink) -> None:
        assert link.history is not None
        token_id = self.draw(link.history)
        link.emit([Token(0, len(link.history), token_id)])
        link.history.append(token_id)
        if len(link.history) == MAX_TOKENS:
            link.emit(ended=inference_pb2.Ended())
            link.reset()

    def spend(self, kind: str, link: FakeLink, reason: str) -> None:
        if self.budget[kind]:
            self.budget[kind] -= 1
            is_prefill = link.role is P
            link.emit(retry=inference_pb2.Retry(reason=reason, is_state_retained=is_prefill))
            if not is_prefill:
                link.reset()
            else:
                link.target = ""

    def kill(self, link: FakeLink) -> None:
        if self.budget["death"]:
            self.budget["death"] -= 1
            link.die()

    def settle(self) -> None:
        """Let everything that is ready run, and no timer fire."""
        for _ in range(4):
            self.loop.run_until_complete(asyncio.sleep(0))


P, D = Role.PREFILL, Role.DECODE


@contextmanager
def world(num_each: int = 2) -> Iterator[World]:
    loop = JumpingLoop()
    asyncio.set_event_loop(loop)
    try:

        async def begin() -> World:
            return World(loop, num_each)

        yield loop.run_until_complete(begin())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def finish(ours: World) -> None:
    """Let nothing more go wrong, and the request come to its end."""
    for step in range(400):
        ours.settle()
        if ours.consumer.done():
            break
        possible = ours.actions(is_fair=True)
        if possible:
            possible[step % len(possible)]()
        else:
            ours.loop.run_until_complete(asyncio.sleep(0.3))
    else:
        raise AssertionError("the request hangs")
    ours.consumer.result()
    ours.settle()


def play(choices: list[int]) -> World:
    with world() as ours:
        for choice in choices:
            ours.settle()
            possible = ours.actions(is_fair=False)
            if choice % 7 == 0:
                ours.loop.run_until_complete(asyncio.sleep(0.3))
            elif possible:
                possible[choice % len(possible)]()
        finish(ours)
        return ours


@settings(max_examples=400)
@given(st.lists(st.integers(0, 5039), max_size=60))
def test_every_order_of_events_and_faults_gives_the_right_tokens(choices: list[int]) -> None:
    ours = play(choices)
    assert ours.is_right
    assert ours.is_finished and ours.num_prompts == 1
    assert not any("1-0" in link.sinks for link in ours.links)


def test_without_faults_there_is_one_attempt() -> None:
    ours = play([])
    assert ours.is_right
    assert all(link.attempt <= 0 and link.cancelled < 0 for link in ours.links)


@pytest.mark.parametrize("seed", range(20))
def test_long_random_histories_end_well(seed: int) -> None:
    rng = random.Random(seed)
    ours = play([rng.randrange(5040) for _ in range(300)])
    assert ours.is_right


def test_late_tokens_of_a_superseded_decode_are_dropped() -> None:
    with world(num_each=1) as ours:
        prefill, decode = ours.links
        ours.settle()
        ours.accept(prefill)
        ours.accept(decode)
        ours.compute(prefill)
        ours.deliver(prefill)
        ours.deliver(prefill)
        ours.ship(prefill, decode)
        ours.decode_one(decode)
        ours.decode_one(decode)
        # The gateway has not heard of COMMIT: for it, the prefill's death ends the attempt.
        ours.kill(prefill)
        prefill.is_live = True
        ours.loop.run_until_complete(asyncio.sleep(0.3))
        assert len(decode.events) == 3 and decode.calls
        for _ in range(3):
            ours.deliver(decode)
        finish(ours)
        assert ours.is_right


def test_late_tokens_of_a_superseded_prefill_are_dropped() -> None:
    with world(num_each=1) as ours:
        prefill, decode = ours.links
        ours.settle()
        ours.accept(prefill)
        ours.accept(decode)
        ours.compute(prefill)
        ours.kill(decode)
        decode.is_live = True
        ours.loop.run_until_complete(asyncio.sleep(0.3))
        # The refusal to ship again overtakes the first token on its way.
        prefill.reset()
        ours.accept(prefill)
        ours.settle()
        ours.accept(prefill)
        for _ in range(2):
            ours.deliver(prefill)
        finish(ours)
        assert ours.is_right
