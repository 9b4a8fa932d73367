import asyncio
import threading

from scission.common.event_stream import EventStream, EventStreams
from scission.protos import inference_pb2

GATEWAY = 7


def events(*request_ids: str) -> list[inference_pb2.RequestEvent]:
    return [inference_pb2.RequestEvent(request_id=request_id) for request_id in request_ids]


async def read(stream: EventStream, count: int) -> list[list[str]]:
    steps: list[list[str]] = []
    async for step in stream:
        steps.append([event.request_id for event in step.events])
        if len(steps) == count:
            break
    return steps


async def test_steps_emitted_by_another_thread_arrive_in_order() -> None:
    streams = EventStreams()
    stream = streams.attach(GATEWAY)

    def engine() -> None:
        for i in range(200):
            streams.emit(GATEWAY, events(f"{i}", "other"))

    thread = threading.Thread(target=engine)
    thread.start()
    steps = await asyncio.wait_for(read(stream, 200), 30)
    thread.join()
    assert steps == [[f"{i}", "other"] for i in range(200)]


async def test_a_beat_reaches_every_gateway_with_the_load() -> None:
    streams = EventStreams()
    attached = [streams.attach(1), streams.attach(2)]
    streams.beat(inference_pb2.Load(num_running=3))
    for stream in attached:
        step = await anext(aiter(stream))
        assert step.load.num_running == 3 and not step.events


async def test_events_of_a_gateway_that_has_gone_are_dropped() -> None:
    streams = EventStreams()
    stream = streams.attach(GATEWAY)
    assert streams.detach(stream)
    streams.emit(GATEWAY, events("a"))
    assert await asyncio.wait_for(read(stream, 1), 30) == []
    assert not streams.is_attached(GATEWAY)


async def test_a_gateway_that_does_not_read_loses_its_stream() -> None:
    streams = EventStreams(max_pending=3)
    stream = streams.attach(GATEWAY)
    for _ in range(4):
        streams.emit(GATEWAY, events("a"))
    assert await asyncio.wait_for(read(stream, 1), 30) == []
    assert stream.is_overflown


async def test_a_message_unread_for_too_long_ends_the_stream() -> None:
    now = 100.0
    streams = EventStreams(max_unread_s=10.0, clock=lambda: now)
    stream = streams.attach(GATEWAY)
    streams.emit(GATEWAY, events("a"))
    now = 111.0
    streams.beat(inference_pb2.Load())
    assert stream.is_overflown


async def test_attaching_anew_ends_the_first_stream_only() -> None:
    streams = EventStreams()
    first = streams.attach(GATEWAY)
    second = streams.attach(GATEWAY)
    assert not streams.detach(first)
    streams.emit(GATEWAY, events("a"))
    assert await asyncio.wait_for(read(first, 1), 30) == []
    assert await asyncio.wait_for(read(second, 1), 30) == [["a"]]
