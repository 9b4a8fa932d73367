"""Time of drawing a batch's next tokens on a GPU, in a captured graph, by rows and kind of draw.

python -m examples.benchmarks.next_tokens [--vocab 151936] [--json next_tokens.json]
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from scission.common.config import ModelOptions
from scission.common.device import open_device
from scission.kernels.sampling import NextTokens, draw_next_

# temperature, top_k, top_p, and the spread of normal logits
KINDS = {
    "greedy": (0.0, 0, 1.0, 3.0),
    "temperature": (1.0, 0, 1.0, 3.0),
    "top-k 20 and top-p 0.95": (0.6, 20, 0.95, 3.0),
    "top-p 0.95": (1.0, 0, 0.95, 3.0),
    "top-p 0.95, flat logits": (1.0, 0, 0.95, 0.5),
}
DRAWS = 10  # in a graph
REPLAYS = 20


def rows_of(
    count: int, vocab_size: int, temperature: float, top_k: int, top_p: float
) -> NextTokens:
    positions = torch.arange(count, device="cuda") + 100
    zeros = torch.zeros_like(positions)
    return NextTokens(
        token_ids=zeros.clone(),
        positions=positions,
        context_lens=(positions + 1).int(),
        writer_ends=positions + 1,
        temperatures=torch.full((count,), temperature, device="cuda"),
        seeds=torch.arange(count, device="cuda"),
        choices=zeros.clone(),
        counts=zeros.clone(),
        top_k=zeros + top_k,
        top_p=torch.full((count,), top_p, device="cuda"),
        min_p=torch.zeros(count, device="cuda"),
        presence=torch.zeros(count, device="cuda"),
        frequency=torch.zeros(count, device="cuda"),
        repetition=torch.ones(count, device="cuda"),
        seen=torch.zeros(count, vocab_size, dtype=torch.int32, device="cuda"),
    )


def microseconds(logits: Tensor, rows: NextTokens, *, is_greedy: bool) -> float:
    draw_next_(logits, rows, is_greedy=is_greedy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(DRAWS):
            draw_next_(logits, rows, is_greedy=is_greedy)
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    for replay in range(REPLAYS + 2):
        if replay == 2:
            start.record()
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * float(start.elapsed_time(end)) / (REPLAYS * DRAWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    open_device(ModelOptions(Path(), device="cuda"))
    results: dict[str, dict[int, float]] = {}
    for kind, (temperature, top_k, top_p, spread) in KINDS.items():
        results[kind] = {}
        for count in (1, 8, 32, 128):
            logits = torch.randn(count, arguments.vocab, device="cuda") * spread
            rows = rows_of(count, arguments.vocab, temperature, top_k, top_p)
            time_us = microseconds(logits, rows, is_greedy=temperature == 0)
            results[kind][count] = time_us
            sys.stdout.write(f"{kind}, {count} rows: {time_us:.1f} us\n")
            sys.stdout.flush()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
