"""How much the gateway takes on at once; past it, callers are told at once to come back later."""

from collections.abc import Iterator
from contextlib import contextmanager

from scission.common.config import AdmissionOptions
from scission.common.errors import CapacityError
from scission.common.metrics import GatewayMetrics


class Admission:
    """Credit for requests and for their prompt tokens."""

    def __init__(self, options: AdmissionOptions, metrics: GatewayMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self.num_requests = 0
        self.num_prompt_tokens = 0

    @contextmanager
    def hold(self, num_prompt_tokens: int) -> Iterator[None]:
        """Credit for one request, given back at the end.

        A prompt larger than all credit is admitted when it is alone.

        Raises:
            CapacityError: there is none left.
        """
        if self.num_requests >= self._options.max_inflight:
            raise self._refuse(f"{self.num_requests} requests are in flight")
        if (
            self.num_requests
            and self.num_prompt_tokens + num_prompt_tokens > self._options.max_inflight_tokens
        ):
            raise self._refuse(f"{self.num_prompt_tokens} prompt tokens are in flight")
        self.num_requests += 1
        self.num_prompt_tokens += num_prompt_tokens
        try:
            yield
        finally:
            self.num_requests -= 1
            self.num_prompt_tokens -= num_prompt_tokens

    def _refuse(self, why: str) -> CapacityError:
        self._metrics.rejected("admission").inc()
        return CapacityError(
            f"The server is at capacity ({why}). Please retry later.",
            retry_after_s=self._options.retry_after_s,
        )
