"""How far the capture of a worker's graphs is: a bar on a terminal, a log line elsewhere."""

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

from scission.common.stepping.captured import CapturedSteps

logger = logging.getLogger(__name__)


def capture_graphs(steps: CapturedSteps[Any]) -> float:
    """Capture all graphs and tell how it goes; the seconds that it took."""
    started_s = time.monotonic()
    bar = None
    if sys.stderr.isatty():
        bar = tqdm(desc="capturing graphs", unit="size", file=sys.stderr)
    else:
        logger.info("capturing graphs")

    def show(num_done: int, num_graphs: int) -> None:
        if bar is not None:
            bar.total = num_graphs
            bar.update(num_done - bar.n)

    steps.capture(show)
    if bar is not None:
        bar.close()
    seconds = time.monotonic() - started_s
    logger.info("captured graphs in %.1f s", seconds)
    return seconds
