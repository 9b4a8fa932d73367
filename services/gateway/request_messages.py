"""The messages by which one request's attempts are submitted to its workers."""

from collections.abc import Callable, Sequence

from scission.common.inference_messages import forced_to_proto, sampling_to_proto
from scission.protos import inference_pb2
from scission.services.gateway.engine import GenerationRequest

Forced = Sequence[Sequence[int]]  # per choice the token ids delivered so far


class RequestMessages:
    """Makes the messages; times in them count from `clock`'s now."""

    def __init__(
        self, request: GenerationRequest, gateway_epoch: int, clock: Callable[[], float]
    ) -> None:
        self._request = request
        self._gateway_epoch = gateway_epoch
        self._clock = clock
        self._sampling = sampling_to_proto(request.sampling)

    def prefill(
        self, attempt: int, forced: Forced, destination: inference_pb2.Destination | None
    ) -> inference_pb2.PrefillRequest:
        request = self._request
        return inference_pb2.PrefillRequest(
            gateway_epoch=self._gateway_epoch,
            request_id=request.request_id,
            attempt=attempt,
            remaining_ms=self._remaining_ms(),
            prompt_token_ids=request.prompt_token_ids,
            sampling=self._sampling,
            num_choices=request.n,
            forced=forced_to_proto(forced),
            destination=destination,
            cache_salt=request.cache_salt,
            waited_s=self._waited_s(),
            priority=request.priority,
            external_id=request.external_id,
        )

    def decode(self, attempt: int, forced: Forced) -> inference_pb2.DecodeRequest:
        request = self._request
        return inference_pb2.DecodeRequest(
            gateway_epoch=self._gateway_epoch,
            request_id=request.request_id,
            attempt=attempt,
            remaining_ms=self._remaining_ms(),
            prompt_token_ids=request.prompt_token_ids,
            sampling=self._sampling,
            num_choices=request.n,
            forced=forced_to_proto(forced),
            waited_s=self._waited_s(),
            priority=request.priority,
            external_id=request.external_id,
        )

    def redirect(
        self, attempt: int, destination: inference_pb2.Destination
    ) -> inference_pb2.RedirectRequest:
        return inference_pb2.RedirectRequest(
            gateway_epoch=self._gateway_epoch,
            request_id=self._request.request_id,
            attempt=attempt,
            remaining_ms=self._remaining_ms(),
            destination=destination,
        )

    def _remaining_ms(self) -> int:
        return max(1, int((self._request.deadline - self._clock()) * 1000))

    def _waited_s(self) -> float:
        return self._clock() - self._request.arrival
