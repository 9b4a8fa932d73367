"""What the tests of all kernels measure with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| over the whole tensors; NaN stays NaN.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    difference = actual.double() - expected.double()
    return float(difference.norm() / expected.double().norm().clamp_min(1e-300))


@contextmanager
def poisoned_empties() -> Iterator[None]:
    """torch.empty holds NaN (integers: the largest), so that an output left unwritten shows."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    was_filling = settings.fill_uninitialized_memory
    # torch fills memory only in this mode; without warn_only it would forbid operations, too
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warning)
        settings.fill_uninitialized_memory = was_filling
