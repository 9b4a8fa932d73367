"""All workers as one engine: what the HTTP side of the gateway generates with (engine.py)."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable

from scission.common.config import AdmissionOptions, DiscoveryOptions, RoutingOptions
from scission.common.errors import UnavailableError
from scission.common.metrics import GatewayMetrics
from scission.common.types import Epoch, RequestId, Role
from scission.services.gateway.admission import Admission
from scission.services.gateway.attempts import RequestRun
from scission.services.gateway.engine import (
    EngineEvent,
    GenerationRequest,
    Readiness,
    ReadyState,
    TokenBatch,
)
from scission.services.gateway.registry import Registry
from scission.services.gateway.router import Router

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 0.1  # silent workers are found this late, at most


class Cluster:
    """Implements `Engine`; belongs to the event loop, on which `run` must run."""

    def __init__(
        self,
        epoch: Epoch,
        discovery: DiscoveryOptions,
        admission: AdmissionOptions,
        routing: RoutingOptions,
        metrics: GatewayMetrics,
        *,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = Registry(epoch, discovery, metrics, clock)
        self._epoch = epoch
        self._options = admission
        self._metrics = metrics
        self._clock = clock
        self._admission = Admission(admission, metrics)
        self._router = Router(self.registry, routing, metrics, rng or random.Random())
        self._runs: dict[RequestId, RequestRun] = {}
        self._num_running = 0
        self._is_draining = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[EngineEvent, None]:
        if self._is_draining:
            self._metrics.rejected("draining").inc()
            raise UnavailableError(
                "The server is shutting down. Please retry elsewhere.", retry_after_s=1.0
            )
        with self._admission.hold(len(request.prompt_token_ids)):
            run = RequestRun(
                request, self._epoch, self._router, self._options, self._metrics, self._clock
            )
            self._runs[request.request_id] = run
            has_token = False
            try:
                run.start()
                while (event := await run.next_event()) is not None:
                    if not has_token and isinstance(event, TokenBatch):
                        has_token = True
                        self._num_running += 1
                    yield event
            finally:
                self._num_running -= has_token
                del self._runs[request.request_id]
                run.close()

    async def stop_choice(self, request_id: RequestId, choice: int) -> None:
        run = self._runs.get(request_id)
        if run is not None:
            run.stop_choice(choice)

    def readiness(self) -> Readiness:
        workers = {str(r): len(self.registry.available(r)) for r in (Role.PREFILL, Role.DECODE)}
        if self._is_draining:
            return Readiness(ReadyState.DRAINING, "the server is shutting down", workers)
        reason = self.registry.explain()
        state = ReadyState.STARTING if reason else ReadyState.READY
        return Readiness(state, reason, workers)

    def load(self) -> dict[str, int | float]:
        decodes = self.registry.available(Role.DECODE)
        total = sum(w.link.load.total_blocks for w in decodes)
        free = sum(w.link.load.free_blocks for w in decodes)
        return {
            "num_requests_running": self._num_running,
            "num_requests_waiting": len(self._runs) - self._num_running,
            "prompt_tokens_in_flight": self._admission.num_prompt_tokens,
            "max_requests": self._options.max_inflight,
            "num_prefill_workers": len(self.registry.available(Role.PREFILL)),
            "num_decode_workers": len(decodes),
            "kv_cache_usage_ratio": (total - free) / total if total else 0.0,
        }

    def drain(self) -> None:
        """Admit nothing new; what runs goes on."""
        self._is_draining = True

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether all requests have ended within the time."""
        give_up_at = self._clock() + timeout_s
        while self._runs and self._clock() < give_up_at:
            await asyncio.sleep(0.02)
        return not self._runs

    async def run(self) -> None:
        """Watch the workers until cancelled."""
        checked_at = self._clock()
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            now = self._clock()
            if now - checked_at > 5 * CHECK_INTERVAL_S:
                # This loop was held up, and what the workers said meanwhile lies unread.
                logger.warning("the event loop was held up for %.2f s", now - checked_at)
                self.registry.forgive_silence()
            checked_at = now
            self.registry.check()
            self._metrics.running.set(self._num_running)
            self._metrics.waiting.set(len(self._runs) - self._num_running)
            self._metrics.prompt_tokens_in_flight.set(self._admission.num_prompt_tokens)

    async def close(self) -> None:
        """Leave all workers; requests still running end with an error."""
        await self.registry.close()
