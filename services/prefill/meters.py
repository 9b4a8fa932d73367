"""What the engine measures of itself, as metrics."""

from collections.abc import Mapping

from scission.common.cache.block_pool import State
from scission.common.metrics import EngineMetrics, Metrics, PrefillMetrics, TransferMetrics
from scission.common.transfer.events import Committed, known_reason
from scission.protos import inference_pb2
from scission.services.prefill.request import Request
from scission.services.prefill.state import StateStore


class PrefillMeters:
    """The metric groups of a prefill worker; set by the engine thread."""

    def __init__(self, metrics: Metrics) -> None:
        self.engine = EngineMetrics(metrics)
        self.prefill = PrefillMetrics(metrics)
        self.transfer = TransferMetrics(metrics)
        self._num_evicted = 0
        self._totals: Mapping[str, int] = {}

    def began(self, request: Request) -> None:
        """A request's first chunk was scheduled."""
        self.prefill.queue_time.observe(request.queue_s)
        if not request.wants_prompt_logprobs:
            self.prefill.prefix_queries.inc(request.num_tokens)
            self.prefill.prefix_hits.inc(request.num_cached)

    def prefilled(self, parts: inference_pb2.Prefilled) -> None:
        """A prompt is computed and its first tokens are drawn."""
        self.prefill.compute_time.observe(parts.compute_s)
        self.prefill.sample_time.observe(parts.sample_s)

    def committed(self, event: Committed) -> None:
        """A decode has taken a state."""
        self.transfer.seconds.observe(event.seconds)
        self.transfer.request_bytes.observe(event.num_bytes)
        self.transfer.bytes(event.tier or "unknown").inc(event.num_bytes)

    def lost(self, reason: str) -> None:
        """A transfer ended without this prefill's doing."""
        self.transfer.failures(known_reason(reason)).inc()

    def aborted(self, reason: str) -> None:
        """This prefill ended a transfer."""
        self.transfer.aborts(known_reason(reason)).inc()

    def step(self, num_tokens: int, seconds: float) -> None:
        self.engine.step_tokens.observe(num_tokens)
        self.engine.step_time.observe(seconds)
        self.engine.computed_tokens.inc(num_tokens)

    def transfers(self, num_in_flight: int, totals: Mapping[str, int]) -> None:
        """Transfers between grant and commit, and the sender's running totals."""

        def added(name: str) -> int:
            return totals.get(name, 0) - self._totals.get(name, 0)

        self.transfer.in_flight.set(num_in_flight)
        self.transfer.reships.inc(added("reships"))
        self.transfer.stalls.inc(added("stalls"))
        self.transfer.dropped_messages("malformed").inc(added("dropped_messages"))
        self._totals = totals

    def beat(self, store: StateStore, load: inference_pb2.Load, num_retained: int) -> None:
        """What changes with every turn, as it is at the beat."""
        self.engine.waiting.set(load.num_queued)
        self.engine.running.set(load.num_running)
        self.engine.set_blocks(_by_name(store.blocks.counts()))
        self.engine.set_slots(_by_name(store.slots.counts()))
        self.prefill.retained_requests.set(num_retained)
        self.prefill.prefix_evictions.inc(store.prefixes.num_evicted - self._num_evicted)
        self._num_evicted = store.prefixes.num_evicted


def _by_name(counts: dict[State, int]) -> dict[str, int]:
    return {state.name.lower(): count for state, count in counts.items()}
