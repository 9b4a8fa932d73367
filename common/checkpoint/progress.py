"""How far a load is: a bar on a terminal, a log line per tenth elsewhere."""

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

# a smaller load is over before its tenths could be read: it says when it is done
WATCHED_BYTES = 1 << 30


class LoadProgress:
    """Counts the checkpoint's bytes as they are taken; reports bytes per second."""

    def __init__(self, total_bytes: int, label: str) -> None:
        self._total_bytes = total_bytes
        self._label = label
        self._taken_bytes = 0
        self._copied_bytes = 0
        self._started_s = time.monotonic()
        self._tenths = 0
        self._bar = (
            tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def add(self, taken_bytes: int, copied_bytes: int) -> None:
        """A tensor of `taken_bytes` on disk is done; this rank copied `copied_bytes` of it."""
        self._taken_bytes += taken_bytes
        self._copied_bytes += copied_bytes
        if self._bar is not None:
            self._bar.update(taken_bytes)
            return
        if self._total_bytes < WATCHED_BYTES:
            return
        tenths = 10 * self._taken_bytes // self._total_bytes
        if self._tenths < tenths < 10:
            self._tenths = tenths
            logger.info("%s: %d %%, %s", self._label, 10 * tenths, self._rate())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        seconds = time.monotonic() - self._started_s
        logger.info("%s: done in %.1f s, %s", self._label, seconds, self._rate())

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started_s, 1e-9)
        return f"{self._copied_bytes / 1e9:.2f} GB at {self._copied_bytes / 1e9 / seconds:.2f} GB/s"
