"""DeepSeek-V4-Flash's latents, heads, compressors and rings on a GPU: microseconds a launch.

    .venv/bin/python -m examples.benchmarks.state_kernels --tokens 1 64 2048

Each kernel is captured some times over into one graph; what is printed is the median replay by
launch. Up to 512 tokens are one of as many sequences (a decode step), more are one chunk of a
prompt. Beside the times stands what must be read and written at the least, by the bandwidth given.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from scission.kernels.cache import write_ring_
from scission.kernels.compressor import compress_
from scission.kernels.latents import index_queries, norm_latents, turn_heads_
from scission.kernels.places import Places
from scission.kernels.rope import step_rotations

BLOCK_SIZE = WINDOW = 128
Q_LORA, HEADS, DIM, ROPE_DIM = 1024, 64, 512, 64
INDEX_HEADS, INDEX_DIM = 64, 128
EPS = 1e-6
MAX_SINGLE = 512
REPLAYS = 9
# ratio, halves of a row, width, rounding
COMPRESSORS = {
    "csa": (4, 2, DIM, "kv"),
    "index": (4, 2, INDEX_DIM, "index"),
    "hca": (128, 1, DIM, "kv"),
}

Case = tuple[str, Callable[[], object], int]  # name, launch, bytes at the least


def places_of(num_tokens: int, end: int, device: torch.device) -> Places:
    """Tokens that end before position `end`: one of each sequence, or the last ones of one."""
    is_single = num_tokens <= MAX_SINGLE
    num_seqs, length = (num_tokens, 1) if is_single else (1, num_tokens)
    blocks = -(-end // BLOCK_SIZE)
    numbers = torch.arange(num_seqs, device=device)
    positions = torch.arange(end - length, end, device=device).repeat(num_seqs)
    ends = torch.full((num_seqs,), end, device=device)
    return Places(
        positions=positions,
        sequences=numbers.repeat_interleave(length),
        cu_seqlens=torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=device),
        context_lens=ends.int(),
        block_tables=1 + torch.arange(num_seqs * blocks, device=device).view(num_seqs, blocks),
        slots=1 + numbers,
        writer_sequences=numbers,
        writer_slots=1 + numbers,
        writer_ends=ends,
        block_size=BLOCK_SIZE,
        is_single=is_single,
        max_tokens=length,
        max_context=end,
    )


def cases(num_tokens: int, device: torch.device) -> Iterator[Case]:
    """With entries that each token (or the chunk) completes, and with none."""
    places = places_of(num_tokens, max(4096, num_tokens), device)
    frequencies = torch.logspace(0, -4, ROPE_DIM // 2, device=device)
    turns = step_rotations(places.positions, frequencies, frequencies, (4, 128))
    yield (
        "rotations",
        lambda: step_rotations(places.positions, frequencies, frequencies, (4, 128)),
        num_tokens * (8 + 6 * ROPE_DIM * 4),
    )
    slots = places.num_seqs + 1
    x = torch.randn(num_tokens, Q_LORA + DIM, device=device).bfloat16()
    weights = torch.ones(Q_LORA, device=device), torch.ones(DIM, device=device)
    ring = torch.zeros(slots * WINDOW, DIM, device=device).bfloat16()
    yield (
        "norm_latents",
        lambda: norm_latents(x, *weights, EPS, turns.plain, True, ring, WINDOW, places),
        num_tokens * (3 * Q_LORA + 4 * DIM),
    )
    q = torch.randn(num_tokens, HEADS, DIM, device=device).bfloat16()
    yield "turn_heads_", lambda: turn_heads_(q, EPS, turns.plain), 2 * q.nbytes
    index = torch.randn(num_tokens, INDEX_HEADS, INDEX_DIM, device=device).bfloat16()
    yield "index_queries", lambda: index_queries(index, turns.plain, True), 2 * index.nbytes
    kv = x[:, Q_LORA:]
    yield (
        "write_ring_",
        lambda: write_ring_(ring, kv, WINDOW, places),
        4 * DIM * places.num_seqs * min(WINDOW, places.max_tokens),
    )
    before = places_of(num_tokens, places.max_context - 1, device)
    for name, shape in COMPRESSORS.items():
        yield _compression(f"compress_ {name}", shape, places, turns.blocks[shape[0]])
        if places.is_single:
            yield _compression(f"compress_ {name}, no entry", shape, before, turns.blocks[shape[0]])


def _compression(
    name: str, shape: tuple[int, int, int, str], places: Places, rotation: Tensor
) -> Case:
    ratio, halves, width, rounding = shape
    device, row, size = rotation.device, halves * width, halves * ratio
    projected = torch.randn(places.num_tokens, 2 * row, device=device)
    kv, score = projected[:, :row], projected[:, row:]
    ape, weight = torch.randn(ratio, row, device=device), torch.ones(width, device=device)
    ring_kv, ring_score = torch.randn(2, (places.num_seqs + 1) * size, row, device=device).unbind()
    num_rows = (int(places.block_tables.max()) + 1) * (BLOCK_SIZE // ratio)
    entries = torch.zeros(num_rows, width, device=device).bfloat16()
    assert rounding in ("kv", "index")

    def launch() -> None:
        compress_(
            kv, score, ape, weight, EPS, rotation, ring_kv, ring_score, entries, ratio,
            "kv" if rounding == "kv" else "index", ROPE_DIM, places,
        )  # fmt: skip

    if not places.is_single:
        # every row is read once and kept by its last ones, an entry a block is written
        kept = 2 * min(size, places.num_tokens)
        num_bytes = (2 * places.num_tokens + kept) * row * 4
        return name, launch, num_bytes + places.num_tokens // ratio * width * 2
    num_bytes = 4 * row * 4
    if (places.max_context % ratio) == 0:
        num_bytes += 2 * size * width * 4 + width * 2
    return name, launch, places.num_seqs * num_bytes


def microseconds(launch: Callable[[], object], count: int) -> float:
    for _ in range(2):
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            launch()
    graph.replay()
    times: list[float] = []
    for _ in range(REPLAYS):
        begin: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 128, 2048, 8192])
    parser.add_argument("--bytes-per-s", type=float, default=4.31e12, help="of a copy")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    for num_tokens in arguments.tokens:
        for name, launch, num_bytes in cases(num_tokens, device):
            time = microseconds(launch, 20 if num_tokens <= MAX_SINGLE else 4)
            floor = num_bytes / arguments.bytes_per_s * 1e6
            sys.stdout.write(
                f"{num_tokens:6d} tokens  {name:24s} {time:8.2f} us  floor {floor:8.2f} us\n"
            )


if __name__ == "__main__":
    main()
