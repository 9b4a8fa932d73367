"""Jobs on several threads: each done once, faults told, no helper waited for in vain."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable

import pytest

from scission.common.transfer.copiers import Copiers


def worker(jobs: deque[int], done: list[int]) -> Callable[[], None]:
    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                done.append(jobs.popleft())

    return work


@pytest.mark.parametrize("num_threads", (1, 2, 4))
@pytest.mark.parametrize("num_jobs", (0, 1, 2, 100))
def test_every_job_is_done_once(num_threads: int, num_jobs: int) -> None:
    copiers = Copiers(num_threads, "test")
    done: list[int] = []
    copiers.run(worker(deque(range(num_jobs)), done), num_jobs)
    assert sorted(done) == list(range(num_jobs))
    copiers.close()


def test_fault_of_any_thread_is_raised_once_all_have_stopped() -> None:
    copiers = Copiers(2, "test")
    both = threading.Barrier(2, timeout=10)
    stopped: list[str] = []

    def work() -> None:
        both.wait()
        stopped.append(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("a helper's fault")

    with pytest.raises(ValueError, match="a helper's fault"):
        copiers.run(work, 2)
    assert len(stopped) == 2
    copiers.close()


def test_helper_without_a_core_delays_nobody() -> None:
    copiers = Copiers(2, "test")
    is_free = threading.Event()
    # the only helper is taken
    taken = threading.Thread(target=copiers.run, args=(is_free.wait, 2))
    taken.start()
    done: list[int] = []
    copiers.run(worker(deque(range(8)), done), 8)
    assert sorted(done) == list(range(8))
    is_free.set()
    taken.join()
    copiers.close()
