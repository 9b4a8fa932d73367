"""One request's life in the cluster: its attempts, what the workers say of it, its end.

The gateway alone decides attempts. An attempt is a prefill and (unless one token is all that is
wanted) a decode; when it is lost, the next one is fed the tokens that were delivered. State that a
prefill still holds is shipped to another decode (Redirect); without it the prompt and the delivered
tokens are prefilled anew. Everything here runs on the event loop, in reaction to events.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine

from scission.common.config import AdmissionOptions
from scission.common.errors import (
    CapacityError,
    DeadlineError,
    EngineError,
    RequestError,
    ScissionError,
    UnavailableError,
)
from scission.common.inference_messages import (
    failed_from_proto,
    prompt_logprobs_from_proto,
    tokens_from_proto,
)
from scission.common.log import request_logger
from scission.common.metrics import GatewayMetrics
from scission.common.types import Finish, FinishReason
from scission.protos import inference_pb2
from scission.services.gateway.answer import Answer
from scission.services.gateway.engine import EngineEvent, GenerationRequest, TokenBatch
from scission.services.gateway.registry import Worker
from scission.services.gateway.request_messages import RequestMessages
from scission.services.gateway.router import Demand, Router
from scission.services.gateway.timeline import Timeline
from scission.services.gateway.worker_link import WorkerLink

logger = logging.getLogger(__name__)

# A started request waits so long for a worker of a role that has none: one may be restarting. With
# the silence that is waited for before, a stream goes on or ends within 5 s of a fault.
REPLACEMENT_WAIT_S = 1.5
# A started request that finds every worker full asks again, at growing intervals, for so long.
PRESSURE_PATIENCE_S = 60.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0
# Two streams bring one request's tokens: so long may one wait for another that precedes it.
GAP_PATIENCE_S = 1.0
# A prefill that is done keeps the state for a short lease; later, Redirect is not even tried.
REDIRECT_WINDOW_S = 5.0
# Ends of attempts that are no fault of anyone: not counted against the request.
PRESSURE_REASONS = frozenset({"preempted", "refused", "no_grant", "full", "draining"})
# After these, the decode may well take the same request the next time.
KEEPS_DECODE = frozenset({"preempted", "draining"})


class RequestRun:
    """A request from admission to its end; the caller awaits `next_event`."""

    def __init__(
        self,
        request: GenerationRequest,
        gateway_epoch: int,
        router: Router,
        options: AdmissionOptions,
        metrics: GatewayMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self._router = router
        self._options = options
        self._metrics = metrics
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._logger = request_logger(logger, request.external_id or request.request_id)
        self._messages = RequestMessages(request, gateway_epoch, clock)
        self._answer = Answer(request)
        self._delivery = self._answer.delivery
        self._is_over = False
        self._timeline = Timeline(request.arrival, clock())

        # The current attempt. While a retry is awaited its workers are None, but for a prefill
        # whose state is to be shipped again.
        self._attempt = -1
        self._prefill: Worker | None = None
        self._prefill_since = 0  # the attempt that began with this prefill
        self._is_prefill_accepted = False
        self._prefill_ended_at: float | None = None
        self._decode: Worker | None = None
        self._is_decode_ended = False
        self._is_committed = False

        # Between attempts.
        self._num_faults = 0
        self._num_deaths = 0  # of engines while this request was there
        self._avoid: set[str] = set()  # workers that could not take it, this time round
        self._refusal: ScissionError | None = None
        self._waiting_since: float | None = None
        self._backoff_s = MIN_BACKOFF_S

        self._retry_timer: asyncio.TimerHandle | None = None
        self._gap_timer: asyncio.TimerHandle | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._handlers: dict[str, Callable[[Worker, inference_pb2.RequestEvent], None]] = {
            "tokens": self._on_tokens,
            "prompt_logprobs": self._on_prompt_logprobs,
            "prefilled": self._on_prefilled,
            "committed": self._on_committed,
            "ended": self._on_ended,
            "retry": self._on_retry,
            "failed": self._on_failed,
        }

    # -- for the caller

    def start(self) -> None:
        """Begin the first attempt; whatever goes wrong comes out of `next_event`."""
        remaining_s = self.request.deadline - self._clock()
        self._deadline_timer = self._loop.call_later(max(0.0, remaining_s), self._on_deadline)
        if remaining_s > 0:
            self._begin_attempt()

    async def next_event(self) -> EngineEvent | None:
        """The next event; None after the last.

        Raises:
            ScissionError: what ended the request.
        """
        event = await self._answer.next()
        if isinstance(event, TokenBatch):
            self._timeline.last_token_at = self._clock()
            if self._timeline.first_token_at is None:
                self._timeline.first_token_at = self._timeline.last_token_at
                self._timeline.observe_parts(self._metrics)
        return event

    def stop_choice(self, choice: int) -> None:
        """The caller wants no more of a choice."""
        if self._is_over:
            return
        self._delivery.stop(choice)
        if self._delivery.is_done:
            self._finish("stop_string")
            return
        for worker in (self._prefill, self._decode):
            if worker is not None:
                self._cancel(worker, "stop_string", choice)

    def close(self) -> None:
        """The caller is gone or done; frees both workers when the request is not over."""
        if not self._is_over:
            self._finish("client_gone")
        self._timeline.observe_request(self._metrics)
        self._metrics.dropped_tokens("duplicate").inc(self._delivery.num_duplicates)

    # -- attempts

    def _begin_attempt(self) -> None:
        """Pick a pair and prefill what is known so far."""
        self._retry_timer = None
        try:
            pair = self._router.pick(self._demand(), self._avoid)
        except ScissionError as error:
            self._on_no_worker(error, self._begin_attempt)
            return
        self._attempt += 1
        self._prefill_since = self._attempt
        self._is_prefill_accepted = False
        self._prefill_ended_at = None
        self._is_committed = self._is_decode_ended = False
        self._prefill, self._decode = pair.prefill, pair.decode
        self._delivery.begin_attempt()
        self._timeline.begin_prefill(self._attempt, self._clock())
        destination = None if pair.decode is None else pair.decode.link.destination
        forced = self._delivery.forced()
        self._submit(pair.prefill, self._messages.prefill(self._attempt, forced, destination))
        if pair.decode is not None:
            self._submit(pair.decode, self._messages.decode(self._attempt, forced))

    def _begin_redirect(self) -> None:
        """Have the prefill ship what it holds to another decode, as the next attempt."""
        self._retry_timer = None
        prefill = self._prefill
        if prefill is None:
            self._begin_attempt()
            return
        try:
            decode = self._router.pick_decode(self._demand(), prefill.digest_key, self._avoid)
        except ScissionError as error:
            self._on_no_worker(error, self._begin_redirect)
            return
        self._attempt += 1
        self._decode = decode
        self._is_committed = self._is_decode_ended = False
        self._delivery.begin_attempt()
        self._metrics.redirects.inc()
        self._submit(decode, self._messages.decode(self._attempt, self._delivery.forced()))
        redirect = self._messages.redirect(self._attempt, decode.link.destination)
        self._own(self._await_redirect(prefill, redirect))

    def _submit(
        self,
        worker: Worker,
        request: inference_pb2.PrefillRequest | inference_pb2.DecodeRequest,
    ) -> None:
        # Before the call: events may overtake its reply.
        worker.link.sinks[self.request.request_id] = self
        self._own(self._await_submit(worker, request))

    async def _await_submit(
        self,
        worker: Worker,
        request: inference_pb2.PrefillRequest | inference_pb2.DecodeRequest,
    ) -> None:
        try:
            reply = await worker.link.submit(request)
        except ScissionError as error:
            if self._is_current(worker, request.attempt):
                self._on_refused(worker, error)
            return
        if not self._is_current(worker, request.attempt):
            return
        if worker is self._prefill:
            self._is_prefill_accepted = True
        if worker is self._prefill and request.attempt == self._timeline.attempt:
            self._timeline.received_at = reply.received_at
            self._timeline.clock_offset_s = worker.link.clock_offset_s
            self._timeline.observe_parts(self._metrics)
        self._waiting_since = None
        for choice in self._delivery.stopped:
            self._cancel(worker, "stop_string", choice)

    async def _await_redirect(
        self, prefill: Worker, request: inference_pb2.RedirectRequest
    ) -> None:
        try:
            await prefill.link.redirect(request)
        except ScissionError as error:
            if self._is_current(prefill, request.attempt):
                # It holds nothing any more; that is no fault.
                self._retry("redirect_refused", error.message, is_fault=False, can_redirect=False)

    def _own(self, call: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._on_call_done)

    def _on_call_done(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._logger.error("a call to a worker failed", exc_info=error)
        self._fail(EngineError("The server had an error while processing the request."))

    def _retry(self, reason: str, detail: str = "", *, is_fault: bool, can_redirect: bool) -> None:
        """Give the current attempt up and begin the next."""
        if self._is_over:
            return
        self._metrics.new_attempts(reason).inc()
        self._logger.info(
            "attempt %d ends: %s",
            self._attempt,
            reason,
            extra={"delivered": self._delivery.num_tokens} | ({"detail": detail} if detail else {}),
        )
        if is_fault:
            self._num_faults += 1
            if self._num_faults >= self._options.max_attempts:
                self._fail(EngineError(f"The request failed {self._num_faults} times: {reason}."))
                return
        self._disarm(self._gap_timer)
        self._gap_timer = None
        self._disarm(self._retry_timer)
        if not (can_redirect and self._is_state_held()):
            self._leave_prefill("superseded")
        self._leave_decode("superseded")
        if self._prefill is None:
            self._begin_attempt()
        else:
            self._begin_redirect()

    def _is_state_held(self) -> bool:
        """Whether the prefill may still have what it computed."""
        if self._prefill is None or not self._prefill.link.is_live:
            return False
        return (
            self._prefill_ended_at is None
            or self._clock() - self._prefill_ended_at <= REDIRECT_WINDOW_S
        )

    def _on_no_worker(self, error: ScissionError, again: Callable[[], None]) -> None:
        """Nobody to go to: the end of a request that has not started, else a wait."""
        # Next time round all are asked again.
        self._avoid.clear()
        if not isinstance(error, CapacityError | UnavailableError):
            self._fail(error)
            return
        refusal, self._refusal = self._refusal, None
        if not (self._answer.is_prompt_ready or self._num_deaths or self._num_faults):
            if isinstance(error, CapacityError) and isinstance(refusal, UnavailableError):
                error = refusal
            is_full = isinstance(error, CapacityError)
            self._metrics.rejected("no_capacity" if is_full else "no_workers").inc()
            error.retry_after_s = error.retry_after_s or self._options.retry_after_s
            self._fail(error)
            return
        now = self._clock()
        if self._waiting_since is None:
            self._waiting_since = now
        is_full = isinstance(error, CapacityError)
        if now - self._waiting_since >= (PRESSURE_PATIENCE_S if is_full else REPLACEMENT_WAIT_S):
            self._fail(error)
            return
        self._retry_timer = self._loop.call_later(self._backoff_s, again)
        if is_full:
            self._backoff_s = min(MAX_BACKOFF_S, 2 * self._backoff_s)

    def _on_refused(self, worker: Worker, error: ScissionError) -> None:
        """A worker did not take the current attempt."""
        if isinstance(error, RequestError):
            self._fail(error)
            return
        self._avoid.add(worker.worker_id)
        self._refusal = error
        is_pressure = isinstance(error, CapacityError | UnavailableError)
        self._retry(
            "refused" if is_pressure else "call_failed",
            f"{worker.worker_id}: {error.message}",
            is_fault=not is_pressure,
            # Of a decode's refusal the prefill knows nothing: it computes, and ships elsewhere.
            can_redirect=worker is self._decode and self._is_prefill_accepted,
        )

    # -- what links say

    def on_event(self, link: WorkerLink, event: inference_pb2.RequestEvent) -> None:
        """An event of one of this request's workers; those of superseded attempts are dropped."""
        if self._is_over:
            return
        kind = event.WhichOneof("event")
        is_current = event.attempt == self._attempt
        if self._decode is not None and link is self._decode.link and is_current:
            worker = self._decode
        elif (
            self._prefill is not None
            and link is self._prefill.link
            # What it computed stays right when only the decode has changed since.
            and (
                is_current
                or (
                    kind in ("tokens", "prefilled", "prompt_logprobs")
                    and self._prefill_since <= event.attempt < self._attempt
                )
            )
        ):
            worker = self._prefill
        else:
            if kind == "tokens":
                self._metrics.dropped_tokens("superseded").inc(len(event.tokens.tokens))
            return
        if kind is not None:
            self._handlers[kind](worker, event)

    def on_worker_lost(self, link: WorkerLink, reason: str) -> None:
        """A worker of this request is dead or silent."""
        if self._is_over:
            return
        if self._decode is not None and link is self._decode.link:
            worker, self._decode = self._decode, None
            self._on_death(worker, reason, can_redirect=True)
        elif self._prefill is not None and link is self._prefill.link:
            worker, self._prefill = self._prefill, None
            if self._is_committed:
                # The decode has everything, unless what only the prefill told is missing.
                self._on_prefill_lost_after_commit(worker, reason)
            elif self._retry_timer is None:
                self._on_death(worker, reason, can_redirect=False)
            else:
                # Between two attempts: the next one begins with another prefill.
                self._survives(worker)

    def _on_prefill_lost_after_commit(self, worker: Worker, reason: str) -> None:
        if self._answer.lacks_prompt_logprobs:
            self._on_death(worker, reason, can_redirect=False)
            return
        if not self._answer.is_prompt_ready:
            self._answer.set_computed(cached_tokens=0)
            self._check_complete()
        if self._delivery.has_gap:
            self._on_death(worker, reason, can_redirect=False)

    def _on_death(self, worker: Worker, reason: str, *, can_redirect: bool) -> None:
        if self._survives(worker):
            self._retry(
                f"{worker.role}_lost",
                f"{worker.worker_id}: {reason}",
                is_fault=True,
                can_redirect=can_redirect,
            )

    def _survives(self, dead: Worker) -> bool:
        """Count an engine's death; a request that may be the cause of several is ended."""
        self._num_deaths += not dead.is_leaving
        if self._num_deaths < self._options.max_engine_deaths:
            return True
        self._fail(
            EngineError(
                f"The request was running on {self._num_deaths} workers that failed; "
                "it is not tried again."
            )
        )
        return False

    def _on_tokens(self, worker: Worker, event: inference_pb2.RequestEvent) -> None:
        timeline = self._timeline
        if (
            worker is self._prefill
            and timeline.token_sent_at is None
            and timeline.attempt == self._prefill_since
        ):
            timeline.token_sent_at = worker.link.sent_at
        self._answer.add(*tokens_from_proto(event.tokens))
        if self._check_complete():
            return
        if self._delivery.has_gap:
            if self._is_committed and self._prefill is None:
                self._retry("token_gap", is_fault=True, can_redirect=False)
            elif self._gap_timer is None:
                self._gap_timer = self._loop.call_later(GAP_PATIENCE_S, self._on_gap)
        elif self._gap_timer is not None and not self._is_decode_ended:
            self._disarm(self._gap_timer)
            self._gap_timer = None

    def _on_gap(self) -> None:
        self._gap_timer = None
        self._retry("token_gap", is_fault=True, can_redirect=True)

    def _on_prompt_logprobs(self, worker: Worker, event: inference_pb2.RequestEvent) -> None:
        self._answer.add_prompt_logprobs(*prompt_logprobs_from_proto(event.prompt_logprobs))
        self._check_complete()

    def _on_prefilled(self, worker: Worker, event: inference_pb2.RequestEvent) -> None:
        if self._timeline.prefilled is None:
            self._timeline.prefilled = event.prefilled
        self._answer.set_computed(event.prefilled.cached_tokens)
        self._check_complete()

    def _on_committed(self, worker: Worker, event: inference_pb2.RequestEvent) -> None:
        if worker is self._decode:
            self._is_committed = True
            self._avoid.clear()
            self._backoff_s = MIN_BACKOFF_S

    def _on_ended(self, worker: Worker, event: inference_pb2.RequestEvent) -> None:
        if worker is self._decode:
            self._is_decode_ended = True
            if self._gap_timer is None:
                # What is missing is on the prefill's stream, or nowhere.
                self._gap_timer = self._loop.call_later(GAP_PATIENCE_S, self._on_gap)
            return
        self._prefill_ended_at = self._clock()
        if self._decode is not None or self._retry_timer is not None:
            return
        if self.request.sampling.max_tokens == 0 and self._answer.is_prompt_ready:
            unfinished = self._delivery.unfinished
            self._answer.add((), [Finish(choice, FinishReason.LENGTH) for choice in unfinished])
            self._check_complete()
        else:
            self._retry("incomplete", is_fault=True, can_redirect=False)

    def _on_retry(self, worker: Worker, event: inference_pb2.RequestEvent) -> None:
        retry = event.retry
        if worker is self._prefill and self._is_committed:
            # Its part was over with COMMIT, whether it knows or not.
            return
        can_redirect = worker is self._decode or retry.is_state_retained
        if worker is self._decode:
            self._is_decode_ended = True
        elif not can_redirect:
            self._prefill_ended_at = self._clock()
        if self._retry_timer is not None:
            # Already between two attempts; this only says what is no longer held.
            if not can_redirect:
                self._leave_prefill("superseded")
            return
        if retry.reason == "draining":
            self._avoid.add(worker.worker_id)
        elif self._decode is not None and retry.reason not in KEEPS_DECODE:
            self._avoid.add(self._decode.worker_id)
        self._retry(
            retry.reason or "unspecified",
            retry.detail,
            is_fault=retry.reason not in PRESSURE_REASONS,
            can_redirect=can_redirect,
        )

    def _on_failed(self, worker: Worker, event: inference_pb2.RequestEvent) -> None:
        error = failed_from_proto(event.failed)
        self._logger.warning("failed on %s: %s", worker.worker_id, error.message)
        self._fail(error)

    def _on_deadline(self) -> None:
        self._deadline_timer = None
        allowed_s = self.request.deadline - self.request.arrival
        self._fail(
            DeadlineError(
                f"The request was not finished within its deadline of {allowed_s:.3g} s."
            ),
            "deadline",
        )

    # -- ends

    def _check_complete(self) -> bool:
        """Whether the request is over because everything has been put out."""
        if not self._is_over and self._answer.is_complete:
            self._finish("finished")
        return self._is_over

    def _fail(self, error: ScissionError, reason: str = "failed") -> None:
        if self._is_over:
            return
        self._finish(reason, error)

    def _finish(self, reason: str, error: ScissionError | None = None) -> None:
        """The request is over; whoever still works for it is told."""
        self._is_over = True
        self._answer.end(error)
        # After COMMIT a request that ran to its end is over for both workers too.
        if reason != "finished" or not self._is_committed:
            if reason != "finished":
                self._leave_prefill(reason)
            self._leave_decode(reason)
        for worker in (self._prefill, self._decode):
            if worker is not None:
                worker.link.sinks.pop(self.request.request_id, None)
        for timer in (self._deadline_timer, self._retry_timer, self._gap_timer):
            self._disarm(timer)

    def _leave_prefill(self, reason: str) -> None:
        if self._prefill is not None:
            if self._prefill_ended_at is None:
                self._cancel(self._prefill, reason)
            self._prefill.link.sinks.pop(self.request.request_id, None)
            self._prefill = None

    def _leave_decode(self, reason: str) -> None:
        if self._decode is not None:
            if not self._is_decode_ended:
                self._cancel(self._decode, reason)
            self._decode.link.sinks.pop(self.request.request_id, None)
            self._decode = None

    def _cancel(self, worker: Worker, reason: str, choice: int | None = None) -> None:
        self._metrics.cancels(reason).inc()
        worker.link.cancel(self.request.request_id, self._attempt, reason, choice)

    # -- small things

    def _is_current(self, worker: Worker, attempt: int) -> bool:
        return (
            not self._is_over
            and attempt == self._attempt
            and (worker is self._prefill or worker is self._decode)
        )

    def _demand(self) -> Demand:
        num_left = self._delivery.num_left(self.request.sampling.max_tokens)
        token_ids = self.request.prompt_token_ids
        # A prefill samples one token of each choice, but feeds forced tokens only to a single one.
        needs_decode = num_left > 1
        if self._delivery.num_tokens:
            if self.request.n == 1:
                token_ids = [*token_ids, *self._delivery.forced()[0]]
            else:
                needs_decode = num_left > 0
        return Demand(
            token_ids,
            self.request.cache_salt,
            num_left,
            needs_decode,
            num_choices=max(1, len(self._delivery.unfinished)),
        )

    @staticmethod
    def _disarm(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
