"""What one turn of the loop has to tell, gathered so that each gateway gets one message."""

from scission.common.event_stream import EventStreams
from scission.protos import inference_pb2
from scission.services.prefill.request import Request


class Outbox:
    """Events by gateway, in the order in which they happened."""

    def __init__(self, streams: EventStreams) -> None:
        self._streams = streams
        self._events: dict[int, list[inference_pb2.RequestEvent]] = {}

    def put(self, request: Request, event: inference_pb2.RequestEvent) -> None:
        """Send it under the request's current attempt."""
        event.request_id = request.request_id
        event.attempt = request.attempt
        self._events.setdefault(request.gateway_epoch, []).append(event)

    def result(self, request: Request, event: inference_pb2.RequestEvent) -> None:
        """Send what a new attempt has to be told again (`repeat`)."""
        request.results.append(event)
        self.put(request, event)

    def repeat(self, request: Request) -> None:
        """Send all results again: the gateway may have dropped what came under the old attempt."""
        for event in request.results:
            again = inference_pb2.RequestEvent()
            again.CopyFrom(event)
            self.put(request, again)

    def flush(self) -> None:
        """Send everything: one message for each gateway that has any."""
        for gateway_epoch, events in self._events.items():
            self._streams.emit(gateway_epoch, events)
        self._events.clear()
