"""What the engine measures of itself, as metrics."""

from collections.abc import Mapping

from scission.common.cache.block_pool import BlockPool
from scission.common.metrics import DecodeMetrics, EngineMetrics, Metrics, TransferMetrics
from scission.common.transfer.events import Ready, known_reason

# The receiver's running totals of messages that it dropped, by the reason they are shown under.
_DROPPED = {
    "dropped_duplicate": "duplicate",
    "dropped_late": "late",
    "dropped_old_epoch": "old_epoch",
    "dropped_invalid": "malformed",
    "dropped_unknown": "unknown_transfer",
}


class DecodeMeters:
    """The metric groups of a decode worker; set by the engine thread."""

    def __init__(self, metrics: Metrics) -> None:
        self.engine = EngineMetrics(metrics)
        self.decode = DecodeMetrics(metrics)
        self.transfer = TransferMetrics(metrics)
        self._totals: Mapping[str, int] = {}

    def arrived(self, ready: Ready) -> None:
        """A request's state is complete."""
        self.decode.inject_time.observe(ready.inject_s)
        self.decode.exposed_time.observe(ready.exposed_s)
        self.transfer.seconds.observe(ready.seconds)
        self.transfer.request_bytes.observe(ready.num_bytes)
        self.transfer.bytes(ready.tier or "unknown").inc(ready.num_bytes)

    def lost(self, reason: str) -> None:
        """A transfer ended without this decode's doing."""
        self.transfer.failures(known_reason(reason)).inc()

    def aborted(self, reason: str) -> None:
        """This decode ended a transfer."""
        self.transfer.aborts(known_reason(reason)).inc()

    def step(self, num_tokens: int, num_drawn: int, seconds: float) -> None:
        """A step of `num_tokens`, 0 where only the tokens of the one before it came."""
        if num_tokens:
            self.engine.step_tokens.observe(num_tokens)
            self.engine.step_time.observe(seconds)
            self.engine.computed_tokens.inc(num_tokens)
        self.decode.generated_tokens.inc(num_drawn)

    def pools(self, blocks: BlockPool, slots: BlockPool) -> None:
        self.engine.set_blocks(_by_name(blocks))
        self.engine.set_slots(_by_name(slots))

    def phases(self, num_waiting: int, num_arriving: int, num_running: int) -> None:
        self.engine.running.set(num_running)
        self.engine.waiting.set(num_waiting)
        self.decode.waiting_reservations.set(num_waiting)
        self.decode.arriving_requests.set(num_arriving)
        self.transfer.in_flight.set(num_arriving)

    def transfers(self, totals: Mapping[str, int], arena_slots: Mapping[str, int]) -> None:
        """The receiver's running totals and its arena's slots by state."""

        def added(name: str) -> int:
            return totals.get(name, 0) - self._totals.get(name, 0)

        self.transfer.checksum_failures.inc(added("damaged"))
        self.transfer.reships.inc(added("reships"))
        for name, reason in _DROPPED.items():
            self.transfer.dropped_messages(reason).inc(added(name))
        for state, count in arena_slots.items():
            if state != "total":
                self.transfer.arena(state).set(count)
        self._totals = totals


def _by_name(pool: BlockPool) -> dict[str, int]:
    return {state.name.lower(): count for state, count in pool.counts().items()}
