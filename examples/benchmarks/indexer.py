"""DeepSeek-V4's choice of entries and the top-k of ragged rows on a GPU: microseconds.

    .venv/bin/python -m examples.benchmarks.indexer top-k --rows 1 128 --lengths 4096 262144
    .venv/bin/python -m examples.benchmarks.indexer picks --tokens 1 64 8192 --ends 8192 65536

Every case is captured some times over into one graph, over other data each time; what is printed
is the median replay by call. top-k stands beside torch.topk, unsorted, on the same scores, and
beside the time of reading them; picks beside the larger of reading the keys (for decode) and of
the products. Up to 512 tokens are one of as many sequences, more are one chunk of a prompt.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from examples.benchmarks.state_kernels import (
    BLOCK_SIZE,
    INDEX_DIM,
    INDEX_HEADS,
    MAX_SINGLE,
    microseconds,
    places_of,
)
from scission.kernels.indexer import pick_entries, top_k

RATIO = 4
PICKED = 512
# what a timed graph reads is to exceed the caches
LEAST_BYTES = 240e6
MOST_SETS = 8

T = TypeVar("T")


def in_turns(launch: Callable[[T], object], data: Sequence[T]) -> float:
    following = itertools.cycle(data)
    return microseconds(lambda: launch(next(following)), len(data))


def measure_top_k(rows: int, length: int, k: int, bytes_per_s: float) -> str:
    num_bytes = 4 * rows * length
    num_sets = int(min(max(2, LEAST_BYTES // num_bytes + 1), MOST_SETS))
    scores = [torch.randn(rows, length, device="cuda") for _ in range(num_sets)]
    lengths = torch.full((rows,), length, dtype=torch.int32, device="cuda")
    time = in_turns(lambda row: top_k(row, lengths, k), scores)
    library = in_turns(lambda row: torch.topk(row, k, dim=1, sorted=False), scores)
    share = 1e6 * num_bytes / bytes_per_s / time
    return f"{time:9.2f} us  torch {library:9.2f} us, {library / time:4.1f} x  read {share:4.0%}"


def measure_picks(num_tokens: int, end: int, bytes_per_s: float, flops_per_s: float) -> str:
    device = torch.device("cuda", torch.cuda.current_device())
    places = places_of(num_tokens, end, device)
    num_rows = (int(places.block_tables.max()) + 1) * (BLOCK_SIZE // RATIO)

    def layer() -> tuple[Tensor, Tensor, Tensor]:
        q = torch.randn(num_tokens, INDEX_HEADS, INDEX_DIM, device=device).bfloat16()
        weights = torch.randn(num_tokens, INDEX_HEADS, device=device)
        return q, weights, torch.randn(num_rows, INDEX_DIM, device=device).bfloat16()

    layers = [layer() for _ in range(2)]
    time = in_turns(lambda tensors: pick_entries(*tensors, PICKED, RATIO, places), layers)
    visible = (places.positions + 1) // RATIO
    scored = int(visible[visible > PICKED].sum())
    num_bytes = 2 * INDEX_DIM * scored if places.is_single else 0
    flops = 2 * INDEX_HEADS * INDEX_DIM * scored
    floor = 1e6 * max(num_bytes / bytes_per_s, flops / flops_per_s)
    return f"{time:9.2f} us  floor {floor:8.2f} us, {floor / time:4.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bytes-per-s", type=float, default=4.5e12, help="of a read")
    parser.add_argument("--flops-per-s", type=float, default=788e12, help="of a bf16 product")
    kinds = parser.add_subparsers(dest="kind", required=True)
    of_rows = kinds.add_parser("top-k")
    of_rows.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    lengths = [1024, 4096, 16384, 65536, 262144]
    of_rows.add_argument("--lengths", type=int, nargs="+", default=lengths)
    of_rows.add_argument("--k", type=int, nargs="+", default=[512, 1024, 2048])
    of_tokens = kinds.add_parser("picks")
    of_tokens.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 128, 8192])
    of_tokens.add_argument("--ends", type=int, nargs="+", default=[8192], help="last positions + 1")
    arguments = parser.parse_args()
    rates = arguments.bytes_per_s, arguments.flops_per_s
    if arguments.kind == "top-k":
        for rows, length, k in itertools.product(arguments.rows, arguments.lengths, arguments.k):
            if k < length:
                times = measure_top_k(rows, length, k, rates[0])
                sys.stdout.write(f"{rows:4d} rows of {length:7d}  k {k:5d}  {times}\n")
        return
    for num_tokens, end in itertools.product(arguments.tokens, arguments.ends):
        if num_tokens <= max(MAX_SINGLE, end):
            times = measure_picks(num_tokens, end, *rates)
            sys.stdout.write(f"{num_tokens:6d} tokens to {end:7d}  {times}\n")


if __name__ == "__main__":
    main()
