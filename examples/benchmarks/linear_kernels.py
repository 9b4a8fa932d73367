"""Linear layers on a GPU: microseconds a call, by rows, over weights that no cache holds.

    .venv/bin/python -m examples.benchmarks.linear_kernels --rows 1 8 32 64 128 8192

Each call is captured over as many copies of its weights as fill some caches, into one graph; what
is printed is the median replay by call, and for many rows the rate. Quantising the input is not in
it. Beside the times stands what reading the weights takes, by the bandwidth given.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from scission.kernels.linear import linear_bf16, linear_block_fp8, linear_grouped, quantize_rows
from scission.kernels.moe.choose_experts import Routing
from scission.kernels.moe.coded import CodedExperts
from scission.kernels.moe.fp4_layout import Fp4Experts
from scission.kernels.moe.grouped_experts import Activation
from scission.kernels.target import target_of

# out, in: Qwen3-8B's (q, k and v; o; gate and up; down), DeepSeek-V4-Flash's (wq_a and wkv, wq_b,
# the indexer's wq_b, wo_b, the shared expert's)
FP8_SHAPES = (
    *((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
    *((1536, 4096), (32768, 1024), (8192, 1024), (4096, 8192), (4096, 2048)),
)
# a head, two compressors side by side
BF16_SHAPES = ((151936, 4096), (2560, 4096))
NUM_GROUPS, GROUP_RANK, GROUP_DIM = 8, 1024, 4096
EXPERTS, TOP_K, DIM, INNER = 256, 6, 4096, 2048
# of weights that one graph reads
GRAPH_BYTES = 400e6
WARM_UP_S = 0.1
REPLAYS = 9
MIN_ROWS_OF_RATE = 256

Call = Callable[[int], object]  # with a copy's number


def fp8_weights(out_features: int, in_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.randn(out_features, in_features, device=device).to(torch.float8_e4m3fn)
    return codes, torch.rand(out_features // 128, in_features // 128, device=device) + 0.5


def fp4_experts(out_features: int, in_features: int, device: torch.device) -> Fp4Experts:
    """Random codes, and scales of some binades."""
    shape = (EXPERTS, out_features // 128, in_features // 128, 128, 64)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    shape = (EXPERTS, in_features // 128, out_features)
    words = torch.randint(114, 119, shape, dtype=torch.int32, device=device)
    for group in range(4):
        words |= torch.randint(6, 12, shape, dtype=torch.int32, device=device) << 8 + 4 * group
    return Fp4Experts(codes, words)


def products(num_rows: int, device: torch.device) -> Iterator[tuple[str, Call, int, int, float]]:
    """Name, call, copies, bytes of weights, operations."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    for out_features, in_features in FP8_SHAPES:
        num_bytes = out_features * in_features
        copies = _copies(num_bytes)
        weights = [fp8_weights(out_features, in_features, device) for _ in range(copies)]
        rows = quantize_rows(random(num_rows, in_features), "dynamic")
        name = f"FP8 {out_features} x {in_features}"
        yield (
            name,
            lambda i, rows=rows, weights=weights: linear_block_fp8(rows, *weights[i]),
            copies,
            num_bytes,
            2.0 * num_rows * num_bytes,
        )
    shape = NUM_GROUPS * GROUP_RANK, GROUP_DIM
    copies = _copies(shape[0] * shape[1])
    weights = [fp8_weights(*shape, device) for _ in range(copies)]
    grouped = random(num_rows, NUM_GROUPS, GROUP_DIM)
    yield (
        f"FP8 {NUM_GROUPS} groups of {GROUP_RANK} x {GROUP_DIM}, unrounded",
        lambda i: linear_grouped(grouped, *weights[i]),
        copies,
        shape[0] * shape[1],
        2.0 * num_rows * shape[0] * shape[1],
    )
    for out_features, in_features in BF16_SHAPES:
        num_bytes = 2 * out_features * in_features
        copies = _copies(num_bytes)
        matrices = [random(out_features, in_features) for _ in range(copies)]
        x = random(num_rows, in_features)
        yield (
            f"bf16 {out_features} x {in_features}, float32 out",
            lambda i, x=x, matrices=matrices: linear_bf16(x, matrices[i], torch.float32),
            copies,
            num_bytes,
            1.0 * num_rows * num_bytes,
        )


def experts(num_rows: int, device: torch.device) -> tuple[str, Call, int, int, float]:
    """Many tokens' experts with everything around them, router and grouping too."""
    target = target_of(device)
    assert target is not None
    gate = torch.randn(EXPERTS, DIM, device=device).bfloat16() / DIM**0.5
    routing = Routing(
        gate, torch.zeros(EXPERTS, device=device), None, TOP_K, 1.5, "sqrtsoftplus", 0, EXPERTS
    )
    coded = CodedExperts(
        routing,
        fp4_experts(2 * INNER, DIM, device),
        fp4_experts(DIM, INNER, device),
        Activation(10.0, True, "ue8m0"),
        None,
        target,
    )
    rows = quantize_rows(torch.randn(num_rows, DIM, device=device).bfloat16(), "ue8m0")
    token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
    return (
        f"FP4 experts {DIM} to {INNER}, {TOP_K} of {EXPERTS}",
        lambda _: coded.run_many(rows, token_ids),
        2,
        EXPERTS * 3 * DIM * INNER * 17 // 32,
        2.0 * num_rows * TOP_K * 3 * DIM * INNER,
    )


def microseconds(call: Call, copies: int) -> float:
    """Of one call, in a captured graph of one over each copy; the median."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            call(copy)
    # right after a compilation, in which clocks seem to fall, kernels took up to 40 % longer
    end_s = time.monotonic() + WARM_UP_S
    while time.monotonic() < end_s:
        graph.replay()
        torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(REPLAYS):
        start: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / copies)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 2048, 8192])
    parser.add_argument("--bandwidth", type=float, default=4.5e12, help="bytes a second, read")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    for num_rows in arguments.rows:
        _write(f"{num_rows} rows\n")
        for case in products(num_rows, device):
            _measure(*case, num_rows, arguments.bandwidth)
        if num_rows >= MIN_ROWS_OF_RATE:
            _measure(*experts(num_rows, device), num_rows, arguments.bandwidth)


def _measure(
    name: str,
    call: Call,
    copies: int,
    num_bytes: int,
    operations: float,
    num_rows: int,
    bandwidth: float,
) -> None:
    time_us = microseconds(call, copies)
    reading = f"reading {num_bytes / bandwidth * 1e6:.1f}"
    rate = f", {operations / time_us / 1e6:.0f} TFLOP/s" if num_rows >= MIN_ROWS_OF_RATE else ""
    _write(f"  {name:48s} {time_us:8.1f} us  ({reading}{rate})\n")


def _copies(num_bytes: int) -> int:
    return max(2, round(GRAPH_BYTES / num_bytes))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
