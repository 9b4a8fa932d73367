import threading

import pytest

from scission.common.event_stream import EventStreams
from scission.common.pulse import MAX_STEP_S, Pulse
from scission.protos import inference_pb2

BEAT_S = 0.5


class NotedStreams(EventStreams):
    """Notes the signs of life that were given for the engine."""

    def __init__(self) -> None:
        self.now = 100.0
        super().__init__(clock=lambda: self.now)
        self.num_pulses = 0
        self.has_pulsed = threading.Event()

    def pulse(self) -> None:
        super().pulse()
        self.num_pulses += 1
        self.has_pulsed.set()


@pytest.fixture
def streams() -> NotedStreams:
    return NotedStreams()


def make(streams: NotedStreams) -> Pulse:
    pulse = Pulse(streams, BEAT_S, clock=lambda: streams.now)
    pulse.look(1000.0)  # more than this thread has used
    streams.num_pulses = 0
    return pulse


def test_a_step_that_computes_for_long_is_a_sign_of_life(streams: NotedStreams) -> None:
    pulse = make(streams)
    for second in range(1, 10):
        streams.now += 1
        pulse.look(1000.0 + second)
        assert streams.num_pulses == second


def test_an_engine_that_hangs_gives_no_sign(streams: NotedStreams) -> None:
    pulse = make(streams)
    for _ in range(10):
        streams.now += 1
        pulse.look(1000.0)
    assert streams.num_pulses == 0


def test_an_engine_that_spins_without_coming_round_is_not_believed_for_ever(
    streams: NotedStreams,
) -> None:
    pulse = make(streams)
    for second in range(1, 200):
        streams.now += 1
        pulse.look(1000.0 + second)
    assert streams.num_pulses == MAX_STEP_S


def test_a_loop_that_beats_needs_no_pulse(streams: NotedStreams) -> None:
    pulse = make(streams)
    for step in range(1, 20):
        streams.now += BEAT_S / 2
        streams.beat(inference_pb2.Load())
        streams.now += BEAT_S / 2
        pulse.look(1000.0 + step)
    assert streams.num_pulses == 0


@pytest.mark.parametrize("computes", [True, False])
def test_the_engines_own_thread_is_watched_until_it_ends(computes: bool) -> None:
    streams = NotedStreams()
    may_end = threading.Event()

    def engine() -> None:
        Pulse(streams, 0.01, clock=lambda: streams.now).start()
        streams.now += 1.0
        if computes:
            while not streams.has_pulsed.is_set():
                sum(range(1000))
        may_end.wait(30)

    thread = threading.Thread(target=engine)
    thread.start()
    if computes:
        assert streams.has_pulsed.wait(30)
    watchers = [t for t in threading.enumerate() if t.name == "pulse"]
    may_end.set()
    thread.join(30)
    for watcher in watchers:
        watcher.join(30)
        assert not watcher.is_alive()
