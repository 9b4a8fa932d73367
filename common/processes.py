"""What parent and child processes owe each other: a child never outlives its supervisor."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process as soon as its parent is gone.

    A parent that has gone already cannot be waited for, so this process ends at once. Linux only;
    elsewhere nothing is arranged.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        sys.exit(f"the supervisor (process {parent_pid}) has gone")


def count_gpus() -> int:
    """GPUs that the kernel shows, NVIDIA's or AMD's; asks no driver and loads no library."""
    try:
        nvidia = [name for name in os.listdir("/dev") if name.removeprefix("nvidia").isdecimal()]
        if nvidia:
            return len(nvidia)
        nodes = "/sys/class/kfd/kfd/topology/nodes"
        return sum(_is_amd_gpu(f"{nodes}/{node}/properties") for node in os.listdir(nodes))
    except OSError:
        return 0


def _is_amd_gpu(properties: str) -> bool:
    # CPUs are nodes too, without SIMD units
    with open(properties, encoding="ascii") as file:
        return any(line.split() != ["simd_count", "0"] for line in file if "simd_count" in line)
