"""State kernels that work out rows from places write what the host's row lists say."""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from scission.common.layers.numerics import Numerics
from scission.common.model.batch import SequenceChunk, Snapshot, build_batch
from scission.common.model.step_plan import PlanGeometry, plan_step
from scission.kernels.cache import recent_rows, write_paged_, write_ring_, write_rows_
from scission.kernels.compressor import compress_, pool_blocks
from scission.kernels.indexer import hadamard
from scission.kernels.norm import rms_norm
from scission.kernels.rope import rotate_, rotations, step_rotations

BLOCK_SIZE, WINDOW, ROPE_DIM, WIDTH, EPS = 16, 16, 16, 80, 1e-6
RATIOS = {4: True, 8: False}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Chunk:
    start: int
    length: int
    snapshot: int | None = None  # its end


# each a batch; slots and blocks are dealt out in order, padding (start -1) gets none
BATCHES = {
    "one token": [Chunk(0, 1)],
    "fresh": [Chunk(0, 37)],
    "fresh ones": [Chunk(0, 3), Chunk(0, 8), Chunk(0, 33)],
    "chunks": [Chunk(5, 20), Chunk(16, 16), Chunk(30, 1)],
    "single tokens": [Chunk(3, 1), Chunk(7, 1), Chunk(0, 1), Chunk(31, 1)],
    "single and padding": [Chunk(7, 1), Chunk(-1, 1), Chunk(15, 1), Chunk(-1, 1)],
    "several tokens": [Chunk(6, 3), Chunk(13, 4), Chunk(2, 2)],
    "snapshots": [Chunk(3, 40, 32), Chunk(0, 20, 16), Chunk(17, 2, 16)],
}


def _batch(chunks: list[Chunk]):  # type: ignore[no-untyped-def]
    sequences, slot, block = [], 1, 1
    for chunk in chunks:
        if chunk.start < 0:
            sequences.append(SequenceChunk([0], -1, [0], 0))
            continue
        count = -(-(chunk.start + chunk.length) // BLOCK_SIZE)
        snapshots = () if chunk.snapshot is None else (Snapshot(slot + 1, chunk.snapshot),)
        sequences.append(
            SequenceChunk(
                [0] * chunk.length,
                chunk.start,
                # not in order
                list(range(block, block + count))[::-1],
                slot,
                snapshots=snapshots,
            )
        )
        slot, block = slot + 1 + len(snapshots), block + count
    return build_batch(sequences, CPU, BLOCK_SIZE), slot, block


def _geometry() -> PlanGeometry:
    frequencies = torch.logspace(0, -3, ROPE_DIM // 2)
    return PlanGeometry(WINDOW, BLOCK_SIZE, RATIOS, dict.fromkeys(RATIOS), frequencies, frequencies)


def _but_scratch(pool: Tensor, rows: int) -> Tensor:
    """Padding may write to slot 0 and block 0, or not."""
    return pool[rows:]


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("rounding", ["kv", "index", None])
def test_compression_by_places_equals_the_plan(
    name: str, ratio: int, rounding: Literal["kv", "index"] | None
) -> None:
    batch, num_slots, num_blocks = _batch(BATCHES[name])
    plan = plan_step(batch, _geometry())
    width = 128 if rounding == "index" else WIDTH
    overlap = RATIOS[ratio]
    row, ring_size = width * (1 + overlap), ratio * (1 + overlap)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # the two projections lie in one tensor
    projected = draw(batch.num_tokens, 2 * row + 3)
    kv, score = projected[:, :row], projected[:, row + 3 :]
    ape, weight = draw(ratio, row), draw(width)
    rings = [draw(num_slots * ring_size, row) for _ in range(2)]
    entries = torch.full((num_blocks * (BLOCK_SIZE // ratio), width), torch.nan)
    numerics = Numerics(torch.float32, rounds=rounding is not None)

    # as the layers do by row lists
    compression = plan.compressions[ratio]
    expected_rings, expected_entries = [ring.clone() for ring in rings], entries.clone()
    with_ape = score + ape.index_select(0, batch.positions % ratio)
    if compression.num_entries:
        values = pool_blocks(
            recent_rows(rings[0], compression.look_back, kv, 0.0).view(-1, width),
            recent_rows(rings[1], compression.look_back, with_ape, -torch.inf).view(-1, width),
            compression.sources,
        )
        values = rotate_(rms_norm(values, weight, EPS), compression.rotation)
        if rounding == "index":
            values = numerics.round_index(hadamard(values))
        else:
            values = numerics.round_kv(values, ROPE_DIM)
        write_rows_(expected_entries, compression.rows, values)
    writes = plan.ring_writes[ring_size]
    write_rows_(expected_rings[0], writes.rows, kv, writes.tokens)
    write_rows_(expected_rings[1], writes.rows, with_ape, writes.tokens)

    starts = batch.positions // ratio * ratio
    compress_(
        kv, score, ape, weight, EPS, rotations(starts, _geometry().compressed_frequencies),
        *rings, entries, ratio, rounding, ROPE_DIM, batch.places,
    )  # fmt: skip
    torch.testing.assert_close(entries, expected_entries, rtol=0, atol=0, equal_nan=True)
    for ring, expected in zip(rings, expected_rings, strict=True):
        assert torch.equal(_but_scratch(ring, ring_size), _but_scratch(expected, ring_size))


@pytest.mark.parametrize("name", BATCHES)
def test_a_ring_written_by_places_equals_the_plan(name: str) -> None:
    batch, num_slots, _ = _batch(BATCHES[name])
    writes = plan_step(batch, _geometry()).ring_writes[WINDOW]
    values = torch.randn(batch.num_tokens, 5)
    ring = torch.full((num_slots * WINDOW, 5), torch.nan)
    expected = ring.clone()
    write_rows_(expected, writes.rows, values, writes.tokens)
    write_ring_(ring, values, WINDOW, batch.places)
    expected[:WINDOW] = torch.nan
    torch.testing.assert_close(ring, expected, rtol=0, atol=0, equal_nan=True)


def test_paged_rows_lie_where_the_block_table_says_and_padding_nowhere() -> None:
    batch, _, num_blocks = _batch(BATCHES["chunks"] + [Chunk(-1, 1)])
    values = torch.randn(batch.num_tokens, 5)
    pool = torch.full((num_blocks * BLOCK_SIZE, 5), torch.nan)
    write_paged_(pool, values, batch.places)
    for token in range(batch.num_tokens - 1):
        position = int(batch.positions[token])
        table = batch.block_tables[batch.sequences[token]]
        row = int(table[position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE
        assert torch.equal(pool[row], values[token])
    assert int(pool.isfinite().all(1).sum()) == batch.num_tokens - 1


def test_a_steps_rotations_are_those_of_its_positions_and_blocks() -> None:
    positions = torch.tensor([0, 5, 131, 70_001, -1])
    plain, compressed = torch.logspace(0, -3, 8), torch.logspace(0, -5, 8)
    step = step_rotations(positions, plain, compressed, (4, 128))
    assert torch.equal(step.plain, rotations(positions, plain))
    assert torch.equal(step.compressed_inverse, rotations(positions, compressed).conj())
    assert torch.equal(step.plain_inverse, step.plain.conj())
    assert torch.equal(step.compressed, rotations(positions, compressed))
    starts = torch.tensor([0, 4, 128, 70_000, -4])
    assert torch.equal(step.blocks[4], rotations(starts, compressed))
    assert torch.equal(step.blocks[128][:3], rotations(torch.tensor([0, 0, 128]), compressed))
