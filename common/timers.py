"""When something is due, by whom: one time a key, the earliest first."""

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

# A heap of fewer entries is not worth clearing of those that were set anew or forgotten.
MIN_CLEARED = 256


class Timers(Generic[K]):
    """Times on the caller's clock, in seconds. A key that is forgotten is not held any longer."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._keys: dict[int, K] = {}  # by entry number: an entry without a key is void
        self._entries: dict[K, int] = {}
        self._numbers = itertools.count()

    def set(self, key: K, at: float) -> None:
        """The key is due at `at`, and at no other time."""
        self.discard(key)
        number = next(self._numbers)
        self._keys[number] = key
        self._entries[key] = number
        heapq.heappush(self._heap, (at, number))

    def discard(self, key: K) -> None:
        number = self._entries.pop(key, None)
        if number is None:
            return
        del self._keys[number]
        if len(self._heap) > max(MIN_CLEARED, 4 * len(self._keys)):
            self._heap = [entry for entry in self._heap if entry[1] in self._keys]
            heapq.heapify(self._heap)

    def take_due(self, now: float) -> list[K]:
        """The keys due by now, earliest first; they have no time any more."""
        due = []
        while self._heap and self._heap[0][0] <= now:
            _, number = heapq.heappop(self._heap)
            key = self._keys.pop(number, None)
            if key is not None:
                del self._entries[key]
                due.append(key)
        return due

    @property
    def next_at(self) -> float | None:
        """When the next key is due; None without keys."""
        while self._heap and self._heap[0][1] not in self._keys:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
