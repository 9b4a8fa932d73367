"""The decode engine: the loop that takes requests and state in, and runs the batch step by step.

One thread runs it and owns all its state. Commands come through the inbox, state through the
transfer receiver; events go out through the streams, once a turn and gateway.
"""

import heapq
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from scission.common.cache.block_pool import BlockPool, SlotPool
from scission.common.config import SchedulerOptions
from scission.common.ended_attempts import EndedAttempts
from scission.common.engine_inbox import Cancel, GatewayGone, Inbox, InboxItem, Submit
from scission.common.errors import (
    CancelledError,
    CapacityError,
    ContextLengthError,
    DeadlineError,
    EngineError,
    ScissionError,
    UnavailableError,
    WireError,
)
from scission.common.event_stream import EventStreams
from scission.common.inference_messages import failed_to_proto
from scission.common.log import request_logger
from scission.common.model.batch import SequenceChunk
from scission.common.runner import Runner
from scission.common.sampling import finish_reason
from scission.common.stepping.chunked import ChunkedSteps
from scission.common.stepping.sequences import Drawn, Steps
from scission.common.transfer.events import ReserveRequested
from scission.common.transfer.receiver import Receiver
from scission.protos import cluster_pb2, inference_pb2
from scission.services.decode.admission import ReservationQueue, Rooms
from scission.services.decode.arrival import fork, output_tokens, start_sequences
from scission.services.decode.batch import RunningBatch
from scission.services.decode.handoff import Arrived, Handoffs, Lost
from scission.services.decode.meters import DecodeMeters
from scission.services.decode.outbox import Outbox
from scission.services.decode.request import ModelFacts, Phase, Request, RunningSequence

logger = logging.getLogger(__name__)

MAX_STEP_FAILURES = 3  # in a row; then the process gives up
# Ends of a transfer that follow from what the gateway knows already.
_EXPECTED_ENDS = frozenset({"finished", "cancelled", "superseded", "deadline"})


class DecodeEngine:
    """See the module. `run` is the engine thread's; `stop`, `drain`, `load`, `prefix_update` and
    the properties may be used from any thread.
    """

    def __init__(
        self,
        runner: Runner,
        facts: ModelFacts,
        receiver: Receiver,
        inbox: Inbox[InboxItem],
        streams: EventStreams,
        options: SchedulerOptions,
        meters: DecodeMeters,
        *,
        beat_s: float,
        clock: Callable[[], float] = time.monotonic,
        steps: Steps[RunningSequence] | None = None,
        on_batch: Callable[[Sequence[SequenceChunk]], None] | None = None,
    ) -> None:
        """
        Args:
            steps: compute the batch; None: in chunks, through the runner.
            on_batch: is shown each such step's chunks before they are computed, for a replay.
        """
        self._runner = runner
        self._receiver = receiver
        self._inbox = inbox
        self._streams = streams
        self._options = options
        self._meters = meters
        self._beat_s = beat_s
        self._clock = clock

        storage = runner.storage
        self.blocks = BlockPool(storage.num_blocks)
        self.slots = SlotPool(storage.num_slots)
        block_size = storage.layout.block_size
        # A request longer than all blocks together could never end here.
        context = min(facts.max_model_len, self.blocks.total * block_size)
        self._facts = replace(facts, max_model_len=context)
        self._outbox = Outbox(streams)
        self._rooms = Rooms(
            self.blocks,
            self.slots,
            block_size=block_size,
            growth_tokens=options.growth_tokens,
            max_model_len=context,
        )
        self._queue = ReservationQueue(options.max_queued, options.reserve_wait_s)
        self._handoffs = Handoffs(receiver, storage, self._rooms, self._queue, meters)
        self._batch = RunningBatch(
            steps if steps is not None else ChunkedSteps(runner, on_batch),
            self.blocks,
            self.slots,
            block_size=block_size,
            max_model_len=context,
            preempt_youngest=self._preempt_youngest,
        )
        self._requests: dict[str, Request] = {}
        self._ended = EndedAttempts()
        self._deadlines: list[tuple[float, int, Request]] = []
        self._numbers = itertools.count()
        self._next_beat = 0.0
        self._num_failures = 0
        self._pace = _Pace()
        self._has_more = False
        self._is_draining = False
        self._is_stopping = False
        self._load = inference_pb2.Load(
            free_blocks=self.blocks.total, total_blocks=self.blocks.total
        )

    def stop(self) -> None:
        """Let `run` return after its current turn; what still runs goes back to the gateways."""
        self._is_stopping = True
        self._inbox.wake()

    def drain(self) -> None:
        """Refuse what is new, send back what waits, finish what has begun."""
        self._is_draining = True
        self._inbox.wake()

    @property
    def is_idle(self) -> bool:
        return not self._requests and self._batch.is_idle

    def load(self) -> inference_pb2.Load:
        """As of the last beat."""
        return self._load

    def prefix_update(self, full: bool) -> cluster_pb2.PrefixUpdate:
        """Nothing: decode caches no prefixes."""
        return cluster_pb2.PrefixUpdate()

    def describe(self) -> cluster_pb2.WorkerDescription:
        """Where state is taken in, capacity, and what of the model routing needs."""
        return cluster_pb2.WorkerDescription(
            transfer_address=self._receiver.address,
            max_model_len=self._facts.max_model_len,
            block_size=self._runner.storage.layout.block_size,
            num_blocks=self.blocks.total,
            max_num_seqs=self.slots.total,
            layout_digest=self._facts.layout_digest,
        )

    def run(self) -> None:
        """Turn until `stop`. Raises what makes going on pointless."""
        try:
            while not self._is_stopping:
                self.turn(self._idle_wait())
        finally:
            self._batch.abandon()
            for request in list(self._requests.values()):
                self._retry(request, "draining", "the worker has stopped", "draining")
            self._outbox.flush()
            self._receiver.close()

    def turn(self, wait_s: float = 0.0) -> None:
        """One turn: commands, deadlines, transfers, one step, events.

        Args:
            wait_s: how long to wait for a command or a transfer when none is there.
        """
        for item in self._inbox.drain(wait_s):
            self._take(item)
        now = self._clock()
        if self._is_draining:
            self._send_back_waiting()
        self._expire(now)
        happened, self._has_more = self._handoffs.receive(self._options.inject_bytes_per_step)
        for event in happened:
            match event:
                case ReserveRequested():
                    self._reserve(event, now)
                case Arrived():
                    self._arrive(event)
                case Lost():
                    self._lose(event)
        self._handoffs.grant_waiting(now)
        if not self._batch.is_idle:
            self._step()
            # with the last sequence gone nothing else would wake this thread before the next beat
            self._handoffs.grant_waiting(now)
        if now >= self._next_beat:
            self._next_beat = now + self._beat_s
            self._beat()
        self._outbox.flush()

    def _idle_wait(self) -> float:
        """Seconds until something is due by itself; 0 while there is work."""
        if not self._batch.is_idle or self._has_more:
            return 0.0
        due = [self._next_beat]
        if self._deadlines:
            due.append(self._deadlines[0][0])
        unannounced = self._queue.next_expiry()
        if unannounced is not None:
            due.append(unannounced)
        return max(0.0, min(due) - self._clock())

    # Commands

    def _take(self, item: InboxItem) -> None:
        match item:
            case Submit():
                try:
                    self._submit(item)
                except Exception as error:
                    if not isinstance(error, ScissionError):
                        logger.exception("request %s was not taken", item.request.request_id)
                        error = EngineError(f"the decode failed at it ({type(error).__name__})")
                    self._meters.engine.requests("refused").inc()
                    item.reply(error)
                else:
                    item.reply(self._expected_wait())
            case Cancel():
                self._cancel(item)
            case GatewayGone(gateway_epoch=epoch):
                for request in list(self._requests.values()):
                    if request.gateway_epoch == epoch:
                        self._end(request, "cancelled")
            case _:
                raise AssertionError(f"decode takes no {type(item).__name__}")

    def _submit(self, submit: Submit) -> None:
        if submit.request.num_choices > self.slots.total:
            raise ContextLengthError(
                f"{submit.request.num_choices} choices are more than the {self.slots.total}"
                f" sequences that this worker runs at a time",
                param="n",
            )
        request = Request(submit, self._facts.vocab_size, self._facts.max_model_len)
        now = self._clock()
        current = self._requests.get(request.request_id)
        if current is not None and current.attempt == request.attempt:
            return  # a repeated call
        if self._is_over(request.request_id, request.attempt, now):
            raise CancelledError(f"attempt {request.attempt} was cancelled or superseded")
        if current is not None:
            self._end(current, "cancelled", "superseded")
        if self._is_draining:
            raise UnavailableError("this worker is draining")
        if len(self._requests) >= self._options.max_queued + self._options.max_num_seqs:
            raise CapacityError("this worker has too many requests waiting", retry_after_s=1.0)
        if not self._rooms.can_ever_fit(request, len(request.prompt_token_ids)):
            raise ContextLengthError(
                f"{request.num_choices} choices of {len(request.prompt_token_ids)} prompt tokens"
                f" are more than this worker's {self.blocks.total} blocks of state hold"
            )
        self._requests[request.request_id] = request
        self._watch_deadline(request)
        self._handoffs.announce(request, now)

    def _is_over(self, request_id: str, attempt: int, now: float) -> bool:
        """The attempt was cancelled, or a higher one is here."""
        current = self._requests.get(request_id)
        return (current is not None and current.attempt > attempt) or self._ended.covers(
            request_id, attempt, now
        )

    def _cancel(self, cancel: Cancel) -> None:
        if cancel.choice is None:
            self._ended.add(cancel.request_id, cancel.attempt, self._clock())
        request = self._requests.get(cancel.request_id)
        if request is None or request.attempt > cancel.attempt:
            return
        if cancel.choice is None:
            reason = cancel.reason if cancel.reason in _EXPECTED_ENDS else "cancelled"
            self._end(request, "cancelled", reason)
            return
        request.live_choices.discard(cancel.choice)
        for sequence in [s for s in request.sequences if s.choice == cancel.choice]:
            self._release(sequence)
        if not request.live_choices or (request.phase is Phase.RUNNING and not request.sequences):
            self._finish(request)

    def _send_back_waiting(self) -> None:
        for request in list(self._requests.values()):
            if request.phase in (Phase.ANNOUNCED, Phase.WAITING):
                self._retry(request, "draining", "the worker is draining", "draining")
        self._handoffs.refuse_waiting("draining")

    def _watch_deadline(self, request: Request) -> None:
        if len(self._deadlines) > 2 * len(self._requests) + 64:  # mostly of requests that ended
            self._deadlines = [d for d in self._deadlines if d[2].phase is not Phase.ENDED]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (request.deadline, next(self._numbers), request))

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if request.phase is not Phase.ENDED:
                self._end(request, "expired", "deadline")
                error = DeadlineError("the request's deadline has passed")
                self._outbox.put(request, failed=failed_to_proto(error))
        self._handoffs.expire(now)

    # Transfers

    def _reserve(self, event: ReserveRequested, now: float) -> None:
        handle = event.handle
        request = self._requests.get(handle.request_id)
        if self._is_draining:
            self._handoffs.refuse(handle, "draining")
        elif self._is_over(handle.request_id, handle.attempt, now):
            self._handoffs.refuse(handle, "superseded")
        elif request is None or request.attempt < handle.attempt:
            self._handoffs.reserve(event, None, now)  # its announcement is on the way
        elif request.phase is Phase.ANNOUNCED:
            self._handoffs.reserve(event, request, now)
        else:
            self._handoffs.refuse(handle, "superseded")  # an attempt has one transfer

    def _arrive(self, arrived: Arrived) -> None:
        request, ready = arrived.request, arrived.ready
        try:
            outputs = output_tokens(request, ready.manifest, self._facts.vocab_size)
        except WireError as error:
            request_logger(logger, request.request_id).error("manifest refused: %s", error)
            self._retry(request, "transfer_failed", error.message, "corrupt")
            return
        started = start_sequences(
            request, outputs, self._facts.eos_token_ids, self._facts.max_model_len
        )
        request.sequences = fork(
            request, arrived.room, started, self._runner.storage, self.blocks, self.slots
        )
        self._handoffs.commit(request)
        self._batch.add(request.sequences)
        self._meters.arrived(ready)
        committed = inference_pb2.Committed(
            transfer_s=ready.seconds,
            exposed_s=ready.exposed_s,
            inject_s=ready.inject_s,
            bytes=ready.num_bytes,
        )
        self._outbox.put(request, committed=committed)
        if not request.sequences:
            self._finish(request)

    def _lose(self, lost: Lost) -> None:
        self._meters.lost(lost.reason)
        if lost.reason in _EXPECTED_ENDS:
            self._end(lost.request, "cancelled")
        else:
            kind = "peer_lost" if lost.reason == "peer_lost" else "transfer_failed"
            self._retry(lost.request, kind, lost.reason)

    # Steps

    def _step(self) -> None:
        """One step and what follows. A failure sends the batch back to the gateways."""
        started_at = self._clock()
        try:
            num_drawn = 0
            for drawn in self._batch.step():
                self._take_token(drawn)
                num_drawn += 1
        except Exception as error:
            self._num_failures += 1
            logger.exception("a step failed (%d in a row)", self._num_failures)
            self._batch.abandon()
            for request in dict.fromkeys(s.request for s in self._batch.sequences):
                self._retry(request, "engine_error", repr(error))
            if self._num_failures >= MAX_STEP_FAILURES:
                raise EngineError(f"{self._num_failures} steps failed in a row") from error
            return
        self._num_failures = 0
        self._meters.step(self._batch.num_tokens, num_drawn, self._clock() - started_at)

    def _take_token(self, drawn: Drawn[RunningSequence]) -> None:
        sequence, request = drawn.sequence, drawn.sequence.request
        sampling = sequence.sampling
        finish = finish_reason(
            sampling,
            drawn.token_id,
            self._facts.eos_token_ids,
            drawn.context_len,
            self._facts.max_model_len,
        )
        request.num_drawn += 1
        self._outbox.put_token(
            request,
            sampling.choice,
            sampling.num_output - 1,
            drawn.token_id,
            drawn.logprobs,
            finish,
        )
        if finish is not None:
            self._release(sequence)
            if not request.sequences:
                self._finish(request)

    def _preempt_youngest(self) -> None:
        """Send the least senior of the requests that hold room back to its gateway."""
        holders = (Phase.ARRIVING, Phase.RUNNING)
        youngest = max(
            (r for r in self._requests.values() if r.phase in holders),
            key=lambda request: request.seniority,
        )
        self._meters.decode.preemptions.inc()
        self._retry(youngest, "preempted", "the decode ran out of blocks", "preempted")

    # Ends

    def _finish(self, request: Request) -> None:
        """Every choice has ended."""
        self._end(request, "finished")
        self._outbox.put(request, ended=inference_pb2.Ended())
        self._pace.finished(self._clock())

    def _retry(
        self, request: Request, reason: str, detail: str, abort_reason: str = "cancelled"
    ) -> None:
        """The attempt ends without a fault of the request."""
        self._end(request, "retry", abort_reason)
        self._outbox.put(request, retry=inference_pb2.Retry(reason=reason, detail=detail))

    def _end(self, request: Request, outcome: str, abort_reason: str = "cancelled") -> None:
        """Free all that the request holds, and forget it. `abort_reason` is told to its prefill."""
        self._handoffs.withdraw(request, abort_reason)
        for sequence in list(request.sequences):
            self._release(sequence)
        request.phase = Phase.ENDED
        del self._requests[request.request_id]
        self._meters.engine.requests(outcome).inc()
        request_logger(logger, request.request_id).info(
            "request ended",
            extra={
                "outcome": outcome,
                "attempt": request.attempt,
                "prompt_tokens": len(request.prompt_token_ids),
                "output_tokens": request.num_drawn,
                "external_id": request.external_id,
            },
        )

    def _release(self, sequence: RunningSequence) -> None:
        sequence.request.sequences.remove(sequence)
        self._batch.release(sequence)

    # Signs of life

    def _beat(self) -> None:
        phases = [request.phase for request in self._requests.values()]
        num_running = phases.count(Phase.RUNNING)
        num_arriving = phases.count(Phase.ARRIVING)
        self._load = inference_pb2.Load(
            num_queued=len(self._queue),
            num_running=num_running + num_arriving,
            queued_tokens=self._queue.num_tokens,
            free_blocks=self.blocks.num_free,
            total_blocks=self.blocks.total,
            is_draining=self._is_draining,
            expected_wait_s=self._expected_wait(),
        )
        self._streams.beat(self._load)
        self._meters.phases(len(self._queue), num_arriving, num_running)
        self._meters.pools(self.blocks, self.slots)
        self._meters.transfers(self._receiver.stats(), self._receiver.counts())

    def _expected_wait(self) -> float:
        """Seconds until a request that comes now would get room."""
        if not len(self._queue) and all(self._rooms.num_free):
            return 0.0
        return (len(self._queue) + 1) * self._pace.seconds_per_request


class _Pace:
    """How often requests finish here: a running mean of the time between two ends."""

    def __init__(self) -> None:
        self.seconds_per_request = 0.0
        self._last: float | None = None

    def finished(self, now: float) -> None:
        if self._last is not None:
            self.seconds_per_request += 0.1 * (now - self._last - self.seconds_per_request)
        self._last = now
