"""The ops of dense models against their formulas, written out one element at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scission.kernels.activation import silu_mul
from scission.kernels.dense_attention import KeyRows, attend_dense, reference
from scission.kernels.gated_experts import products_of, route_sigmoid, run_gated_experts
from scission.kernels.rope import rotate_halves_, rotations

# (first position with a key, tokens before the chunk, queries) of each sequence
CASES = {
    "one token": [(0, 0, 1)],
    "single tokens": [(0, 4, 1), (0, 0, 1), (3, 9, 1)],
    "chunk": [(0, 0, 9)],
    "later chunk": [(2, 7, 12)],
    "mixed with padding": [(0, 3, 5), (0, 10, 1), (0, -1, 1), (0, 0, 1), (5, 14, 7)],
}


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("has_sink", [False, True])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("case", CASES)
def test_attention_sees_what_the_definition_says(
    case: str, heads: tuple[int, int], has_sink: bool, window: int | None
) -> None:
    _check(CASES[case], heads, has_sink, window)


@pytest.mark.parametrize("window", [None, 4])
def test_tiles_change_nothing(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_TILE_ELEMENTS", 64)
    _check(CASES["mixed with padding"] * 2, (4, 2), False, window)
    _check([(0, 0, 300)], (4, 2), False, window)


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, k = torch.zeros(2, 3, 8), torch.zeros(5, 2, 8)
    keys = KeyRows(torch.zeros(1, 2).long(), torch.zeros(1).long(), torch.arange(2), ((0, 2, 2),))
    with pytest.raises(ValueError, match="do not fit each other"):
        attend_dense(q, k, k, keys, 1.0)
    with pytest.raises(ValueError, match="positions"):
        attend_dense(torch.zeros(3, 4, 8), k, k, keys, 1.0)
    with pytest.raises(ValueError, match="sink must be"):
        attend_dense(torch.zeros(2, 4, 8), k, k, keys, 1.0, sink=torch.zeros(3))


@pytest.mark.parametrize("rope_dim", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_turn_by_their_angle_and_the_rest_stays(rope_dim: int, dtype: torch.dtype) -> None:
    frequencies = torch.rand(rope_dim // 2)
    positions = torch.tensor([0, 1, 7])
    x = torch.randn(3, 2, 8).to(dtype)
    turned = rotate_halves_(x.clone(), rotations(positions, frequencies))
    for n, position in enumerate(positions.tolist()):
        for c in range(rope_dim // 2):
            angle = position * frequencies[c].item()
            a, b = x[n, :, c].float(), x[n, :, c + rope_dim // 2].float()
            first = a * math.cos(angle) - b * math.sin(angle)
            second = b * math.cos(angle) + a * math.sin(angle)
            torch.testing.assert_close(turned[n, :, c], first.to(dtype))
            torch.testing.assert_close(turned[n, :, c + rope_dim // 2], second.to(dtype))
    assert torch.equal(turned[..., rope_dim:], x[..., rope_dim:])


@pytest.mark.parametrize("limit", [None, 0.3])
def test_the_clamp_comes_after_silu(limit: float | None) -> None:
    gate, up = torch.randn(2, 5, 4) * 3
    expected = F.silu(gate) * up
    if limit is not None:
        expected = F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    torch.testing.assert_close(silu_mul(torch.cat([gate, up], -1), limit), expected)


def test_the_bias_selects_and_does_not_weigh() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    experts, weights = route_sigmoid(logits, torch.tensor([9.0, 0.0, 0.0, 0.0]), 2, 3.0)
    assert experts.tolist() == [[0, 3]]
    chosen = logits.sigmoid()[0, [0, 3]]
    torch.testing.assert_close(weights[0], 3 * chosen / chosen.sum())
    ties, _ = route_sigmoid(torch.zeros(1, 9), None, 3, 1.0)
    assert ties.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_experts_add_up_and_absent_ones_add_nothing(num_tokens: int, limit: float | None) -> None:
    x, weights = torch.randn(num_tokens, 6), torch.rand(num_tokens, 3)
    gate_up, down = torch.randn(4, 10, 6), torch.randn(4, 6, 5)
    experts = torch.randint(-1, 4, (num_tokens, 3))
    expected = torch.zeros(num_tokens, 6)
    for n in range(num_tokens):
        for weight, e in zip(weights[n], experts[n].tolist(), strict=True):
            if e >= 0:
                inner = silu_mul(gate_up[e] @ x[n], limit)
                expected[n] += weight * (down[e] @ inner)
    ours = run_gated_experts(x, experts, weights, products_of(gate_up), products_of(down), 4, limit)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_zeros_that_pad_gate_up_and_down_change_nothing() -> None:
    """Each half of (gate | up) is padded for itself: at the end of both, gate meets up."""
    x, experts, weights = torch.randn(5, 6), torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    gate, up, down = torch.randn(3, 5, 6), torch.randn(3, 5, 6), torch.randn(3, 6, 5)

    def run(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate_up = products_of(torch.cat([gate, up], 1))
        return run_gated_experts(x, experts, weights, gate_up, products_of(down), 3, 0.5)

    expected = run(gate, up, down)
    gate, up = (F.pad(part, (0, 0, 0, 3)) for part in (gate, up))
    ours = run(gate, up, F.pad(down, (0, 3)))
    torch.testing.assert_close(ours, expected)


def _check(
    sequences: list[tuple[int, int, int]],
    heads: tuple[int, int],
    has_sink: bool,
    window: int | None,
) -> None:
    """Against a loop over queries; the rows of the pool are shuffled, and absent ones finite."""
    num_heads, num_kv_heads = heads
    dim, scale = 8, 0.3
    counts = [start + queries - first for first, start, queries in sequences]
    order = torch.randperm(max(sum(counts), 1) + 3)
    k, v = torch.randn(2, len(order), num_kv_heads, dim)
    rows = torch.zeros(len(sequences), max(*counts, 1), dtype=torch.int64)
    spans, positions = [], []
    used = 0
    for i, ((_, start, queries), count) in enumerate(zip(sequences, counts, strict=True)):
        rows[i, :count] = order[used : used + count]
        used += count
        spans.append((len(positions), queries, count))
        positions += range(start, start + queries)
    firsts = torch.tensor([first for first, _, _ in sequences])
    keys = KeyRows(rows, firsts, torch.tensor(positions), tuple(spans))
    q = torch.randn(len(positions), num_heads, dim)
    sink = torch.randn(num_heads) if has_sink else None
    ours = attend_dense(q, k, v, keys, scale, window, sink)

    for i, (token, queries, count) in enumerate(spans):
        for n in range(token, token + queries):
            low = 0 if window is None else positions[n] - window + 1
            seen = [j for j in range(count) if low <= int(firsts[i]) + j <= positions[n]]
            for head in range(num_heads):
                kv = head // (num_heads // num_kv_heads)
                expected = _attend_one(
                    q[n, head], k[rows[i, seen], kv], v[rows[i, seen], kv], scale,
                    sink[head].item() if sink is not None else None,
                )  # fmt: skip
                torch.testing.assert_close(ours[n, head], expected, rtol=1e-4, atol=1e-5)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, scale: float, sink: float | None) -> Tensor:
    weights = (k @ q * scale).exp()
    total = weights.sum() + (math.exp(sink) if sink is not None else 0)
    return (weights @ v) / total if len(k) else torch.zeros_like(q)
