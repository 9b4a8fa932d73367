"""Threads that copy and hash chunks: numpy and xxhash let go of the interpreter meanwhile."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class Copiers:
    """The calling thread and its helpers; a helper that finds no free core delays nobody."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_helpers = num_threads - 1
        self._executor = ThreadPoolExecutor(max(1, self._num_helpers), f"{name}-copy")

    def run(self, work: Callable[[], None], num_jobs: int) -> None:
        """Run `work`, which takes jobs until none is left, on as many threads as there are jobs.

        Returns once no thread is at work any more; raises what `work` raised.
        """
        num_helpers = max(0, min(self._num_helpers, num_jobs - 1))
        helpers = [self._executor.submit(work) for _ in range(num_helpers)]
        try:
            work()
        finally:
            for helper in helpers:
                # one that has not begun by now is not needed
                if not helper.cancel():
                    helper.result()

    def close(self) -> None:
        self._executor.shutdown()
