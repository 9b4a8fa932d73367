"""What two bare processes reach on one core each: one copies into shared memory and hashes, the
other copies out and hashes again. With one copy thread at each end a transfer comes near this.
"""

import mmap
import multiprocessing
import os
import statistics
import time

import numpy as np
import xxhash
from numpy.typing import NDArray

from scission.common.cache.storage import PART_BYTES, Bytes

NUM_SLOTS = 8
POOL_BYTES = 256 << 20
COUNTER_BYTES = 4096
TIMEOUT_S = 60.0


def pair_rate(slot_bytes: int, repeats: int) -> float:
    """Bytes per second from one process's pool into another's; the median of some tries."""
    memory = mmap.mmap(-1, COUNTER_BYTES + NUM_SLOTS * slot_bytes)
    context = multiprocessing.get_context("fork")
    receiver = context.Process(target=_drain, args=(memory, slot_bytes, repeats + 1), daemon=True)
    receiver.start()
    counters, slots = _views(memory, slot_bytes)
    pool = np.ones(POOL_BYTES, np.uint8)
    num_chunks = POOL_BYTES // slot_bytes
    seconds = []
    try:
        for lap in range(repeats + 1):
            started = time.perf_counter()
            for chunk in range(lap * num_chunks, (lap + 1) * num_chunks):
                _await(counters, 1, chunk - NUM_SLOTS + 1)
                at = chunk % num_chunks * slot_bytes
                _copy(pool[at : at + slot_bytes], slots[chunk % NUM_SLOTS])
                counters[0] = chunk + 1
            _await(counters, 1, (lap + 1) * num_chunks)
            seconds.append(time.perf_counter() - started)
    finally:
        receiver.terminate()
        receiver.join()
    # the first lap touches the memory
    return num_chunks * slot_bytes / statistics.median(seconds[1:])


def _drain(memory: mmap.mmap, slot_bytes: int, laps: int) -> None:
    counters, slots = _views(memory, slot_bytes)
    pool = np.zeros(POOL_BYTES, np.uint8)
    num_chunks = POOL_BYTES // slot_bytes
    for chunk in range(laps * num_chunks):
        _await(counters, 0, chunk + 1)
        at = chunk % num_chunks * slot_bytes
        _copy(slots[chunk % NUM_SLOTS], pool[at : at + slot_bytes])
        counters[1] = chunk + 1


def _views(memory: mmap.mmap, slot_bytes: int) -> tuple[NDArray[np.int64], Bytes]:
    counters = np.frombuffer(memory, np.int64, 2)
    slots = np.frombuffer(memory, np.uint8, offset=COUNTER_BYTES).reshape(NUM_SLOTS, slot_bytes)
    return counters, slots


def _await(counters: NDArray[np.int64], which: int, value: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while counters[which] < value:
        os.sched_yield()
        if time.monotonic() > deadline:
            raise TimeoutError("the other process of the pair stands still")


def _copy(source: Bytes, target: Bytes) -> None:
    hasher = xxhash.xxh3_64()
    for at in range(0, len(source), PART_BYTES):
        np.copyto(target[at : at + PART_BYTES], source[at : at + PART_BYTES])
        hasher.update(target[at : at + PART_BYTES].data)
    hasher.digest()
