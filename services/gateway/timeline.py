"""When one request passed where, and the parts of its time to first token that follow from it.

Every part is the difference of two readings at its own ends. Readings of the prefill's clock are
brought to ours by the link's estimate of the offset; its error moves time between `call_out` and
`token_back` and leaves the sum as it is.
"""

from dataclasses import dataclass

from scission.common.metrics import GatewayMetrics
from scission.protos import inference_pb2


@dataclass(slots=True)
class Timeline:
    """Seconds on our monotonic clock, but where it says the prefill's."""

    arrived_at: float  # the HTTP request's first byte
    generate_at: float  # validated and tokenised
    attempt: int = -1  # the last that began with a prefill before the first token left
    called_at: float = 0.0  # its prefill was called
    clock_offset_s: float = 0.0  # the prefill's clock minus ours
    received_at: float | None = None  # the prefill's clock: the call came in
    prefilled: inference_pb2.Prefilled | None = None
    token_sent_at: float | None = None  # the prefill's clock: the first token was handed out
    first_token_at: float | None = None  # left for the client
    last_token_at: float | None = None
    is_observed: bool = False

    def begin_prefill(self, attempt: int, now: float) -> None:
        """A (new) prefill is about to be called; nothing it says is known yet."""
        if self.first_token_at is None:
            self.attempt = attempt
            self.called_at = now
            self.received_at = self.prefilled = self.token_sent_at = None

    def parts(self) -> dict[str, float] | None:
        """The parts of the time to first token by name, or None while one is not known."""
        if (
            self.received_at is None
            or self.prefilled is None
            or self.token_sent_at is None
            or self.first_token_at is None
        ):
            return None
        return {
            "gateway_prepare": self.generate_at - self.arrived_at,
            "gateway_queue": self.called_at - self.generate_at,
            "call_out": self.received_at - self.clock_offset_s - self.called_at,
            "prefill_queue": self.prefilled.queue_s,
            "compute": self.prefilled.compute_s,
            "sample": self.prefilled.sample_s,
            "token_back": self.first_token_at - (self.token_sent_at - self.clock_offset_s),
        }

    def observe_parts(self, metrics: GatewayMetrics) -> None:
        """Once, as soon as all parts are known."""
        parts = None if self.is_observed else self.parts()
        if parts is None:
            return
        self.is_observed = True
        for name, seconds in parts.items():
            # An estimated offset may make a part of microseconds negative.
            metrics.ttft_part(name).observe(max(0.0, seconds))

    def observe_request(self, metrics: GatewayMetrics) -> None:
        """At the request's end."""
        parts = self.parts()
        if parts is None or self.first_token_at is None or self.last_token_at is None:
            return
        prefill_s = parts["compute"] + parts["sample"]
        decode_s = self.last_token_at - self.first_token_at
        metrics.queue_time.observe(parts["gateway_queue"] + parts["prefill_queue"])
        metrics.prefill_time.observe(prefill_s)
        metrics.decode_time.observe(decode_s)
        metrics.inference_time.observe(prefill_s + decode_s)
