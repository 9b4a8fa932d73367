"""DeepSeek-V4-Flash's experts and hyper-connections on a GPU: microseconds a launch.

    .venv/bin/python -m examples.benchmarks.mixing_kernels --tokens 1 8 64

Random weights; tokens differ from launch to launch, so that the experts come from memory. Each
kernel is captured some times over into one graph; what is printed is the median replay by launch.
Beside the times stands what must be read at the least (of experts, those that are chosen) by the
bandwidth given.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from scission.kernels.hyper_connections import HyperConnection, Mix, Streams, hc_read, hc_write
from scission.kernels.linear import QuantizedRows, quantize_rows
from scission.kernels.moe.choose_experts import Routing
from scission.kernels.moe.coded import CodedExperts, SharedExpert
from scission.kernels.moe.fp4_layout import Fp4Experts
from scission.kernels.moe.grouped_experts import Activation, Fp8Experts
from scission.kernels.moe.outputs import ExpertOutputs
from scission.kernels.target import target_of

DIM, INNER, NUM_EXPERTS, TOP_K, LIMIT = 4096, 2048, 256, 6, 10.0
STREAMS, EPS, ITERATIONS = 4, 1e-6, 20
CALLS, REPLAYS = 12, 9


def random_fp4(outputs: int, inputs: int, device: torch.device) -> Fp4Experts:
    """Any codes, in the layout of the kernels; scales near 2 ** -9."""
    shape = (NUM_EXPERTS, outputs // 128, inputs // 128, 128, 64)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    words = torch.randint(116, 120, (NUM_EXPERTS, inputs // 128, outputs), device=device)
    for group in range(4):
        words |= torch.randint(8, 12, words.shape, device=device) << 8 + 4 * group
    return Fp4Experts(codes, words.int())


def random_fp8(outputs: int, inputs: int, device: torch.device) -> Fp8Experts:
    codes = torch.randn(1, outputs, inputs, device=device).to(torch.float8_e4m3fn)
    return Fp8Experts(codes, torch.full((1, outputs // 128, inputs // 128), 0.02, device=device))


def median_us(run: Callable[[int], object]) -> float:
    """Of one of CALLS calls, captured together."""
    for call in range(CALLS):
        run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            run(call)
    times: list[float] = []
    for _ in range(REPLAYS + 1):
        begin: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times[1:])


class Mixture:
    """One layer's experts, and as many inputs as there are calls."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        target = target_of(device)
        assert target is not None, "needs a GPU that kernels are compiled for"
        gate = (torch.randn(NUM_EXPERTS, DIM, device=device) * DIM**-0.5).bfloat16()
        bias = torch.zeros(NUM_EXPERTS, device=device)
        self.routing = Routing(gate, bias, None, TOP_K, 1.5, "sqrtsoftplus", 0, NUM_EXPERTS)
        self.experts = CodedExperts(
            self.routing,
            random_fp4(2 * INNER, DIM, device),
            random_fp4(DIM, INNER, device),
            Activation(LIMIT, clamps_first=True, scaling="ue8m0"),
            SharedExpert(random_fp8(2 * INNER, DIM, device), random_fp8(DIM, INNER, device), LIMIT),
            target,
        )
        self.inputs: list[QuantizedRows] = [
            quantize_rows(torch.randn(num_tokens, DIM, device=device).bfloat16(), "ue8m0")
            for _ in range(CALLS)
        ]

    def run(self, call: int) -> ExpertOutputs:
        return self.experts.run_few(self.inputs[call], None, None)

    def least_bytes(self) -> float:
        """Of the experts that a call chooses, on average, and of the shared one."""
        distinct = 0
        for rows in self.inputs:
            assert rows.values is not None
            logits = rows.values.float() @ self.routing.gate.float().mT
            distinct += len(set(logits.topk(TOP_K).indices.flatten().tolist()))
        weights = 3 * DIM * INNER
        # four bits and a byte a group of 32
        return weights * (distinct / CALLS * (0.5 + 1 / 32) + 1)


class Reading:
    """Streams with rows of experts pending, read over and over."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        n = STREAMS
        num_coefficients = (2 + n) * n
        self.connection = HyperConnection(
            fn=torch.randn(num_coefficients, n * DIM, device=device) * (n * DIM) ** -0.5,
            scale=torch.ones(num_coefficients, device=device),
            base=torch.zeros(num_coefficients, device=device),
            norm_eps=EPS,
            eps=EPS,
            num_iterations=ITERATIONS,
        )
        self.weight = torch.ones(DIM, device=device)
        self.values = torch.randn(num_tokens, n, DIM, device=device).bfloat16()
        k = TOP_K + 2
        self.outputs = ExpertOutputs(
            torch.randn(1, num_tokens * k, DIM, device=device),
            torch.arange(num_tokens * k, dtype=torch.int32, device=device).view(-1, k),
        )
        # as Sinkhorn leaves them: what is written stays of one size
        self.mix = Mix(
            torch.full((num_tokens, n), 0.1, device=device),
            torch.full((num_tokens, n, n), 0.25, device=device),
        )

    def run(self, call: int) -> Tensor | QuantizedRows:
        streams = hc_write(self.outputs, Streams(self.values), self.mix)
        return hc_read(streams, self.connection, self.weight, EPS, quantizes=True)[0]

    def least_bytes(self) -> float:
        rows = self.outputs.rows.numel() * 4
        return self.values.numel() * 2 * 2 + rows + self.connection.fn.numel() * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--bandwidth", type=float, default=4.5, help="TB/s, of reading")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    for num_tokens in args.tokens:
        for kind in (Mixture, Reading):
            case = kind(num_tokens, device)
            floor = case.least_bytes() / args.bandwidth / 1e6
            us = median_us(case.run)
            name = kind.__name__.lower()
            sys.stdout.write(
                f"{num_tokens:6d} tokens  {name:8s} {us:8.1f} us  floor {floor:8.1f} us\n"
            )


if __name__ == "__main__":
    main()
