"""What one turn of the loop has to tell, gathered so that each gateway gets one message."""

from scission.common.event_stream import EventStreams
from scission.protos import inference_pb2
from scission.services.prefill.request import Request


class Outbox:
    """Events by gateway, in the order in which they happened."""

    def __init__(self, streams: EventStreams) -> None:
        self._streams = streams
        self._events: dict[int, list[inference_pb2.RequestEvent]] = {}

    def result(self, request: Request, **result: object) -> None:
        """Tell what was computed, given as the field of RequestEvent that it is."""
        request.results.append(self._put(request, result))

    def repeat(self, request: Request) -> None:
        """Tell all results again: the gateway may have dropped what came for the old attempt."""
        for event in request.results:
            kind = event.WhichOneof("event")
            assert kind is not None
            self._put(request, {kind: getattr(event, kind)})

    def end(self, request: Request, **end: object) -> None:
        """Tell how the attempt ended, unless that was told before."""
        if not request.is_ended:
            request.is_ended = True
            self._put(request, end)

    def flush(self) -> None:
        """Send everything: one message for each gateway that has any."""
        for gateway_epoch, events in self._events.items():
            self._streams.emit(gateway_epoch, events)
        self._events.clear()

    def _put(self, request: Request, event: dict[str, object]) -> inference_pb2.RequestEvent:
        message = inference_pb2.RequestEvent(
            request_id=request.request_id,
            attempt=request.attempt,
            **event,  # type: ignore[arg-type]
        )
        self._events.setdefault(request.gateway_epoch, []).append(message)
        return message
