"""DeepSeek-V4-Flash's sparse attention on a GPU: microseconds, TFLOP/s and the share of the floor.

    .venv/bin/python -m examples.benchmarks.sparse_attention --tokens 1 64 --ends 4096 65536
    .venv/bin/python -m examples.benchmarks.sparse_attention --tokens 2048 8192 --ends 8192

Layers by what a query sees: the window alone, 512 picked entries (CSA), every entry (HCA). Up to
512 tokens are one of as many sequences (a decode step), more are one chunk of a prompt. Every case
is captured some times over into one graph, over other data each time; what is printed is the
median replay by call. The floor is the larger of the products at the matrix rate given, and of
queries, outputs and (for decode) keys at the bandwidth given.
"""

import argparse
import itertools
import sys

import torch
from torch import Tensor

from examples.benchmarks.state_kernels import (
    BLOCK_SIZE,
    DIM,
    HEADS,
    MAX_SINGLE,
    ROPE_DIM,
    WINDOW,
    microseconds,
    places_of,
)
from scission.kernels.attention import attend_sparse
from scission.kernels.places import Places
from scission.kernels.rope import rotations

TOP_K = 512
RATIOS = {"window": 0, "csa": 4, "hca": 128}
SETS = 2


class Layer:
    """One layer's queries, state and picks."""

    def __init__(self, ratio: int, places: Places) -> None:
        device, num_tokens = places.positions.device, places.num_tokens
        self.places = places
        self.ratio = ratio
        self.q = torch.randn(num_tokens, HEADS, DIM, device=device).bfloat16()
        self.kv = torch.randn(num_tokens, DIM, device=device).bfloat16()
        self.ring = torch.randn((places.num_seqs + 1) * WINDOW, DIM, device=device).bfloat16()
        self.entries: Tensor | None = None
        self.picks: Tensor | None = None
        if ratio:
            num_rows = (int(places.block_tables.max()) + 1) * (BLOCK_SIZE // ratio)
            self.entries = torch.randn(num_rows, DIM, device=device).bfloat16()
        if ratio == RATIOS["csa"]:
            self.picks = _picks(ratio, places)
        self.sink = torch.randn(HEADS, device=device)
        frequencies = torch.logspace(0, -4, ROPE_DIM // 2, device=device)
        self.inverse = rotations(places.positions, frequencies).conj_physical()

    def attend(self) -> Tensor:
        return attend_sparse(
            self.q, self.kv, self.ring, WINDOW, self.entries, self.picks, self.ratio,
            self.sink, DIM**-0.5, self.inverse, self.places,
        )  # fmt: skip

    @property
    def num_keys(self) -> int:
        """Of all queries together."""
        seen = self.places.positions + 1
        keys = seen.clamp(max=WINDOW)
        if self.ratio:
            visible = seen // self.ratio
            keys = keys + (visible.clamp(max=TOP_K) if self.picks is not None else visible)
        return int(keys.sum())


def _picks(ratio: int, places: Places) -> Tensor:
    """Rows of any min(TOP_K, visible) entries of every token."""
    rows_per_block = BLOCK_SIZE // ratio
    picks = torch.full(
        (places.num_tokens, TOP_K), -1, dtype=torch.int32, device=places.positions.device
    )
    for token, position in enumerate(places.positions.tolist()):
        numbers = torch.randperm((position + 1) // ratio, device=picks.device)[:TOP_K]
        blocks = places.block_tables[places.sequences[token], numbers // rows_per_block]
        picks[token, : len(numbers)] = (blocks * rows_per_block + numbers % rows_per_block).int()
    return picks


def measure(layers: list[Layer], bytes_per_s: float, flops_per_s: float) -> str:
    """The layers are taken in turns."""
    following = itertools.cycle(layers)
    time = microseconds(lambda: next(following).attend(), 2 * len(layers))
    num_keys, is_single = layers[0].num_keys, layers[0].places.is_single
    flops = 4 * HEADS * DIM * num_keys
    num_bytes = 2 * layers[0].q.nbytes + (2 * DIM * num_keys if is_single else 0)
    floor = 1e6 * max(flops / flops_per_s, num_bytes / bytes_per_s)
    rate = flops / time / 1e6
    return f"{time:9.2f} us  {rate:6.1f} TFLOP/s  floor {floor:8.2f} us, {floor / time:4.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 128, 8192])
    parser.add_argument("--ends", type=int, nargs="+", default=[8192], help="last positions + 1")
    parser.add_argument("--bytes-per-s", type=float, default=4.5e12, help="of a read")
    parser.add_argument("--flops-per-s", type=float, default=788e12, help="of a bf16 product")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    for num_tokens, end in itertools.product(arguments.tokens, arguments.ends):
        if num_tokens > MAX_SINGLE and num_tokens > end:
            continue
        for name, ratio in RATIOS.items():
            layers = [Layer(ratio, places_of(num_tokens, end, device)) for _ in range(SETS)]
            times = measure(layers, arguments.bytes_per_s, arguments.flops_per_s)
            sys.stdout.write(f"{num_tokens:6d} tokens to {end:7d}  {name:7s} {times}\n")


if __name__ == "__main__":
    main()
