"""Attempts that are over, remembered for a while: a Cancel may overtake the Submit that it ends."""

from collections import OrderedDict

MAX_REMEMBERED = 4096
REMEMBERED_S = 60.0


class EndedAttempts:
    """Per request the highest attempt that has ended. Times are the caller's clock, in seconds."""

    def __init__(self, max_remembered: int = MAX_REMEMBERED, for_s: float = REMEMBERED_S) -> None:
        self._max_remembered = max_remembered
        self._for_s = for_s
        self._attempts: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def add(self, request_id: str, attempt: int, now: float) -> None:
        known, _ = self._attempts.pop(request_id, (attempt, now))
        self._attempts[request_id] = max(known, attempt), now
        if len(self._attempts) > self._max_remembered:
            self._attempts.popitem(last=False)

    def covers(self, request_id: str, attempt: int, now: float) -> bool:
        """This attempt or a higher one has ended."""
        known = self._attempts.get(request_id)
        return known is not None and attempt <= known[0] and now - known[1] < self._for_s
