"""From projections to finished heads where a batch's places say: the kernels against their
definition.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from scission.kernels.dense_attention import Heads, Turn, chunks, places_reference, single_tokens
from scission.kernels.linear import QuantizedRows, SplitSums, quantize_rows
from scission.kernels.places import Places
from scission.kernels.rope import rotations
from scission.kernels.target import TARGETS, target_of
from scission.kernels.testing import relative_error

# bf16 rounds the output, and the weights before they multiply the values
TOLERANCE = 5e-3
BLOCK = 128

# (tokens before the chunk, queries) of each sequence; padding begins at -1
SINGLE = {
    "first token": [(0, 1)],
    "odd lengths": [(0, 1), (127, 1), (128, 1), (300, 1)],
    "padding": [(63, 1), (-1, 1), (64, 1)],
}
CHUNKS = {
    "prompt": [(0, 19)],
    "later chunk": [(77, 12)],
    "long": [(130, 50)],
    "mixed with padding": [(3, 9), (80, 1), (-1, 1), (0, 1), (70, 20)],
}
REAL_SINGLE = {
    "one": [(1023, 1)],
    "eight": [(1023 + 100 * i, 1) for i in range(8)],
    "long": [(16383, 1), (5, 1)],
    "many": [(900 + 3 * i, 1) for i in range(128)],
}
REAL_CHUNKS = {
    "prompts": [(0, 1000), (2000, 500), (-1, 1), (1023, 1)],
    "chunk": [(2048, 2048)],
}


@dataclass(frozen=True)
class Case:
    qkv: Tensor
    heads: Heads
    turn: Turn
    pools: tuple[Tensor, Tensor]
    places: Places
    gate: Tensor | None


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of keys are few, too, where the batch is small: the interpreter runs one by one."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(single_tokens, "WANTED_PROGRAMS", 16)


def places_of(sequences: list[tuple[int, int]], device: torch.device) -> Places:
    """Sequences in blocks out of order, and slots from 1 on; padding in block and slot 0."""
    ends = [start + count for start, count in sequences]
    counts = [count for _, count in sequences]
    needed = [-(-max(end, 0) // BLOCK) for end in ends]
    order = (torch.randperm(sum(needed)) + 1).tolist()
    tables = torch.zeros(len(sequences), max(*needed, 1), dtype=torch.int64)
    for i, number in enumerate(needed):
        tables[i, :number] = torch.tensor(order[:number])
        order = order[number:]
    slots = torch.tensor([i + 1 if start >= 0 else 0 for i, (start, _) in enumerate(sequences)])
    firsts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(ends, dtype=torch.int32)
    number_of = torch.arange(len(sequences))
    return Places(
        positions=torch.cat([torch.arange(start, start + n) for start, n in sequences]).to(device),
        sequences=number_of.repeat_interleave(torch.tensor(counts)).to(device),
        cu_seqlens=firsts.to(device),
        context_lens=lens.to(device),
        block_tables=tables.to(device),
        slots=slots.to(device),
        writer_sequences=number_of.to(device),
        writer_slots=slots.to(device),
        writer_ends=lens.long().to(device),
        block_size=BLOCK,
        is_single=max(counts) == 1,
        max_tokens=max(counts),
        max_context=max(ends),
    )


def make_case(
    sequences: list[tuple[int, int]],
    num_heads: tuple[int, int],
    head_dim: int,
    device: torch.device,
    *,
    window: int | None = None,
    has_norm: bool = True,
    rope_dim: int | None = None,
    has_sink: bool = False,
    has_gate: bool = False,
    has_query_scale: bool = False,
) -> Case:
    """Pools hold NaN but for the rows before each chunk."""
    # the interpreter multiplies bf16 as integers
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    heads, kv_heads = num_heads
    places = places_of(sequences, device)
    num_tokens = places.num_tokens
    num_rows = (int(places.block_tables.max()) + 1) * BLOCK
    if window is not None:
        num_rows = (len(sequences) + 1) * window
    pools = torch.full((2, num_rows, kv_heads, head_dim), torch.nan, dtype=dtype, device=device)
    tables = places.block_tables.cpu()
    for i, (start, _) in enumerate(sequences):
        before = torch.arange(max(0, start - window if window is not None else 0), max(start, 0))
        if window is None:
            rows = tables[i, before // BLOCK] * BLOCK + before % BLOCK
        else:
            rows = (i + 1) * window + before % window
        pools[:, rows.to(device)] = torch.randn(2, len(rows), kv_heads, head_dim).to(device, dtype)
    q_weight, k_weight = (torch.rand(2, head_dim) + 0.5).to(device)
    sink = torch.randn(heads).to(device) if has_sink else None
    pairs = (head_dim if rope_dim is None else rope_dim) // 2
    frequencies = 1 / 10 ** (torch.arange(max(pairs, 1)) / max(pairs, 1)).float().to(device)
    positions = places.positions
    scale = 1 + positions.clamp(min=0).float() / 100 if has_query_scale else None
    width = (heads + 2 * kv_heads) * head_dim
    # rows of a wider product
    qkv = torch.randn(num_tokens, width + 16).to(device, dtype)[:, :width]
    return Case(
        qkv,
        Heads(
            kv_heads,
            head_dim,
            head_dim**-0.5,
            window,
            q_weight if has_norm else None,
            k_weight if has_norm else None,
            1e-6 if has_norm else 0.0,
            has_rope=pairs > 0,
            sink=sink,
        ),
        Turn(rotations(positions, frequencies), scale),
        (pools[0], pools[1]),
        places,
        torch.randn(num_tokens, heads).to(device, dtype) if has_gate else None,
    )


def _check(
    case: Case,
    scaling: str | None = None,
    static_scale: Tensor | None = None,
    sums: SplitSums | None = None,
) -> None:
    device = case.qkv.device
    target = target_of(device) or TARGETS[1]
    attend = single_tokens.attend_single_tokens if case.places.is_single else chunks.attend_chunks
    own = [pool.clone() for pool in case.pools]
    expected = places_reference.attend_heads(
        case.qkv.clone(), case.heads, case.turn, *case.pools, case.places
    )
    if case.gate is not None:
        expected = expected * case.gate.float().sigmoid().to(expected.dtype).unsqueeze(-1)
    expected = expected.flatten(1)
    actual = attend(
        case.qkv if sums is None else sums,
        case.heads,
        case.turn,
        own[0],
        own[1],
        case.places,
        case.gate,
        scaling,
        static_scale,
        target,
    )
    is_padding = case.places.positions < 0
    if isinstance(actual, QuantizedRows):
        assert scaling is not None
        # one code's step where a value lies at a border
        rounded = quantize_rows(expected.float(), scaling, static_scale).dequantize(torch.float32)
        actual = actual.dequantize(torch.float32)
        assert relative_error(actual, rounded) <= 4 * TOLERANCE
    assert not actual[is_padding].any()
    tolerance = TOLERANCE if scaling is None else 0.04
    assert relative_error(actual, expected) <= tolerance
    for ours, theirs in zip(own, case.pools, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert relative_error(ours.nan_to_num(), theirs.nan_to_num()) <= 1e-3


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("window", [None, 40], ids=["all", "window"])
@pytest.mark.parametrize("heads", [(4, 2), (12, 1)], ids=str)
@pytest.mark.parametrize("name", [*SINGLE, *CHUNKS])
def test_heads_equal_their_reference(
    name: str, heads: tuple[int, int], window: int | None, kernel_device: torch.device
) -> None:
    _check(make_case({**SINGLE, **CHUNKS}[name], heads, 64, kernel_device, window=window))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["padding", "mixed with padding"])
@pytest.mark.parametrize("window", [None, 40], ids=["all", "window"])
def test_sinks_gates_and_scaled_queries_of_heads_that_are_turned_in_part(
    name: str, window: int | None, kernel_device: torch.device
) -> None:
    sequences = {**SINGLE, **CHUNKS}[name]
    options = {"has_sink": True, "has_gate": True, "has_query_scale": True}
    _check(make_case(sequences, (4, 2), 64, kernel_device, window=window, rope_dim=32, **options))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["padding", "mixed with padding"])
def test_heads_without_norm_and_rope(name: str, kernel_device: torch.device) -> None:
    sequences = {**SINGLE, **CHUNKS}[name]
    _check(make_case(sequences, (4, 2), 64, kernel_device, has_norm=False, rope_dim=0))
    _check(make_case(sequences, (4, 2), 64, kernel_device, has_norm=False))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scaling", ["dynamic", "static", "ue8m0"])
@pytest.mark.parametrize("name", ["padding", "mixed with padding"])
def test_heads_are_quantised_as_their_reader_takes_them(
    name: str, scaling: str, kernel_device: torch.device
) -> None:
    case = make_case({**SINGLE, **CHUNKS}[name], (4, 1), 128, kernel_device, has_gate=True)
    static = torch.tensor(0.01, device=kernel_device) if scaling == "static" else None
    _check(case, scaling, static)


@pytest.mark.usefixtures("poisoned")
def test_projections_in_parts_are_added_up(kernel_device: torch.device) -> None:
    case = make_case(SINGLE["padding"], (4, 2), 64, kernel_device)
    parts = torch.randn(3, *case.qkv.shape).to(kernel_device)
    case = replace(case, qkv=parts.sum(0).to(case.qkv.dtype))
    _check(case, sums=SplitSums(parts))


@pytest.mark.usefixtures("poisoned")
def test_a_large_batch_is_not_split(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert single_tokens.pick_splits(32, 8) == 1
    monkeypatch.setattr(single_tokens, "WANTED_PROGRAMS", 1)
    _check(make_case(SINGLE["odd lengths"], (4, 2), 64, kernel_device, has_sink=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("window", [None, 512], ids=["all", "window"])
@pytest.mark.parametrize("heads", [(32, 8), (64, 8), (96, 8)], ids=str)
@pytest.mark.parametrize("name", [*REAL_SINGLE, *REAL_CHUNKS])
def test_real_heads_equal_their_reference(
    name: str, heads: tuple[int, int], window: int | None, kernel_device: torch.device
) -> None:
    sequences = {**REAL_SINGLE, **REAL_CHUNKS}[name]
    _check(make_case(sequences, heads, 128, kernel_device, window=window), "dynamic")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 512], ids=["all", "window"])
def test_a_captured_step_equals_the_eager_one_bit_for_bit(
    window: int | None, kernel_device: torch.device
) -> None:
    """Replayed for other lengths than it was captured with."""
    target = target_of(kernel_device)
    assert target is not None
    case = make_case([(3000, 1), (1999, 1)], (32, 8), 128, kernel_device, window=window)
    case = replace(case, pools=tuple(pool.nan_to_num() for pool in case.pools))

    def step() -> Tensor:
        rows = single_tokens.attend_single_tokens(
            case.qkv, case.heads, case.turn, *case.pools, case.places, None, None, None, target
        )
        assert isinstance(rows, Tensor)
        return rows

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for lengths in ([100, 7], [2999, 1998], [512, -1]):
        case.places.positions.copy_(torch.tensor(lengths))
        expected = step()
        graph.replay()
        assert torch.equal(out, expected)
