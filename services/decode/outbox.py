"""What one turn of the loop has to tell, gathered so that each gateway gets one message."""

from scission.common.event_stream import EventStreams
from scission.common.inference_messages import finish_to_proto, logprobs_to_proto
from scission.common.types import Finish, TokenLogprobs
from scission.protos import inference_pb2
from scission.services.decode.request import Request


class Outbox:
    """Events by gateway, in the order in which they happened. A request's tokens of one turn travel
    in one event.
    """

    def __init__(self, streams: EventStreams) -> None:
        self._streams = streams
        self._events: dict[int, list[inference_pb2.RequestEvent]] = {}
        self._tokens: dict[Request, inference_pb2.Tokens] = {}

    def put(self, request: Request, **event: object) -> None:
        """Add one event, given as the field of RequestEvent that it is."""
        message = inference_pb2.RequestEvent(
            request_id=request.request_id,
            attempt=request.attempt,
            **event,  # type: ignore[arg-type]
        )
        self._events.setdefault(request.gateway_epoch, []).append(message)

    def put_token(
        self,
        request: Request,
        choice: int,
        index: int,
        token_id: int,
        logprobs: TokenLogprobs | None,
        finish: Finish | None,
    ) -> None:
        tokens = self._tokens_of(request)
        token = tokens.tokens.add(choice=choice, index=index, token_id=token_id)
        if logprobs is not None:
            token.logprobs.CopyFrom(logprobs_to_proto(logprobs))
        if finish is not None:
            tokens.finished.append(finish_to_proto(finish))

    def flush(self) -> None:
        """Send everything: one message for each gateway that has any."""
        for gateway_epoch, events in self._events.items():
            self._streams.emit(gateway_epoch, events)
        self._events.clear()
        self._tokens.clear()

    def _tokens_of(self, request: Request) -> inference_pb2.Tokens:
        tokens = self._tokens.get(request)
        if tokens is None:
            message = inference_pb2.RequestEvent(
                request_id=request.request_id, attempt=request.attempt
            )
            tokens = self._tokens[request] = message.tokens
            self._events.setdefault(request.gateway_epoch, []).append(message)
        return tokens
