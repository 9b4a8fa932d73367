"""Stop strings in a growing text: cut at the first one completed, and never shown in part."""

from collections.abc import Sequence

from scission.services.gateway.held_back import held_back


class StopStrings:
    """Lets through what is certain to come before any stop string.

    Among several, the one that ends first in the text wins (of those, the longest): so the result
    does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, is_included: bool) -> None:
        """`is_included`: the stop string itself belongs to the output."""
        self._stops = tuple(stops)
        self._is_included = is_included
        self._pending = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may be shown now; nothing more once `matched` is set."""
        if self.matched is not None or not text:
            return ""
        if not self._stops:
            return text
        pending = self._pending + text
        first: tuple[int, int, str] | None = None  # end, start, stop
        for stop in self._stops:
            start = pending.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first[:2]):
                first = (start + len(stop), start, stop)
        if first is not None:
            end, start, self.matched = first
            self._pending = ""
            return pending[: end if self._is_included else start]
        kept = held_back(pending, self._stops)
        self._pending = pending[len(pending) - kept :]
        return pending[: len(pending) - kept]

    def flush(self) -> str:
        """What was held back, when the text has ended without a stop string."""
        pending, self._pending = self._pending, ""
        return pending
