"""Attention over listed rows: the kernel against its definition."""

import pytest
import torch
from torch import Tensor

from scission.kernels.dense_attention import KeyRows, listed_rows, reference, tiles_of
from scission.kernels.target import TARGETS
from scission.kernels.testing import relative_error

# bf16 rounds the output, and the weights before they multiply the values
TOLERANCE = 5e-3

# (first position with a key, tokens before the chunk, queries) of each sequence
SMALL = {
    "one token": [(0, 0, 1)],
    "single tokens": [(0, 4, 1), (0, 0, 1), (3, 90, 1)],
    "split keys": [(0, 700, 1), (0, 130, 1), (0, -1, 1)],
    "chunk": [(0, 0, 19)],
    "later chunk": [(2, 77, 12)],
    "mixed with padding": [(0, 3, 9), (0, 80, 1), (0, -1, 1), (0, 0, 1), (5, 70, 17)],
}
REAL = {
    "decode": [(0, 1023 + 100 * i, 1) for i in range(8)],
    "one sequence": [(0, 8191, 1)],
    "prefill": [(0, 0, 1000), (0, 2000, 500)],
}


def _check(
    sequences: list[tuple[int, int, int]],
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    has_sink: bool,
    device: torch.device,
) -> None:
    num_heads, num_kv_heads = heads
    # the interpreter multiplies bf16 as integers
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    counts = [start + queries - first for first, start, queries in sequences]
    order = torch.randperm(sum(counts) + 5)
    pools = torch.randn(2, len(order), num_kv_heads, dim).to(device, dtype)
    rows = torch.full((len(sequences), max(*counts, 1)), int(order[-1]))
    spans, positions, used = [], [], 0
    for i, ((_, start, queries), count) in enumerate(zip(sequences, counts, strict=True)):
        rows[i, :count] = order[used : used + count]
        used += count
        spans.append((len(positions), queries, count))
        positions += range(start, start + queries)
    firsts = torch.tensor([first for first, _, _ in sequences])
    tiles = tiles_of(tuple(spans), device)
    keys = KeyRows(
        rows.to(device), firsts.to(device), torch.tensor(positions).to(device), tuple(spans), tiles
    )
    q = torch.randn(len(positions), num_heads, dim).to(device, dtype)
    sink = torch.randn(num_heads).to(device) if has_sink else None
    arguments: tuple[Tensor, Tensor, Tensor] = (q, pools[0], pools[1])
    scale = dim**-0.5
    actual = listed_rows.attend_listed_rows(
        *arguments, keys, tiles, scale, window, sink, TARGETS[0]
    )
    expected = reference.attend_dense(*arguments, keys, scale, window, sink)
    assert relative_error(actual, expected) <= TOLERANCE
    is_padding = torch.tensor(positions) < 0
    if sink is None:
        assert not actual[is_padding.to(device)].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("window", [None, 40], ids=["all", "window"])
@pytest.mark.parametrize("heads", [(4, 2), (12, 1)], ids=str)
@pytest.mark.parametrize("case", SMALL)
def test_attention_equals_its_reference(
    case: str, heads: tuple[int, int], window: int | None, kernel_device: torch.device
) -> None:
    _check(SMALL[case], heads, 64, window, False, kernel_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", SMALL)
def test_sinks_take_part_in_the_denominator_alone(case: str, kernel_device: torch.device) -> None:
    _check(SMALL[case], (4, 2), 64, None, True, kernel_device)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("window", [None, 512], ids=["all", "window"])
@pytest.mark.parametrize("heads", [(32, 8), (64, 8), (96, 8)], ids=str)
@pytest.mark.parametrize("case", REAL)
def test_attention_of_real_heads_equals_its_reference(
    case: str, heads: tuple[int, int], window: int | None, kernel_device: torch.device
) -> None:
    _check(REAL[case], heads, 128, window, False, kernel_device)
