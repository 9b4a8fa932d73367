"""Every Prometheus metric of every process: its name, help, labels and buckets, declared once.

A process makes one `Metrics`, builds its groups on it and passes them down. All metrics carry
`model_name` and `role`; `instance` is what Prometheus adds for each target it scrapes. No label
holds an id. Durations are seconds, sizes bytes.
"""

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from scission.common.types import FinishReason, Role

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
# Parts of a request: from a call on one host (0.1 ms) to a long queue.
PART_BUCKETS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0),
)
COUNT_BUCKETS = tuple(float(m * 10**e) for e in range(7) for m in (1, 2, 5))
BYTES_BUCKETS = tuple(float(4**e) for e in range(5, 19))  # 1 KiB to 64 GiB

TTFT_PARTS = (
    "gateway_prepare",  # from the HTTP request's first byte to the validated, tokenised request
    "gateway_queue",  # from there to the call to the prefill
    "call_out",  # from there to the call's arrival at the prefill
    "prefill_queue",  # from there to the schedule of its first chunk
    "compute",  # from there to the logits of its last chunk
    "sample",  # from there to the hand-out of the first token
    "token_back",  # from there to where the first token leaves the gateway
)
BLOCK_STATES = ("free", "active", "reserved", "retained", "quarantined", "cached")
ARENA_STATES = ("free", "granted", "filled", "quarantined")

M = TypeVar("M", Counter, Gauge, Histogram)


class Family(Generic[M]):
    """A metric with one label of its own; children are made once and kept."""

    def __init__(self, metric: M, shared: dict[str, str], label: str, known: Iterable[str]) -> None:
        self._metric: M = metric
        self._shared = shared
        self._label = label
        self._children: dict[str, M] = {}
        for value in known:
            self(value)

    def __call__(self, value: str) -> M:
        child = self._children.get(value)
        if child is None:
            child = self._metric.labels(**self._shared, **{self._label: value})
            self._children[value] = child
        return child


class Metrics:
    """One process's registry, with the labels that all its metrics share."""

    def __init__(self, role: Role, model_name: str, version: str) -> None:
        self.registry = CollectorRegistry()
        self.labels = {"model_name": model_name, "role": str(role)}
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.gauge_by("build_info", "Version of the running code; always 1.", "version")(
            version
        ).set(1)

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def counter(self, name: str, help: str) -> Counter:
        metric = Counter(f"scission_{name}", help, self.labels, registry=self.registry)
        return metric.labels(**self.labels)

    def gauge(self, name: str, help: str) -> Gauge:
        metric = Gauge(f"scission_{name}", help, self.labels, registry=self.registry)
        return metric.labels(**self.labels)

    def histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        metric = Histogram(
            f"scission_{name}", help, self.labels, buckets=buckets, registry=self.registry
        )
        return metric.labels(**self.labels)

    def counter_by(
        self, name: str, help: str, label: str, known: Iterable[str] = ()
    ) -> Family[Counter]:
        """A counter with one more label; `known` values show from the start, at zero."""
        metric = Counter(f"scission_{name}", help, (*self.labels, label), registry=self.registry)
        return Family(metric, self.labels, label, known)

    def gauge_by(
        self, name: str, help: str, label: str, known: Iterable[str] = ()
    ) -> Family[Gauge]:
        metric = Gauge(f"scission_{name}", help, (*self.labels, label), registry=self.registry)
        return Family(metric, self.labels, label, known)

    def histogram_by(
        self,
        name: str,
        help: str,
        label: str,
        buckets: Sequence[float],
        known: Iterable[str] = (),
    ) -> Family[Histogram]:
        metric = Histogram(
            f"scission_{name}",
            help,
            (*self.labels, label),
            buckets=buckets,
            registry=self.registry,
        )
        return Family(metric, self.labels, label, known)


class HttpMetrics:
    """The gateway's HTTP side, by path template."""

    def __init__(self, metrics: Metrics) -> None:
        registry, shared = metrics.registry, metrics.labels
        self._requests = Counter(
            "scission_http_requests_total",
            "HTTP requests answered.",
            (*shared, "method", "path", "status"),
            registry=registry,
        )
        self._duration = Histogram(
            "scission_http_request_duration_seconds",
            "From an HTTP request's first byte to its answer's last.",
            (*shared, "method", "path"),
            buckets=REQUEST_BUCKETS,
            registry=registry,
        )
        self._shared = shared

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        """`path` is the route's template, never the raw path."""
        self._requests.labels(**self._shared, method=method, path=path, status=f"{status}").inc()
        self._duration.labels(**self._shared, method=method, path=path).observe(seconds)


class RequestMetrics:
    """What a client sees of its request, observed where it leaves the gateway."""

    def __init__(self, metrics: Metrics) -> None:
        self.time_to_first_token = metrics.histogram(
            "time_to_first_token_seconds",
            "From the HTTP request's first byte to its first token leaving the gateway.",
            FIRST_TOKEN_BUCKETS,
        )
        self.inter_token_latency = metrics.histogram(
            "inter_token_latency_seconds",
            "Between two consecutive tokens of one choice.",
            TOKEN_BUCKETS,
        )
        self.time_per_output_token = metrics.histogram(
            "request_time_per_output_token_seconds",
            "(last token - first token) / (tokens - 1), once per choice of two tokens or more.",
            TOKEN_BUCKETS,
        )
        self.e2e_latency = metrics.histogram(
            "e2e_request_latency_seconds",
            "From the HTTP request's first byte to the end of its answer.",
            REQUEST_BUCKETS,
        )
        self.prompt_tokens = metrics.counter("prompt_tokens_total", "Prompt tokens taken in.")
        self.generation_tokens = metrics.counter("generation_tokens_total", "Tokens delivered.")
        self.cached_tokens = metrics.counter(
            "prompt_cached_tokens_total", "Prompt tokens that a prefix cache spared."
        )
        self.request_prompt_tokens = metrics.histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", COUNT_BUCKETS
        )
        self.request_generation_tokens = metrics.histogram(
            "request_generation_tokens", "Tokens delivered for a request.", COUNT_BUCKETS
        )
        self.success = metrics.counter_by(
            "request_success_total",
            "Choices that ended well, by reason.",
            "finished_reason",
            tuple(FinishReason),
        )
        self.errors = metrics.counter_by(
            "request_errors_total", "Requests that ended with an error, by its type.", "error_type"
        )
        self.ignored_fields = metrics.counter(
            "ignored_fields_total", "Unknown fields of request bodies that were ignored."
        )


class GatewayMetrics:
    """The gateway's cluster side: parts of TTFT, attempts, workers."""

    def __init__(self, metrics: Metrics) -> None:
        self.ttft_part = metrics.histogram_by(
            "time_to_first_token_part_seconds",
            "Directly timed parts that a request's time to first token consists of.",
            "part",
            PART_BUCKETS,
            TTFT_PARTS,
        )
        self.queue_time = metrics.histogram(
            "request_queue_time_seconds",
            "Time in queues until the prompt's first chunk is scheduled.",
            REQUEST_BUCKETS,
        )
        self.prefill_time = metrics.histogram(
            "request_prefill_time_seconds",
            "From the prompt's first chunk to its first token.",
            REQUEST_BUCKETS,
        )
        self.decode_time = metrics.histogram(
            "request_decode_time_seconds", "From the first token to the last.", REQUEST_BUCKETS
        )
        self.inference_time = metrics.histogram(
            "request_inference_time_seconds",
            "From the prompt's first chunk to the last token.",
            REQUEST_BUCKETS,
        )
        self.running = metrics.gauge(
            "num_requests_running", "Requests in flight that have their first token."
        )
        self.waiting = metrics.gauge(
            "num_requests_waiting", "Requests in flight that have no token yet."
        )
        self.prompt_tokens_in_flight = metrics.gauge(
            "prompt_tokens_in_flight", "Prompt tokens of the requests in flight."
        )
        self.rejected = metrics.counter_by(
            "requests_rejected_total",
            "Requests refused before any work was done for them, by reason.",
            "reason",
            ("admission", "no_workers", "no_capacity", "draining"),
        )
        self.new_attempts = metrics.counter_by(
            "request_new_attempts_total",
            "Further attempts of requests, by what ended the one before.",
            "reason",
        )
        self.redirects = metrics.counter(
            "request_redirects_total", "Attempts that reuse the state a prefill still holds."
        )
        self.cancels = metrics.counter_by(
            "request_cancels_total", "Cancels sent to workers, by reason.", "reason"
        )
        self.dropped_tokens = metrics.counter_by(
            "dropped_tokens_total",
            "Tokens from workers that were not delivered.",
            "reason",
            ("duplicate", "superseded"),
        )
        self.matched_prefix_tokens = metrics.counter(
            "router_matched_prefix_tokens_total",
            "Prompt tokens that the chosen prefill was known to have cached.",
        )
        self.workers = metrics.gauge_by(
            "workers",
            "Registered workers by role and state.",
            "worker",
            ("prefill_ready", "prefill_suspect", "decode_ready", "decode_suspect"),
        )
        self.worker_losses = metrics.counter_by(
            "worker_losses_total",
            "Times a worker was given up.",
            "reason",
            ("silent", "stream_broken", "expired", "gone", "deregistered", "replaced"),
        )


class EngineMetrics:
    """What prefill and decode engines have in common. Set by the engine thread."""

    def __init__(self, metrics: Metrics) -> None:
        self.running = metrics.gauge(
            "num_requests_running", "Requests in the running batch or computing."
        )
        self.waiting = metrics.gauge("num_requests_waiting", "Requests that wait for room.")
        self.blocks = metrics.gauge_by(
            "kv_blocks",
            "Cache blocks by state; the states sum to the total.",
            "state",
            BLOCK_STATES,
        )
        self.blocks_total = metrics.gauge("kv_blocks_capacity", "Cache blocks in all.")
        self.slots = metrics.gauge_by(
            "state_slots",
            "State slots by state; the states sum to the total.",
            "state",
            BLOCK_STATES,
        )
        self.cache_usage = metrics.gauge(
            "kv_cache_usage_ratio", "Share of cache blocks that running work holds (0 to 1)."
        )
        self.step_tokens = metrics.histogram(
            "iteration_tokens", "Tokens computed by one step.", COUNT_BUCKETS
        )
        self.step_time = metrics.histogram(
            "iteration_seconds", "Duration of one step of the engine.", PART_BUCKETS
        )
        self.computed_tokens = metrics.counter(
            "engine_computed_tokens_total", "Tokens that went through the model."
        )
        self.requests = metrics.counter_by(
            "engine_requests_total",
            "Attempts that ended here, by how.",
            "outcome",
            ("finished", "handed_over", "cancelled", "expired", "refused", "retry", "failed"),
        )
        self.start_up = metrics.gauge_by(
            "startup_seconds", "Duration of the phases of this process's start.", "phase"
        )

    def set_blocks(self, counts: dict[str, int]) -> None:
        """All states of the block pool, by name."""
        total = sum(counts.values())
        for state, count in counts.items():
            self.blocks(state).set(count)
        self.blocks_total.set(total)
        idle = counts.get("free", 0) + counts.get("cached", 0)
        self.cache_usage.set((total - idle) / total if total else 0.0)

    def set_slots(self, counts: dict[str, int]) -> None:
        """All states of the slot pool, by name."""
        for state, count in counts.items():
            self.slots(state).set(count)


class PrefillMetrics:
    def __init__(self, metrics: Metrics) -> None:
        self.queue_time = metrics.histogram(
            "prefill_queue_seconds", "From a request's arrival to its first chunk.", PART_BUCKETS
        )
        self.compute_time = metrics.histogram(
            "prefill_compute_seconds", "From a prompt's first chunk to its logits.", PART_BUCKETS
        )
        self.sample_time = metrics.histogram(
            "prefill_sample_seconds", "From the logits to the first token's hand-out.", PART_BUCKETS
        )
        self.prefix_queries = metrics.counter(
            "prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_hits = metrics.counter(
            "prefix_cache_hits_total", "Prompt tokens found in the prefix cache."
        )
        self.prefix_evictions = metrics.counter(
            "prefix_cache_evictions_total", "Blocks that the prefix cache gave up."
        )
        self.retained_requests = metrics.gauge(
            "retained_requests", "Requests whose computed state is kept under a lease."
        )
        self.expired_leases = metrics.counter(
            "retention_leases_expired_total",
            "Retained states that were freed by their lease's end.",
        )


class DecodeMetrics:
    def __init__(self, metrics: Metrics) -> None:
        self.admission_wait = metrics.histogram(
            "decode_admission_wait_seconds",
            "From a reservation's arrival to its grant.",
            PART_BUCKETS,
        )
        self.waiting_reservations = metrics.gauge(
            "decode_waiting_reservations", "Reservations that wait for room."
        )
        self.arriving_requests = metrics.gauge(
            "decode_arriving_requests", "Granted requests whose state is on its way."
        )
        self.preemptions = metrics.counter(
            "num_preemptions_total", "Running requests sent back for lack of blocks."
        )
        self.inject_time = metrics.histogram(
            "kv_inject_seconds",
            "Time spent checking and scattering one request's state.",
            PART_BUCKETS,
        )
        self.exposed_time = metrics.histogram(
            "kv_transfer_exposed_seconds",
            "From a request's first token to its state being complete at the decode.",
            PART_BUCKETS,
        )
        self.generated_tokens = metrics.counter(
            "decode_generated_tokens_total", "Tokens sampled by this decode."
        )


class TransferMetrics:
    """Either end of the hand-off; `tier` and reasons are few and fixed."""

    def __init__(self, metrics: Metrics) -> None:
        self.grant_wait = metrics.histogram(
            "kv_grant_wait_seconds", "From RESERVE to GRANT.", PART_BUCKETS
        )
        self.seconds = metrics.histogram(
            "kv_transfer_seconds", "From GRANT to COMMIT of one request.", PART_BUCKETS
        )
        self.request_bytes = metrics.histogram(
            "kv_transfer_request_bytes", "State shipped for one request.", BYTES_BUCKETS
        )
        self.bytes = metrics.counter_by(
            "kv_transfer_bytes_total", "State shipped or taken in, by tier.", "tier"
        )
        self.in_flight = metrics.gauge(
            "kv_transfers_in_flight", "Transfers between GRANT and COMMIT."
        )
        self.failures = metrics.counter_by(
            "kv_transfer_failures_total",
            "Transfers that ended without COMMIT, by reason.",
            "reason",
        )
        self.checksum_failures = metrics.counter(
            "kv_transfer_checksum_failures_total", "Chunks whose hash was wrong."
        )
        self.reships = metrics.counter(
            "kv_transfer_reships_total", "Chunks that were asked for a second time."
        )
        self.aborts = metrics.counter_by(
            "kv_transfer_aborts_total", "ABORT messages sent, by reason.", "reason"
        )
        self.dropped_messages = metrics.counter_by(
            "kv_transfer_dropped_messages_total",
            "Messages that were recognised and dropped, by reason.",
            "reason",
            ("duplicate", "late", "old_epoch", "malformed", "unknown_transfer"),
        )
        self.stalls = metrics.counter(
            "kv_transfer_stalls_total", "Times a transfer made no progress for the stall time."
        )
        self.arena = metrics.gauge_by(
            "kv_arena_slots",
            "Arena slots by state; the states sum to the total.",
            "state",
            ARENA_STATES,
        )
