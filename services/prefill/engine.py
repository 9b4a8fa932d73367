"""The prefill engine: a loop in one thread, which alone touches requests, blocks and the model.

A turn takes calls from the inbox, hears what became of transfers, ends what is overdue, computes
one batch of chunks and tells the gateways. A request goes QUEUED -> COMPUTING -> RETAINED -> gone.
"""

import logging
import time
from collections.abc import Callable, Sequence

from scission.common.cache.block_pool import State
from scission.common.config import SchedulerOptions
from scission.common.ended_attempts import EndedAttempts
from scission.common.engine_inbox import Cancel, GatewayGone, Inbox, InboxItem, Redirect, Submit
from scission.common.errors import (
    CancelledError,
    CapacityError,
    DeadlineError,
    EngineError,
    ScissionError,
    TransferError,
    UnavailableError,
)
from scission.common.event_stream import EventStreams
from scission.common.inference_messages import (
    failed_to_proto,
    prompt_logprobs_to_proto,
    token_to_proto,
    tokens_to_proto,
)
from scission.common.log import request_logger
from scission.common.model.batch import SequenceChunk
from scission.common.runner import Runner
from scission.common.timers import Timers
from scission.common.transfer.events import Committed, Failed, Granted, Refused, SenderEvent
from scission.protos import cluster_pb2, inference_pb2
from scission.services.prefill.batch import (
    FirstTokens,
    chunk_prompt_logprobs,
    draw_first_tokens,
    lay_out,
    split_logits,
)
from scission.services.prefill.handoff import Handoff, StateSender
from scission.services.prefill.meters import PrefillMeters
from scission.services.prefill.outbox import Outbox
from scission.services.prefill.pace import Pace
from scission.services.prefill.prefix_updates import PrefixUpdates
from scission.services.prefill.request import (
    ModelFacts,
    Phase,
    Request,
    parse_destination,
    parse_request,
)
from scission.services.prefill.retention import Retention
from scission.services.prefill.scheduler import ScheduledChunk, Scheduler
from scission.services.prefill.state import StateStore

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; then the process gives up
LOGITS_BYTES = 256 << 20  # that the prompt logprobs of one step may take
# What a transfer's failure is to the gateway; every other one is "transfer_failed".
_RETRY_REASONS = {
    "peer_lost": "peer_lost",
    "unreachable": "peer_lost",
    "preempted": "preempted",
}


class PrefillEngine:
    """See the module. `run` and `turn` are the engine thread's; `stop`, `drain`, `is_idle`, `load`,
    `describe` and `prefix_update` may be called from any thread.
    """

    def __init__(
        self,
        runner: Runner,
        facts: ModelFacts,
        store: StateStore,
        sender: StateSender,
        inbox: Inbox[InboxItem],
        streams: EventStreams,
        options: SchedulerOptions,
        meters: PrefillMeters,
        *,
        num_layers: int,
        beat_s: float,
        clock: Callable[[], float] = time.monotonic,
        on_batch: Callable[[Sequence[SequenceChunk]], None] | None = None,
    ) -> None:
        """
        Args:
            store: the state that `runner` computes on.
            num_layers: that pieces are counted in, the model's.
            on_batch: is shown each step's batch before it is computed, for a replay.
        """
        self._runner = runner
        self._facts = facts
        self._store = store
        self._inbox = inbox
        self._streams = streams
        self._options = options
        self._meters = meters
        self._beat_s = beat_s
        self._clock = clock
        self._on_batch = on_batch
        self._outbox = Outbox(streams)
        self._handoff = Handoff(sender, num_layers, clock)
        self._retention = Retention(options.retain_lease_s, options.commit_lease_s)
        self._scheduler = Scheduler(
            store,
            max_num_batched_tokens=options.batched_tokens_on(runner.storage.device.type),
            max_num_seqs=options.max_num_seqs,
            max_queued=options.max_queued,
            max_logits=max(1, LOGITS_BYTES // (4 * facts.vocab_size)),
            make_room=self._make_room,
        )
        self._prefix_updates = PrefixUpdates()
        self._requests: dict[str, Request] = {}
        self._ended = EndedAttempts()
        self._timers = Timers[Request]()  # deadlines and leases
        self._pace = Pace()
        self._next_beat = 0.0
        self._num_failed_steps = 0
        self._is_draining = False
        self._is_stopping = False
        self._has_work = False
        self._load = self._measure_load()

    # --- for other threads

    def stop(self) -> None:
        """Let `run` return after its current turn; what still runs goes back to the gateways."""
        self._is_stopping = True
        self._inbox.wake()

    def drain(self) -> None:
        """Refuse what is new, finish what was taken."""
        self._is_draining = True
        self._inbox.wake()

    @property
    def is_idle(self) -> bool:
        return not self._requests and self._handoff.num_open == 0

    def load(self) -> inference_pb2.Load:
        """As of the last turn."""
        return self._load

    def prefix_update(self, full: bool) -> cluster_pb2.PrefixUpdate:
        """The hashes at which a cached prefix can end: all, or the changes since the last call."""
        return self._prefix_updates.take(full)

    def describe(self) -> cluster_pb2.WorkerDescription:
        """Capacity and what of the model routing needs."""
        return cluster_pb2.WorkerDescription(
            max_model_len=self._facts.max_model_len,
            block_size=self._store.block_size,
            num_blocks=self._store.blocks.total,
            max_num_seqs=self._options.max_num_seqs,
            layout_digest=self._facts.layout_digest,
        )

    # --- the loop

    def run(self) -> None:
        """Turn until `stop`. Raises EngineError when step after step has failed."""
        try:
            while not self._is_stopping:
                self.turn(self._idle_wait())
        finally:
            for request in list(self._requests.values()):
                self._retry(request, "draining", "the worker has stopped")
                self._drop(request, "draining", "retry")
            self._outbox.flush()
            self._handoff.close()

    def turn(self, wait_s: float = 0.0) -> None:
        """One turn, after waiting up to `wait_s` for a call or a transfer's event."""
        for item in self._inbox.drain(wait_s):
            self._take(item)
        # before what is overdue: a grant that is here already ends the wait for it
        for request, event in self._handoff.poll():
            self._on_transfer(request, event)
        self._expire()
        chunks = self._scheduler.schedule(self._clock())
        if chunks:
            self._step(chunks)
        self._has_work = bool(chunks)
        self._prefix_updates.record(self._store.prefixes.take_changes())
        self._outbox.flush()
        self._load = self._measure_load()
        self._beat()

    def _idle_wait(self) -> float:
        if self._has_work:
            return 0.0
        due = self._timers.next_at
        wake_at = self._next_beat if due is None else min(due, self._next_beat)
        return max(0.0, wake_at - self._clock())

    def _beat(self) -> None:
        now = self._clock()
        if now < self._next_beat:
            return
        self._next_beat = now + self._beat_s
        self._streams.beat(self._load)
        self._meters.beat(self._store, self._load, len(self._retention))
        self._meters.transfers(self._handoff.num_in_flight, self._handoff.stats())

    # --- calls

    def _take(self, item: InboxItem) -> None:
        match item:
            case Submit() | Redirect():
                try:
                    if isinstance(item, Submit):
                        self._submit(item)
                    else:
                        self._redirect(item)
                except Exception as error:
                    if not isinstance(error, ScissionError):
                        logger.exception("request %s was not taken", item.request.request_id)
                    self._meters.engine.requests("refused").inc()
                    item.reply(_shown(error))
                else:
                    item.reply(self._expected_wait())
            case Cancel():
                self._cancel(item)
            case GatewayGone(gateway_epoch=epoch):
                for request in [r for r in self._requests.values() if r.gateway_epoch == epoch]:
                    self._drop(request, "cancelled", "cancelled")

    def _submit(self, submit: Submit) -> None:
        now = self._clock()
        request = parse_request(submit, self._facts, self._store.block_size, now)
        current = self._requests.get(request.request_id)
        if current is not None and current.attempt == request.attempt:
            return  # a repeated call
        if (current is not None and current.attempt > request.attempt) or self._ended.covers(
            request.request_id, request.attempt, now
        ):
            raise CancelledError(f"attempt {request.attempt} has ended or was superseded")
        if current is not None:
            self._drop(current, "superseded", "cancelled")
        if self._is_draining:
            raise UnavailableError("this prefill is draining")
        if self._scheduler.is_full:
            raise CapacityError(
                f"the prefill's queue is full with {self._scheduler.num_queued} requests",
                retry_after_s=max(1.0, self._expected_wait()),
            )
        self._requests[request.request_id] = request
        self._scheduler.add(request)
        self._timers.set(request, request.due_at)

    def _redirect(self, redirect: Redirect) -> None:
        """Serve a new attempt from what is queued, being computed or retained for an older one."""
        message = redirect.request
        now = self._clock()
        request = self._requests.get(message.request_id)
        if request is None:
            raise TransferError(f"nothing is retained for request {message.request_id}")
        if message.attempt <= request.attempt:
            raise CancelledError(f"attempt {message.attempt} was superseded by {request.attempt}")
        if redirect.deadline <= now:
            raise DeadlineError("the deadline had passed when the redirect arrived")
        self._abort(request, "superseded")
        request.attempt = message.attempt
        request.destination = parse_destination(message.destination)
        request.deadline = redirect.deadline
        request.is_ended = False
        self._timers.set(request, request.due_at)
        self._outbox.repeat(request)
        if request.has_begun:
            self._handoff.open(request)
        if request.phase is Phase.RETAINED:
            self._handoff.finish(request)
            self._keep(request)

    def _cancel(self, cancel: Cancel) -> None:
        if cancel.choice is None:
            self._ended.add(cancel.request_id, cancel.attempt, self._clock())
        request = self._requests.get(cancel.request_id)
        if request is None or request.attempt > cancel.attempt:
            return
        if cancel.choice is not None:
            request.cancelled_choices.add(cancel.choice)
            if len(request.cancelled_choices) < len(request.choices):
                return
        reason = cancel.reason if cancel.reason in ("superseded", "deadline") else "cancelled"
        self._drop(request, reason, "cancelled")

    # --- time

    def _expire(self) -> None:
        now = self._clock()
        for request in self._timers.take_due(now):
            if request.is_committed:
                self._drop(request, "finished", "handed_over")
            elif request.deadline <= now:
                error = DeadlineError("the request's deadline has passed")
                self._outbox.end(request, failed=failed_to_proto(error))
                self._drop(request, "deadline", "expired")
            else:
                self._meters.prefill.expired_leases.inc()
                self._retry(request, "no_grant", "no decode granted room within the lease")
                self._drop(request, "cancelled", "retry")

    def _keep(self, request: Request) -> None:
        """Retain under a lease, which does not run while a granted transfer does."""
        self._retention.keep(request, self._clock())
        if request.transfer is not None and request.transfer.grant_wait_s is not None:
            self._retention.ship(request)
        self._timers.set(request, request.due_at)

    def _make_room(self) -> bool:
        """Give up the lease of a state that a decode has committed; False when there is none."""
        request = self._retention.first_committed()
        if request is None:
            return False
        self._drop(request, "finished", "handed_over")
        return True

    # --- transfers

    def _on_transfer(self, request: Request, event: SenderEvent) -> None:
        match event:
            case Granted():
                self._meters.transfer.grant_wait.observe(event.wait_s)
                if request.phase is Phase.RETAINED:
                    self._retention.ship(request)
                    self._timers.set(request, request.due_at)
            case Committed():
                request.transfer = None
                self._meters.committed(event)
                self._outbox.end(request, ended=inference_pb2.Ended())
                self._retention.commit(request, self._clock())
                self._timers.set(request, request.due_at)
            case Refused():
                reason = "layout_mismatch" if event.reason == "layout_mismatch" else "refused"
                detail = " ".join(filter(None, (event.reason, event.field, event.detail)))
                self._lost(request, event.reason, reason, detail)
            case Failed(reason="deadline"):
                request.transfer = None  # as ours: `_expire` says so
            case Failed():
                reason = _RETRY_REASONS.get(event.reason, "transfer_failed")
                self._lost(request, event.reason, reason, event.reason)
            case _:
                pass

    def _lost(self, request: Request, cause: str, reason: str, detail: str) -> None:
        """The transfer has ended, the state has not: the gateway names another decode for it."""
        request.transfer = None
        self._meters.lost(cause)
        self._retry(request, reason, detail, is_state_retained=True)
        if request.phase is Phase.RETAINED:
            self._keep(request)

    def _abort(self, request: Request, reason: str) -> None:
        if request.transfer is not None:
            self._meters.aborted(reason)
            self._handoff.abort(request, reason)

    # --- one step

    def _step(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Compute; a failure ends the batch's requests, and the process when it repeats."""
        unkept = list(chunks)
        started_at = self._clock()
        try:
            self._compute(chunks, unkept, started_at)
        except Exception as error:
            logger.exception("a step of %d requests failed", len(chunks))
            for chunk in unkept:
                self._store.drop_snapshots(chunk.snapshots)
            self._fail([chunk.request for chunk in chunks], error)
            self._num_failed_steps += 1
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                raise EngineError(f"{MAX_FAILED_STEPS} steps in a row failed") from error
            return
        self._num_failed_steps = 0
        num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
        seconds = self._clock() - started_at
        self._meters.step(num_tokens, seconds)
        self._pace.add(num_tokens, seconds)

    def _compute(
        self, chunks: Sequence[ScheduledChunk], unkept: list[ScheduledChunk], started_at: float
    ) -> None:
        """One pass and what follows from it; chunks whose blocks are cached leave `unkept`."""
        for chunk in chunks:
            if not chunk.request.has_begun:
                self._begin(chunk.request, started_at)
        laid_out = [lay_out(chunk, self._runner.storage.layout) for chunk in chunks]
        if self._on_batch is not None:
            self._on_batch(laid_out)

        def on_layers(first: int, last: int) -> None:
            for chunk in chunks:
                self._handoff.offer(chunk.request, (first, last), (chunk.start, chunk.end))
            # a long step shows that it goes on: silence would end all attempts here
            self._beat()

        logits = split_logits(laid_out, self._runner.forward(laid_out, on_layers))
        for chunk in chunks:
            chunk.request.num_computed = chunk.end
        for chunk, sequence, rows in zip(chunks, laid_out, logits, strict=True):
            if sequence.logits == "all":
                entries = chunk_prompt_logprobs(chunk, rows)
                message = prompt_logprobs_to_proto(chunk.start + 1, entries)
                self._outbox.result(chunk.request, prompt_logprobs=message)
        complete = [
            (chunk.request, rows)
            for chunk, rows in zip(chunks, logits, strict=True)
            if chunk.is_last
        ]
        if complete:
            self._runner.synchronize()
            computed_at = self._clock()
            requests = [request for request, _ in complete]
            drawn = draw_first_tokens(
                requests,
                [rows for _, rows in complete],
                self._facts.eos_token_ids,
                self._facts.max_model_len,
            )
            for request, first in zip(requests, drawn, strict=True):
                self._tell(request, first, computed_at)
            # the client's first token waits for nothing else
            self._outbox.flush()
        while unkept:
            chunk = unkept[-1]
            request = chunk.request
            self._store.keep(request.held, request.hashes, chunk.end, chunk.snapshots)
            unkept.pop()
        for request, _ in complete:
            self._hand_over(request)

    def _begin(self, request: Request, now: float) -> None:
        request.scheduled_at = now
        self._meters.began(request)
        if request.destination is not None:
            self._handoff.open(request)

    def _tell(self, request: Request, first: FirstTokens, computed_at: float) -> None:
        """Emit what the prompt's computation brought."""
        now = self._clock()
        request.first_token_at = now
        request.first_tokens = {token.choice: token_to_proto(token) for token in first.tokens}
        transfer = request.transfer
        grant_wait_s = 0.0
        if transfer is not None:
            grant_wait_s = (
                now - transfer.reserved_at
                if transfer.grant_wait_s is None
                else transfer.grant_wait_s
            )
        prefilled = inference_pb2.Prefilled(
            cached_tokens=min(request.num_cached, request.num_prompt_tokens),
            queue_s=request.queue_s,
            compute_s=computed_at - request.received_at - request.queue_s,
            sample_s=now - computed_at,
            grant_wait_s=grant_wait_s,
        )
        self._meters.prefilled(prefilled)
        self._outbox.result(request, prefilled=prefilled)
        if first.tokens or first.finishes:
            tokens = tokens_to_proto(first.tokens, first.finishes)
            self._outbox.result(request, tokens=tokens)
        finished = {finish.choice for finish in first.finishes} | request.cancelled_choices
        if request.destination is None or len(finished) == len(request.choices):
            self._outbox.end(request, ended=inference_pb2.Ended())
            request.is_finished = True

    def _hand_over(self, request: Request) -> None:
        """Free what is finished; retain and ship the rest."""
        if request.is_finished:
            self._drop(request, "finished", "finished")
            return
        self._scheduler.remove(request)
        request.phase = Phase.RETAINED
        request.held.retain()
        self._handoff.finish(request)
        self._keep(request)

    # --- ends

    def _retry(
        self, request: Request, reason: str, detail: str, *, is_state_retained: bool = False
    ) -> None:
        retry = inference_pb2.Retry(
            reason=reason, detail=detail, is_state_retained=is_state_retained
        )
        self._outbox.end(request, retry=retry)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        failed = failed_to_proto(_shown(error))
        for request in requests:
            if self._requests.get(request.request_id) is request:
                self._outbox.end(request, failed=failed)
                self._drop(request, "internal", "failed")

    def _drop(self, request: Request, abort_reason: str, outcome: str) -> None:
        """Forget the request and free its state, but for what a transfer may still read."""
        self._abort(request, abort_reason)
        self._scheduler.remove(request)
        self._retention.remove(request)
        self._timers.discard(request)
        if request.state is not None:
            request.state.let_go()
        del self._requests[request.request_id]
        self._ended.add(request.request_id, request.attempt, self._clock())
        self._meters.engine.requests(outcome).inc()
        request_logger(logger, request.request_id).info(
            "request ended",
            extra={
                "outcome": outcome,
                "attempt": request.attempt,
                "prompt_tokens": request.num_prompt_tokens,
                "cached_tokens": request.num_cached,
                "external_id": request.external_id,
            },
        )

    # --- load

    def _expected_wait(self) -> float:
        """Seconds until what is waiting now would be computed; for room as long as until now."""
        compute_s = self._pace.seconds_for(self._scheduler.num_waiting_tokens)
        return compute_s + self._scheduler.short_of_room_s(self._clock())

    def _measure_load(self) -> inference_pb2.Load:
        counts = self._store.blocks.counts()
        return inference_pb2.Load(
            num_queued=self._scheduler.num_queued,
            num_running=self._scheduler.num_computing,
            queued_tokens=self._scheduler.num_waiting_tokens,
            free_blocks=counts[State.FREE] + counts[State.CACHED],
            total_blocks=self._store.blocks.total,
            is_draining=self._is_draining,
            expected_wait_s=self._expected_wait(),
        )


def _shown(error: Exception) -> ScissionError:
    """What the gateway is told: of an error that is not one of ours, its type alone."""
    if isinstance(error, ScissionError):
        return error
    return EngineError(f"the prefill failed at this request ({type(error).__name__})")
