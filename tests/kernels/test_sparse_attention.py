"""Sparse attention by places: the reference by listed rows, the kernel by the reference."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from scission.kernels.attention import (
    attend,
    attend_sparse,
    hopper_rows,
    reference,
    sparse_rows,
)
from scission.kernels.attention.sparse_rows import Tile
from scission.kernels.places import Places
from scission.kernels.rope import rotate_, rotations
from scission.kernels.target import TARGETS, target_of
from scission.kernels.testing import relative_error

NAN = float("nan")
# bf16 rounds the output, and the weights before they multiply the values
TOLERANCE = 5e-3

INTERPRETED = next(target for target in TARGETS if not target.has_ptx)

Arguments = tuple[
    Tensor, Tensor, Tensor, int, Tensor | None, Tensor | None, int, Tensor, float, Tensor, Places
]


@dataclass(frozen=True)
class Shape:
    num_heads: int
    dim: int
    rope_dim: int
    window: int
    block_size: int


@dataclass(frozen=True)
class Case:
    """A batch's state with everything that no query may see poisoned, and what it should see."""

    q: Tensor
    kv: Tensor
    ring: Tensor
    entries: Tensor | None
    picks: Tensor | None
    ratio: int
    sink: Tensor
    inverse: Tensor
    places: Places
    # of every token, the rows it sees
    keys: list[Tensor]

    def arguments(self, shape: Shape) -> Arguments:
        """Of attend_sparse."""
        return (
            self.q, self.kv, self.ring, shape.window, self.entries, self.picks, self.ratio,
            self.sink, shape.dim**-0.5, self.inverse, self.places,
        )  # fmt: skip


def make_case(
    chunks: list[tuple[int, int]],
    shape: Shape,
    ratio: int,
    top_k: int | None,
    dtype: torch.dtype,
    device: torch.device,
    num_padding: int = 0,
) -> Case:
    """A sequence per (start, tokens) of `chunks`, then padding of one token each."""
    window, dim = shape.window, shape.dim
    is_single = all(count == 1 for _, count in chunks)
    counts = [count for _, count in chunks] + [1] * num_padding
    ends = [start + count for start, count in chunks]
    max_context = max(ends)
    num_seqs, num_tokens = len(counts), sum(counts)
    num_blocks = -(-max_context // shape.block_size)
    # block 0 and slot 0 are padding's
    blocks = (torch.randperm(num_seqs * num_blocks) + 1).view(num_seqs, num_blocks)
    slots = torch.randperm(num_seqs) + 1
    blocks[len(chunks) :], slots[len(chunks) :] = 0, 0
    ring = torch.full(((num_seqs + 1) * window, dim), NAN, dtype=dtype)
    kv = torch.full((num_tokens, dim), NAN, dtype=dtype)
    rows_per_block = shape.block_size // ratio if ratio else 0
    entries = torch.full(((num_seqs * num_blocks + 1) * rows_per_block, dim), NAN, dtype=dtype)
    picks = torch.full((num_tokens, top_k), -1, dtype=torch.int32) if top_k is not None else None
    positions = torch.full((num_tokens,), -1)
    sequences = torch.arange(num_seqs).repeat_interleave(torch.tensor(counts))
    firsts = torch.tensor([0, *counts]).cumsum(0)
    keys: list[Tensor] = [kv[:0]] * num_tokens
    for i, (start, count) in enumerate(chunks):
        low = max(0, start - window + 1)
        recent = torch.randn(start + count - low, dim).to(dtype)
        first = int(firsts[i])
        kv[first : first + count] = recent[start - low :]
        for position in range(low, start):
            ring[int(slots[i]) * window + position % window] = recent[position - low]
        if is_single:
            ring[int(slots[i]) * window + start % window] = recent[-1]
        num_entries = (start + count) // ratio if ratio else 0
        numbers = torch.arange(num_entries)
        rows = numbers
        if num_entries:
            rows = blocks[i, numbers // rows_per_block] * rows_per_block + numbers % rows_per_block
            entries[rows] = torch.randn(num_entries, dim).to(dtype)
        for token in range(count):
            position = start + token
            positions[first + token] = position
            seen = rows[: (position + 1) // ratio] if ratio else rows[:0]
            if picks is not None and top_k is not None:
                seen = seen[torch.randperm(len(seen))[:top_k]]
                picks[first + token, : len(seen)] = seen.int()
            recent_seen = recent[max(0, position - window + 1) - low : position - low + 1]
            keys[first + token] = torch.cat([recent_seen, entries[seen]])
    num_real = len(chunks)
    frequencies = 10000.0 ** -torch.linspace(0, 1, shape.rope_dim // 2)
    places = Places(
        positions=positions.to(device),
        sequences=sequences.to(device),
        cu_seqlens=firsts.int().to(device),
        context_lens=torch.tensor([*ends, *[0] * num_padding], dtype=torch.int32).to(device),
        block_tables=blocks.to(device),
        slots=slots.to(device),
        writer_sequences=torch.arange(num_real).to(device),
        writer_slots=slots[:num_real].to(device),
        writer_ends=torch.tensor(ends).to(device),
        block_size=shape.block_size,
        is_single=is_single,
        max_tokens=max(counts),
        max_context=max_context,
    )
    return Case(
        q=torch.randn(num_tokens, shape.num_heads, dim).to(device, dtype),
        kv=kv.to(device),
        ring=ring.to(device),
        entries=entries.to(device) if ratio else None,
        picks=picks.to(device) if picks is not None else None,
        ratio=ratio,
        sink=torch.randn(shape.num_heads).to(device),
        inverse=rotations(positions, frequencies).conj_physical().to(device),
        places=places,
        keys=[seen.to(device) for seen in keys],
    )


SMALL = Shape(num_heads=3, dim=32, rope_dim=8, window=8, block_size=16)
# (start, tokens) of each sequence, padding
BATCHES = {
    "first token": ([(0, 1)], 0),
    "single tokens": ([(3, 1), (0, 1), (39, 1), (7, 1), (8, 1)], 0),
    "single tokens and padding": ([(20, 1), (100, 1)], 3),
    "whole prompt": ([(0, 21)], 0),
    "later chunks": ([(5, 12), (31, 9), (64, 3)], 0),
    "mixed with padding": ([(0, 9), (40, 1), (17, 20)], 2),
}
# ratio, picks
KINDS = {
    "window alone": (0, None),
    "every entry": (4, None),
    "one entry a block": (16, None),
    "picks": (4, 6),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", BATCHES)
def test_places_name_the_keys_that_positions_see(batch: str, kind: str) -> None:
    chunks, num_padding = BATCHES[batch]
    ratio, top_k = KINDS[kind]
    case = make_case(
        chunks, SMALL, ratio, top_k, torch.float32, torch.device("cpu"), num_padding=num_padding
    )
    out = attend_sparse(*case.arguments(SMALL))
    for token, keys in enumerate(case.keys):
        if not len(keys):
            assert not out[token].any()
            continue
        rows = torch.arange(len(keys)).unsqueeze(0)
        expected = attend(
            case.q[token : token + 1], keys, rows, None, None, torch.zeros(1, len(keys)),
            case.sink, SMALL.dim**-0.5,
        )  # fmt: skip
        rotate_(expected, case.inverse[token : token + 1])
        assert relative_error(out[token], expected[0]) <= 1e-5


def check_kernel(case: Case, shape: Shape, tile: Tile, num_splits: int) -> None:
    arguments = case.arguments(shape)
    target = target_of(case.q.device) or INTERPRETED
    actual = sparse_rows.attend_rows(*arguments, target, (tile, num_splits))
    assert relative_error(actual, reference.attend_sparse(*arguments)) <= TOLERANCE
    assert not actual[case.places.positions < 0].any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("kind", "num_splits"),
    [
        ("window alone", 1),
        ("every entry", 3),
        ("one entry a block", 1),
        ("picks", 1),
        ("picks", 3),
    ],
)
@pytest.mark.parametrize("batch", BATCHES)
def test_kernel_equals_its_reference(
    batch: str, kind: str, num_splits: int, kernel_device: torch.device
) -> None:
    chunks, num_padding = BATCHES[batch]
    # the interpreter multiplies bf16 as integers
    dtype = torch.float16 if kernel_device.type == "cpu" else torch.bfloat16
    case = make_case(chunks, SMALL, *KINDS[kind], dtype, kernel_device, num_padding)
    check_kernel(case, SMALL, Tile(16, 16, 4, 1), num_splits)


@pytest.mark.parametrize("max_keys", [128, 640, None])
@pytest.mark.parametrize("num_blocks", [3, 8, 64, 100, 9000])
def test_keys_of_few_tokens_are_split_while_programs_are_idle(
    num_blocks: int, max_keys: int | None
) -> None:
    num_splits = hopper_rows.pick_splits(num_blocks, 132, max_keys)
    assert num_splits == 1 or num_blocks <= hopper_rows.MAX_SPLIT_BLOCKS
    if num_blocks <= hopper_rows.MAX_SPLIT_BLOCKS:
        assert num_splits > 1
        assert num_splits * num_blocks <= 132
        assert max_keys is None or (num_splits - 1) * hopper_rows.BLOCK_N < max_keys


FLASH = Shape(num_heads=64, dim=512, rope_dim=64, window=128, block_size=128)
PRO = Shape(num_heads=128, dim=512, rope_dim=64, window=128, block_size=128)
REAL_BATCHES = {
    "one token": ([(2500, 1)], 0),
    "single tokens and padding": ([(3, 1), (0, 1), (3900, 1), (127, 1), (128, 1), (2047, 1)], 2),
    "mixed with padding": ([(0, 300), (700, 129), (4090, 9), (37, 1)], 2),
}
REAL_KINDS = {"window alone": (0, None), "every entry": (128, None), "picks": (4, 512)}


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [FLASH, PRO], ids=["flash", "pro"])
@pytest.mark.parametrize("kind", REAL_KINDS)
@pytest.mark.parametrize("batch", REAL_BATCHES)
def test_kernels_of_real_shapes_equal_their_reference(
    batch: str, kind: str, shape: Shape, kernel_device: torch.device
) -> None:
    chunks, num_padding = REAL_BATCHES[batch]
    case = make_case(chunks, shape, *REAL_KINDS[kind], torch.bfloat16, kernel_device, num_padding)
    target = target_of(kernel_device)
    assert target is not None
    expected = reference.attend_sparse(*case.arguments(shape))
    outs = [attend_sparse(*case.arguments(shape))]
    outs.append(sparse_rows.attend_rows(*case.arguments(shape), target))
    if target.name == "sm_90":
        outs += [hopper_rows.attend_rows(*case.arguments(shape), target, n) for n in (1, 2, 5)]
    for out in outs:
        assert relative_error(out, expected) <= TOLERANCE
        assert not out[case.places.positions < 0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", REAL_KINDS)
@pytest.mark.parametrize("num_tokens", [1, 6, 70])
def test_replayed_graph_equals_eager_bit_for_bit(
    num_tokens: int, kind: str, kernel_device: torch.device
) -> None:
    chunks = [(40 * token, 1) for token in range(num_tokens)]
    case = make_case(chunks, FLASH, *REAL_KINDS[kind], torch.bfloat16, kernel_device)
    eager = attend_sparse(*case.arguments(FLASH))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = attend_sparse(*case.arguments(FLASH))
    replayed.fill_(NAN)
    graph.replay()
    assert torch.equal(replayed, eager)
