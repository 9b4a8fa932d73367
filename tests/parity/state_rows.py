"""A request's rows of state in tests: poisoned, copied as a hand-over does, compared."""

import torch
from torch import Tensor

from scission.common.cache.storage import CacheStorage
from tests.one_process import OneProcess, OneSequence

# fp32 sums in another order; measured 4e-5
TOLERANCE = 2e-4


def poison(storage: CacheStorage) -> None:
    for tensor in (*storage.paged.values(), *storage.slots.values()):
        tensor.fill_(float("nan"))


def everything(storage: CacheStorage) -> list[Tensor]:
    """All state but scratch."""
    return [t[:, 1:].clone() for t in (*storage.paged.values(), *storage.slots.values())]


def hand_over(
    prefill: OneProcess, source: OneSequence, decode: OneProcess, target: OneSequence
) -> None:
    """Copy the live rows, and nothing else, as the transfer does."""
    num_tokens = len(source.token_ids)
    for component in prefill.loaded.layout.components:
        rows = component.shipped_rows(num_tokens)
        layers = (0, len(component.layers))
        data = torch.empty(layers[1], rows[1] - rows[0], component.row_bytes, dtype=torch.uint8)
        there = prefill.storage.row_index(component, rows, source.block_ids, source.slot)
        here = decode.storage.row_index(component, rows, target.block_ids, target.slot)
        prefill.storage.gather(component, layers, there, data)
        decode.storage.scatter(component, layers, here, data)
    target.token_ids = list(source.token_ids)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=TOLERANCE, equal_nan=False)
