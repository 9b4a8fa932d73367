"""Signs of life of an engine that computes on a CPU.

The engine's loop gives a sign between two steps and between the layers of a prompt's. On a GPU that
is often enough; on a few CPU cores one layer of a long prompt may take longer than the silence
after which a worker counts as dead. So a thread of its own watches the engine's: while that one
uses up processor time it computes, and says so. An engine that hangs uses none, a stopped process
has no thread that could speak for it.
"""

import threading
import time
from collections.abc import Callable

from scission.common.event_stream import EventStreams

# An engine that has not come round for so long is not believed, however busy it is.
MAX_STEP_S = 60.0


class Pulse:
    """Watches the thread that makes it."""

    def __init__(
        self,
        streams: EventStreams,
        beat_s: float,
        *,
        max_step_s: float = MAX_STEP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`beat_s`: how often the engine's loop gives a sign by itself; `clock` is the streams'."""
        self._streams = streams
        self._beat_s = beat_s
        self._max_step_s = max_step_s
        self._clock = clock
        self._engine = threading.current_thread()
        self._cpu_clock = time.pthread_getcpuclockid(threading.get_ident())
        self._cpu_s = time.clock_gettime(self._cpu_clock)

    def start(self) -> None:
        """Watch until the engine's thread ends."""
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def look(self, cpu_s: float) -> None:
        """Speak for the engine if it is due and has computed since the last look.

        Args:
            cpu_s: processor time that its thread has used, ever.
        """
        has_computed = cpu_s > self._cpu_s
        self._cpu_s = cpu_s
        silent_s = self._clock() - self._streams.beat_at
        if has_computed and self._beat_s <= silent_s <= self._max_step_s:
            self._streams.pulse()

    def _run(self) -> None:
        while True:
            self._engine.join(self._beat_s)
            if not self._engine.is_alive():
                return
            try:
                cpu_s = time.clock_gettime(self._cpu_clock)
            except OSError:  # it has ended just now
                return
            self.look(cpu_s)
