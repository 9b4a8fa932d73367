"""State kernels by places: each against its definition."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from scission.kernels.cache import reference as cache_reference
from scission.kernels.cache import write_rows
from scission.kernels.compressor import compress, compress_
from scission.kernels.compressor import reference as compressor_reference
from scission.kernels.latents import (
    index_queries,
    latent_rows,
    norm_latents,
    query_heads,
    turn_heads_,
)
from scission.kernels.latents import reference as latents_reference
from scission.kernels.places import Places
from scission.kernels.rope import reference as rope_reference
from scission.kernels.rope import rotations, turn_tables
from scission.kernels.target import TARGETS, Target, target_of
from scission.kernels.testing import relative_error

# a value of bf16 that lies between two may be rounded to either: 2 ** -8 of it
BF16 = 2e-3
# between two values of e4m3 likewise 2 ** -3, and of e2m1 2 ** -1: of few values
FP8, FP4 = 4e-3, 3e-2

EPS = 1e-6


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + length) of a sequence; start -1: padding. snapshot: its end."""

    start: int
    length: int
    snapshot: int | None = None


BATCHES = {
    "one token": [Chunk(0, 1)],
    "fresh": [Chunk(0, 37)],
    "fresh ones": [Chunk(0, 3), Chunk(0, 8), Chunk(0, 33)],
    "chunks": [Chunk(5, 20), Chunk(16, 16), Chunk(30, 1)],
    "single tokens": [Chunk(3, 1), Chunk(7, 1), Chunk(0, 1), Chunk(31, 1)],
    "single and padding": [Chunk(7, 1), Chunk(-1, 1), Chunk(15, 1), Chunk(-1, 1)],
    "several tokens": [Chunk(6, 3), Chunk(13, 4), Chunk(2, 2), Chunk(-1, 1)],
    "snapshots": [Chunk(3, 40, 32), Chunk(0, 20, 16), Chunk(17, 2, 16)],
}


@dataclass(frozen=True)
class Pools:
    """How many slots and blocks a batch's places name, scratch included."""

    places: Places
    num_slots: int
    num_blocks: int


def place(chunks: list[Chunk], block_size: int, device: torch.device) -> Pools:
    """Slots and blocks are dealt out in turn, a sequence's blocks from the last."""
    slot, block = 1, 1
    tables: list[list[int]] = []
    slots: list[int] = []
    writers: list[tuple[int, int, int]] = []
    for number, chunk in enumerate(chunks):
        end = chunk.start + chunk.length
        if chunk.start < 0:
            tables.append([])
            slots.append(0)
            writers.append((number, 0, 0))
            continue
        count = -(-end // block_size)
        tables.append(list(range(block, block + count))[::-1])
        slots.append(slot)
        writers.append((number, slot, end))
        block, slot = block + count, slot + 1
        if chunk.snapshot is not None:
            writers.append((number, slot, chunk.snapshot))
            slot += 1
    width = max(1, *(len(table) for table in tables))

    def ints(values: object, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    lengths = [chunk.length for chunk in chunks]
    places = Places(
        positions=ints([p for c in chunks for p in range(c.start, c.start + c.length)]),
        sequences=ints([i for i, length in enumerate(lengths) for _ in range(length)]),
        cu_seqlens=ints([sum(lengths[:i]) for i in range(len(chunks) + 1)], torch.int32),
        context_lens=ints([chunk.start + chunk.length for chunk in chunks], torch.int32),
        block_tables=ints([[*table, *[0] * (width - len(table))] for table in tables]),
        slots=ints(slots),
        writer_sequences=ints([sequence for sequence, _, _ in writers]),
        writer_slots=ints([slot for _, slot, _ in writers]),
        writer_ends=ints([end for _, _, end in writers]),
        block_size=block_size,
        is_single=sum(lengths) == len(chunks) == len(writers),
        max_tokens=max(lengths),
        max_context=max(chunk.start + chunk.length for chunk in chunks),
    )
    return Pools(places, slot, block)


def draw(shape: tuple[int, ...], device: torch.device, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def turns(positions: Tensor, rope_dim: int) -> Tensor:
    """Rows of a wider tensor, as a step keeps two kinds of rotations."""
    frequencies = torch.logspace(0, -3, rope_dim // 2, device=positions.device)
    wide = rotations(positions, torch.cat([frequencies, frequencies * 0.7]))
    return wide[:, rope_dim // 2 :]


def same(actual: Tensor, expected: Tensor) -> bool:
    """Bit for bit, NaN in the same places."""
    return torch.equal(actual.nan_to_num(7.25), expected.nan_to_num(7.25))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """NaN (what nobody wrote) in the same places, the others alike."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert relative_error(actual.nan_to_num(0), expected.nan_to_num(0)) <= tolerance


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("batch", ["fresh ones", "single and padding"])
@pytest.mark.parametrize("round_kv", [True, False])
@pytest.mark.parametrize(
    ("q_lora", "dim", "rope_dim"), [(384, 128, 64), (128, 512, 64), (64, 96, 16)]
)
def test_latents_equal_their_definition(
    batch: str, round_kv: bool, q_lora: int, dim: int, rope_dim: int, kernel_device: torch.device
) -> None:
    window = 16
    pools = place(BATCHES[batch], 16, kernel_device)
    places = pools.places
    wide = draw((places.num_tokens, q_lora + dim + 8), kernel_device).bfloat16()
    x = wide[:, 8:]
    x *= torch.logspace(-3, 3, x.shape[1], device=kernel_device).bfloat16()
    weights = [1 + draw((size,), kernel_device, size) / 4 for size in (q_lora, dim)]
    rotation = turns(places.positions, rope_dim)
    ring = torch.full((pools.num_slots * window, dim), torch.nan, device=kernel_device).bfloat16()
    expected_ring = ring.clone()
    for keeps_values in (True, False):
        expected, expected_kv = latents_reference.norm_latents(
            x, *weights, EPS, rotation, round_kv, expected_ring, window, places, keeps_values
        )
        rows, kv = latent_rows.norm_latents(
            x, *weights, EPS, rotation, round_kv, ring, window, places, keeps_values
        )
        close(kv, expected_kv, FP8 if round_kv else BF16)
        close(rows.dequantize(torch.float32), expected.dequantize(torch.float32), FP8)
        assert (rows.values is not None) == keeps_values
        if rows.values is not None and expected.values is not None:
            close(rows.values, expected.values, BF16)
        close(ring, expected_ring, FP8)
        if places.is_single:
            kept = places.positions >= 0
            at = places.slots * window + places.positions % window
            assert torch.equal(ring[at[kept]], kv[kept])
        else:
            assert ring.isnan().all()


@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "rope_dim"), [(3, 5, 512, 64), (1, 8, 128, 64), (2, 3, 96, 16)]
)
def test_heads_turn_in_place_as_defined(
    tokens: int, heads: int, dim: int, rope_dim: int, kernel_device: torch.device
) -> None:
    wide = draw((tokens, heads, dim + 16), kernel_device).bfloat16() * 5
    rotation = turns(torch.tensor([-1, 0, 70_000], device=kernel_device)[:tokens], rope_dim)
    expected = latents_reference.turn_heads_(wide[..., :dim].clone(), EPS, rotation)
    beside = wide[..., dim:].clone()
    query_heads.turn_heads_(wide[..., :dim], EPS, rotation)
    close(wide[..., :dim], expected, BF16)
    assert torch.equal(wide[..., dim:], beside)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("ratios", [(4, 128), (8,), ()])
@pytest.mark.parametrize(("tokens", "pairs"), [(1, 32), (19, 8), (9, 5)])
def test_a_steps_rotations_equal_their_definition(
    tokens: int, pairs: int, ratios: tuple[int, ...], kernel_device: torch.device
) -> None:
    positions = torch.arange(tokens, device=kernel_device) * 55_555
    plain, compressed = (torch.logspace(0, last, pairs, device=kernel_device) for last in (-4, -6))
    expected = rope_reference.turn_tables(positions, plain, compressed, ratios)
    actual = turn_tables.turn_tables(positions, plain, compressed, ratios)
    # angles are the same products; sines may differ in the last bit of one
    torch.testing.assert_close(actual, expected, rtol=0, atol=2.0**-23)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "rope_dim"), [(3, 5, 128, 64), (1, 64, 128, 64), (40, 3, 32, 16)]
)
def test_index_queries_equal_their_definition(
    tokens: int,
    heads: int,
    dim: int,
    rope_dim: int,
    rounds: bool,
    kernel_device: torch.device,
    kernel_target: Target,
) -> None:
    q = draw((tokens, heads, dim), kernel_device).bfloat16()
    q[0, 0] = 0
    before = q.clone()
    rotation = turns(torch.arange(tokens, device=kernel_device) * 977, rope_dim)
    actual = query_heads.index_queries(q, rotation, rounds, kernel_target)
    expected = latents_reference.index_queries(q, rotation, rounds)
    close(actual, expected, FP4 if rounds else BF16)
    assert torch.equal(q, before)


def by_kernel(*arguments: Any) -> None:
    compress.compress_(*arguments, target_of(arguments[0].device) or TARGETS[0])


@dataclass
class Compression:
    """A compressor's step over NaN: only rows that a sequence owns hold numbers."""

    kv: Tensor
    score: Tensor
    ape: Tensor
    weight: Tensor
    rotation: Tensor
    ring_kv: Tensor
    ring_score: Tensor
    entries: Tensor
    ratio: int
    rounding: Literal["kv", "index"] | None

    def run(self, step: object, places: Places) -> None:
        assert callable(step)
        step(
            self.kv, self.score, self.ape, self.weight, EPS, self.rotation, self.ring_kv,
            self.ring_score, self.entries, self.ratio, self.rounding, places,
        )  # fmt: skip

    def copy(self) -> "Compression":
        rings = (self.ring_kv.clone(), self.ring_score.clone(), self.entries.clone())
        inputs = (self.kv, self.score, self.ape, self.weight, self.rotation)
        return Compression(*inputs, *rings, self.ratio, self.rounding)


def compression(
    pools: Pools, ratio: int, width: int, rope_dim: int, rounding: Literal["kv", "index"] | None
) -> Compression:
    places = pools.places
    device = places.positions.device
    row = width * (2 if ratio == 4 else 1)
    size = row // width * ratio
    # the projections lie in one tensor
    projected = draw((places.num_tokens, 2 * row + 4), device)
    projected[places.positions < 0] = torch.nan
    rings = [torch.full((pools.num_slots, size, row), torch.nan, device=device) for _ in range(2)]
    for sequence, slot in enumerate(places.slots.tolist()):
        length = int(places.cu_seqlens[sequence + 1] - places.cu_seqlens[sequence])
        start = int(places.context_lens[sequence]) - length
        kept = torch.arange(max(start - size, 0), max(start, 0)) % size
        for ring, seed in zip(rings, (2, 3), strict=True):
            ring[slot, kept.to(device)] = draw((kept.shape[0], row), device, seed * 1000 + slot)
    entries = torch.full(
        (pools.num_blocks * (places.block_size // ratio), width), torch.nan, device=device
    )
    return Compression(
        kv=projected[:, :row],
        score=projected[:, row + 4 :],
        ape=draw((ratio, row), device, 4),
        weight=1 + draw((width,), device, 5) / 4,
        rotation=turns(places.positions // ratio * ratio, rope_dim),
        ring_kv=rings[0].view(-1, row),
        ring_score=rings[1].view(-1, row),
        entries=entries.bfloat16(),
        ratio=ratio,
        rounding=rounding,
    )


COMPRESSORS = [(4, 128, 64, "kv"), (4, 64, 32, "index"), (8, 96, 16, None), (16, 128, 64, "kv")]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("ratio", "width", "rope_dim", "rounding"), COMPRESSORS)
def test_a_compressors_step_equals_its_definition(
    batch: str,
    ratio: int,
    width: int,
    rope_dim: int,
    rounding: Literal["kv", "index"] | None,
    kernel_device: torch.device,
) -> None:
    pools = place(BATCHES[batch], 16, kernel_device)
    expected = compression(pools, ratio, width, rope_dim, rounding)
    actual = expected.copy()
    expected.run(compressor_reference.compress_, pools.places)
    actual.run(by_kernel, pools.places)
    close(actual.entries, expected.entries, FP4 if rounding == "index" else FP8)
    # rows that the chunk does not write stay NaN in both; padding writes nothing
    assert same(actual.ring_kv, expected.ring_kv)
    assert same(actual.ring_score, expected.ring_score)


def test_any_cut_of_a_prompt_gives_the_same_entries_and_rings(kernel_device: torch.device) -> None:
    length = 36
    results = []
    for cuts in ([0, 36], [0, 13, 14, 15, 16, 17, 36], list(range(37))):
        whole = compression(place([Chunk(0, length)], 16, kernel_device), 4, 64, 32, "kv")
        for first, last in itertools.pairwise(cuts):
            places = place([Chunk(first, last - first)], 16, kernel_device).places
            # the blocks of the whole prompt
            table = torch.arange(3, 0, -1, device=kernel_device).unsqueeze(0)
            places = Places(
                **{
                    **{name: getattr(places, name) for name in Places.__slots__},
                    "block_tables": table,
                }
            )
            part = slice(first, last)
            Compression(
                whole.kv[part], whole.score[part], whole.ape, whole.weight, whole.rotation[part],
                whole.ring_kv, whole.ring_score, whole.entries, 4, "kv",
            ).run(by_kernel, places)  # fmt: skip
        results.append((whole.entries, whole.ring_kv, whole.ring_score))
    for result in results[1:]:
        assert all(same(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("size", "width"), [(16, 96), (5, 64)])
def test_a_ring_is_written_as_defined(
    batch: str, size: int, width: int, kernel_device: torch.device
) -> None:
    pools = place(BATCHES[batch], 16, kernel_device)
    values = draw((pools.places.num_tokens, width + 3), kernel_device).bfloat16()[:, 3:]
    ring = torch.full((pools.num_slots * size, width), torch.nan, device=kernel_device).bfloat16()
    expected = ring.clone()
    cache_reference.write_ring_(expected, values, size, pools.places)
    write_rows.write_ring_(ring, values, size, pools.places)
    assert same(ring, expected)


@pytest.mark.parametrize("batch", ["chunks", "single and padding"])
def test_paged_rows_are_written_as_defined(batch: str, kernel_device: torch.device) -> None:
    pools = place(BATCHES[batch], 16, kernel_device)
    values = draw((pools.places.num_tokens, 99), kernel_device)[:, 3:]
    pool = torch.full((pools.num_blocks * 16, 96), torch.nan, device=kernel_device)
    expected = pool.clone()
    cache_reference.write_paged_(expected, values, pools.places)
    write_rows.write_paged_(pool, values, pools.places)
    assert same(pool, expected)


def test_wrong_arguments_are_named() -> None:
    cpu = torch.device("cpu")
    pools = place([Chunk(0, 4)], 16, cpu)
    step = compression(pools, 4, 64, 32, "kv")
    arguments = (step.ape, step.weight, EPS, step.rotation, step.ring_kv, step.ring_score)
    with pytest.raises(ValueError, match=r"\[4, 127\]"):
        compress_(
            step.kv[:, 1:], step.score[:, 1:], *arguments, step.entries, 4, "kv", 32, pools.places
        )
    with pytest.raises(ValueError, match="bfloat16"):
        compress_(
            step.kv.bfloat16(), step.score, *arguments, step.entries, 4, "kv", 32, pools.places
        )
    x, weight = torch.zeros(4, 96), torch.ones(32)
    with pytest.raises(ValueError, match="32"):
        norm_latents(x, weight, weight, EPS, step.rotation, True, None, 16, pools.places)
    with pytest.raises(ValueError, match="rotation"):
        turn_heads_(torch.zeros(4, 2, 16), EPS, step.rotation)
    with pytest.raises(ValueError, match="power of two"):
        index_queries(torch.zeros(4, 2, 96), step.rotation, True)


# --- at the shapes of DeepSeek-V4, on a device ---------------------------------------------------

FLASH, PRO = (1024, 64), (1536, 128)  # q_lora, heads
DECODE = {
    "b1": [Chunk(4095, 1)],
    "b8": [Chunk(4092 + i, 1) for i in range(8)],
    "b64": [Chunk(64 * i + i % 3, 1) if i % 5 else Chunk(-1, 1) for i in range(64)],
    "drafts": [Chunk(125 + i, 4) for i in range(16)],
}
PREFILL = {
    "first chunk": [Chunk(0, 2048)],
    "last chunk": [Chunk(6144, 2048, 8064)],
    "many": [Chunk(0, 100), Chunk(130, 1000), Chunk(127, 1), Chunk(4000, 947, 4096)],
}
REAL = DECODE | PREFILL


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("num_tokens", [1, 64, 2048])
def test_rotations_of_long_contexts_are_those_of_the_cpu(num_tokens: int) -> None:
    device = torch.device("cuda", 0)
    positions = torch.linspace(-1, 1_048_575, num_tokens + 1).long()[1:]
    plain, compressed = (base ** -(torch.arange(32) / 32) for base in (1e4, 1.6e5))
    expected = rope_reference.turn_tables(positions, plain, compressed, (4, 128))
    tables = turn_tables.turn_tables(
        positions.to(device), plain.to(device), compressed.to(device), (4, 128)
    )
    torch.testing.assert_close(tables.cpu(), expected, rtol=0, atol=2.0**-22)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("batch", REAL)
@pytest.mark.parametrize("model", [FLASH, PRO], ids=["flash", "pro"])
def test_latents_and_heads_equal_their_definitions_at_real_shapes(
    batch: str, model: tuple[int, int]
) -> None:
    device = torch.device("cuda", 0)
    q_lora, heads = model
    pools = place(REAL[batch], 128, device)
    places = pools.places
    x = draw((places.num_tokens, q_lora + 512), device).bfloat16()
    weights = [1 + draw((size,), device, size) / 4 for size in (q_lora, 512)]
    rotation = turns(places.positions, 64)
    ring = torch.full((pools.num_slots * 128, 512), torch.nan, device=device).bfloat16()
    expected_ring = ring.clone()
    expected, expected_kv = latents_reference.norm_latents(
        x, *weights, EPS, rotation, True, expected_ring, 128, places, False
    )
    rows, kv = norm_latents(x, *weights, EPS, rotation, True, ring, 128, places)
    close(kv, expected_kv, FP8)
    close(rows.dequantize(torch.float32), expected.dequantize(torch.float32), FP8)
    close(ring, expected_ring, FP8)
    q = draw((places.num_tokens, heads, 512), device).bfloat16()
    expected_q = latents_reference.turn_heads_(q.clone(), EPS, rotation)
    close(turn_heads_(q, EPS, rotation), expected_q, BF16)
    q = draw((places.num_tokens, 64, 128), device).bfloat16()
    expected_q = latents_reference.index_queries(q, rotation, True)
    close(index_queries(q, rotation, True), expected_q, FP4)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", REAL)
@pytest.mark.parametrize(
    ("ratio", "width", "rounding"), [(4, 512, "kv"), (4, 128, "index"), (128, 512, "kv")]
)
def test_a_compressors_step_equals_its_definition_at_real_shapes(
    batch: str, ratio: int, width: int, rounding: Literal["kv", "index"]
) -> None:
    pools = place(REAL[batch], 128, torch.device("cuda", 0))
    expected = compression(pools, ratio, width, 64, rounding)
    actual = expected.copy()
    expected.run(compressor_reference.compress_, pools.places)
    actual.run(by_kernel, pools.places)
    close(actual.entries, expected.entries, FP4 if rounding == "index" else FP8)
    assert same(actual.ring_kv, expected.ring_kv)
    assert same(actual.ring_score, expected.ring_score)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", DECODE)
def test_captured_state_kernels_replay_the_eager_ones_bit_for_bit(batch: str) -> None:
    device = torch.device("cuda", 0)
    pools = place(DECODE[batch], 128, device)
    places = pools.places
    steps = [
        compression(pools, *shape)
        for shape in ((4, 512, 64, "kv"), (4, 128, 64, "index"), (128, 512, 64, "kv"))
    ]
    x = draw((places.num_tokens, 1024 + 512), device).bfloat16()
    weights = [torch.ones(size, device=device) for size in (1024, 512)]
    rotation = turns(places.positions, 64)
    queries = draw((places.num_tokens, 64, 512), device).bfloat16()

    def run(steps: list[Compression], ring: Tensor) -> list[Tensor]:
        rows, kv = norm_latents(x, *weights, EPS, rotation, True, ring, 128, places)
        for step in steps:
            step.run(by_kernel, places)
        write_rows.write_ring_(ring, kv, 128, places)
        turned = turn_heads_(queries.clone(), EPS, rotation)
        index = index_queries(queries[..., :128], rotation, True)
        states = [part for s in steps for part in (s.entries, s.ring_kv, s.ring_score)]
        return [rows.codes.float(), rows.scales, kv, turned, index, ring, *states]

    ring = torch.full((pools.num_slots * 128, 512), torch.nan, device=device).bfloat16()
    eager = run([step.copy() for step in steps], ring.clone())
    captured_steps, captured_ring = [step.copy() for step in steps], ring.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(captured_steps, captured_ring)
    graph.replay()
    assert all(same(one, other) for one, other in zip(captured, eager, strict=True))
