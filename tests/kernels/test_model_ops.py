"""The model's ops against the specification's formulas, written out token by token."""

import math

import pytest
import torch
from torch import Tensor

from scission.kernels.attention import attend
from scission.kernels.cache import recent_rows, write_rows_
from scission.kernels.compressor import pool_blocks
from scission.kernels.hyper_connections import HyperConnection, hc_head, hc_post, hc_pre
from scission.kernels.indexer import hadamard, pick_rows, score_entries
from scission.kernels.moe import ExpertWeights, gate, route, run_experts
from scission.kernels.norm import rms_norm
from scission.kernels.quant import round_trip_fp8
from scission.kernels.rope import rotate_, rotations

NEVER = float("-inf")
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


# --- norm ---------------------------------------------------------------------------------------


@BOTH_DTYPES
def test_rms_norm_is_fp32_inside_with_one_cast(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 5, 48).to(dtype), torch.randn(48)
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(rms_norm(x, None, 1e-6), expected.to(dtype))
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), (expected * weight).to(dtype))


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), None, 1e-6), torch.zeros(2, 8))


# --- rope ---------------------------------------------------------------------------------------


@BOTH_DTYPES
def test_rope_turns_interleaved_pairs_of_the_last_channels(dtype: torch.dtype) -> None:
    frequencies, positions = torch.tensor([1.0, 0.25]), torch.tensor([0, 3, 1000])
    x = torch.randn(3, 2, 10).to(dtype)
    expected = x.double().clone()
    for token, position in enumerate(positions.tolist()):
        for pair, frequency in enumerate(frequencies.tolist()):
            cos, sin = math.cos(position * frequency), math.sin(position * frequency)
            a, b = 6 + 2 * pair, 7 + 2 * pair
            old = x[token].double()
            expected[token, :, a] = old[:, a] * cos - old[:, b] * sin
            expected[token, :, b] = old[:, a] * sin + old[:, b] * cos
    turned = rotate_(x.clone(), rotations(positions, frequencies))
    torch.testing.assert_close(turned.double(), expected.to(dtype).double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(turned[..., :6], x[..., :6])


def test_rope_by_the_conjugate_turns_back() -> None:
    x, rotation = torch.randn(4, 6), rotations(torch.arange(4), torch.tensor([1.0, 0.1]))
    there = rotate_(x.clone(), rotation)
    torch.testing.assert_close(rotate_(there, rotation.conj_physical()), x)


def test_angles_are_fp32_products() -> None:
    position, frequency = 1_048_575, torch.tensor([0.687656022], dtype=torch.float32)
    angle = (torch.tensor(float(position)) * frequency).item()
    rotation = rotations(torch.tensor([position]), frequency)
    torch.testing.assert_close(rotation.real.item(), math.cos(angle), rtol=1e-6, atol=1e-6)


# --- hyper-connections --------------------------------------------------------------------------


def _connection(n: int, d: int, *, is_head: bool = False) -> HyperConnection:
    rows = n if is_head else (2 + n) * n
    return HyperConnection(
        fn=torch.randn(rows, n * d) * (n * d) ** -0.5,
        scale=torch.rand(rows) + 0.5,
        base=torch.randn(rows),
        norm_eps=1e-6,
        eps=1e-6,
        num_iterations=0 if is_head else 20,
    )


@pytest.mark.parametrize(("num_tokens", "n"), [(1, 4), (5, 4), (3, 2)])
def test_hyper_connection_follows_the_steps(num_tokens: int, n: int) -> None:
    d = 24
    streams, c = torch.randn(num_tokens, n, d), _connection(n, d)
    x, post, comb = hc_pre(streams, c)
    for token in range(num_tokens):
        v = streams[token].double().reshape(-1)
        m = (c.fn.double() @ v) * (v.square().mean() + 1e-6).rsqrt()
        m = m * c.scale.double() + c.base.double()
        a = m[:n].sigmoid() + 1e-6
        table = m[2 * n :].reshape(n, n).softmax(-1) + 1e-6
        table = table / (table.sum(0, keepdim=True) + 1e-6)
        for _ in range(19):
            table = table / (table.sum(1, keepdim=True) + 1e-6)
            table = table / (table.sum(0, keepdim=True) + 1e-6)
        torch.testing.assert_close(comb[token].double(), table, rtol=1e-4, atol=1e-5)
        gates = 2 * m[n : 2 * n].sigmoid()
        torch.testing.assert_close(post[token].double(), gates, rtol=1e-4, atol=1e-5)
        read = a @ streams[token].double()
        torch.testing.assert_close(x[token].double(), read, rtol=1e-4, atol=1e-5)


def test_streams_are_mixed_over_the_first_index_of_comb() -> None:
    n, d = 4, 8
    y, streams, post, comb = (
        torch.randn(2, d),
        torch.randn(2, n, d),
        torch.randn(2, n),
        torch.rand(2, n, n),
    )
    out = hc_post(y, streams, post, comb)
    for k in range(n):
        mixed = sum(comb[:, j, k, None] * streams[:, j] for j in range(n))
        torch.testing.assert_close(out[:, k], post[:, k, None] * y + mixed)


def test_the_head_reads_the_streams_without_mixing() -> None:
    streams, c = torch.randn(3, 4, 16), _connection(4, 16, is_head=True)
    v = streams.flatten(1)
    m = (v @ c.fn.mT) * (v.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * c.scale + c.base
    expected = ((m.sigmoid() + 1e-6).unsqueeze(-1) * streams).sum(1)
    torch.testing.assert_close(hc_head(streams, c), expected)


# --- attention ----------------------------------------------------------------------------------


@BOTH_DTYPES
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_attention_is_one_softmax_with_a_sink(num_tokens: int, dtype: torch.dtype) -> None:
    heads, dim = 3, 16
    q, window, entries = (
        torch.randn(num_tokens, heads, dim).to(dtype),
        torch.randn(9, dim).to(dtype),
        torch.randn(5, dim).to(dtype),
    )
    window_rows = torch.randint(0, 9, (num_tokens, 4))
    entry_rows = torch.randint(0, 5, (num_tokens, 2))
    bias = torch.zeros(num_tokens, 6)
    bias[:, 2] = NEVER
    sink = torch.randn(heads)
    out = attend(q, window, window_rows, entries, entry_rows, bias, sink, 0.25)
    for token in range(num_tokens):
        keys = torch.cat([window[window_rows[token]], entries[entry_rows[token]]]).float()
        keys = keys[[0, 1, 3, 4, 5]]
        e = (0.25 * q[token].float() @ keys.mT).exp()
        expected = (e @ keys) / (e.sum(-1) + sink.exp()).unsqueeze(-1)
        torch.testing.assert_close(out[token], expected.to(dtype))


def test_a_query_without_keys_gives_zeros() -> None:
    q, window = torch.randn(1, 2, 8), torch.randn(3, 8)
    bias = torch.full((1, 2), NEVER)
    out = attend(q, window, torch.zeros(1, 2, dtype=torch.int64), None, None, bias, q[0, :, 0], 1.0)
    assert torch.equal(out, torch.zeros(1, 2, 8))


def test_attention_in_tiles_equals_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, window, sink = torch.randn(10, 2, 8), torch.randn(6, 8), torch.randn(2)
    rows, bias = torch.randint(0, 6, (10, 3)), torch.zeros(10, 3)
    whole = attend(q, window, rows, None, None, bias, sink, 0.3)
    monkeypatch.setattr("scission.kernels.attention.reference._TILE_ELEMENTS", 3 * 8 * 4)
    torch.testing.assert_close(attend(q, window, rows, None, None, bias, sink, 0.3), whole)


# --- compressor ---------------------------------------------------------------------------------


def test_pooling_is_a_softmax_per_channel() -> None:
    kv, score = torch.randn(10, 6), torch.randn(10, 6)
    score[9] = NEVER
    sources = torch.tensor([[0, 1, 2], [9, 4, 5]])
    pooled = pool_blocks(kv, score, sources)
    for entry, rows in enumerate(([0, 1, 2], [4, 5])):
        weights = score[rows].softmax(0)
        torch.testing.assert_close(pooled[entry], (weights * kv[rows]).sum(0))


# --- indexer ------------------------------------------------------------------------------------


def test_hadamard_is_sylvesters_and_orthogonal() -> None:
    x = torch.randn(3, 4)
    a, b, c, d = x.unbind(-1)
    expected = torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], -1) / 2
    torch.testing.assert_close(hadamard(x), expected)
    torch.testing.assert_close(hadamard(hadamard(torch.eye(128))), torch.eye(128))


@pytest.mark.parametrize("num_seqs", [1, 3])
def test_entries_are_scored_by_weighted_positive_matches(num_seqs: int) -> None:
    num_tokens, heads, dim, max_entries = 6, 5, 8, 7
    q, weights = torch.randn(num_tokens, heads, dim), torch.randn(num_tokens, heads)
    keys = torch.randn(20, dim)
    rows = torch.randint(0, 20, (num_seqs, max_entries))
    sequences = torch.arange(num_tokens) % num_seqs
    bias = torch.zeros(num_tokens, max_entries)
    bias[2, 3:] = NEVER
    scores = score_entries(q, weights, keys, rows, sequences, bias)
    for token in range(num_tokens):
        own = keys[rows[sequences[token]]]
        expected = weights[token] @ (q[token] @ own.mT).clamp(min=0) + bias[token]
        torch.testing.assert_close(scores[token], expected)


@pytest.mark.parametrize("top_k", [1, 2, 5, 6])
def test_any_number_of_best_entries_is_picked(top_k: int) -> None:
    scores = torch.randn(4, 6)
    rows = torch.arange(100, 106).unsqueeze(0)
    picked = pick_rows(scores, rows, torch.zeros(4, dtype=torch.int64), top_k)
    assert picked.shape == (4, top_k)
    expected = scores.topk(top_k).indices + 100
    assert torch.equal(picked.sort().values, expected.sort().values)


def test_of_equal_scores_the_lowest_entry_is_picked_and_invisible_ones_last() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0, NEVER], [NEVER] * 5 + [0.5]])
    rows = torch.tensor([[10, 11, 12, 13, 14, 15]])
    picked = pick_rows(scores, rows, torch.zeros(2, dtype=torch.int64), 4)
    assert picked.tolist() == [[11, 14, 10, 12], [15, 10, 11, 12]]
    # enough that an unstable sort or top-k would leave their order
    many = torch.zeros(1, 5000)
    picked = pick_rows(many, torch.arange(5000).unsqueeze(0), torch.zeros(1, dtype=torch.int64), 9)
    assert picked.tolist() == [list(range(9))]


# --- experts ------------------------------------------------------------------------------------


def test_score_routing_chooses_with_the_bias_and_weighs_without() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.0, 0.0, 0.0, 9.0])
    experts, weights = route(logits, bias, top_k=2, scaling=1.5)
    assert sorted(experts[0].tolist()) == [0, 3]
    scores = {e: math.sqrt(math.log1p(math.exp(logits[0, e].item()))) for e in (0, 3)}
    for expert, weight in zip(experts[0].tolist(), weights[0].tolist(), strict=True):
        assert weight == pytest.approx(1.5 * scores[expert] / sum(scores.values()), rel=1e-5)


def test_hash_routing_weighs_as_score_routing_does() -> None:
    logits = torch.randn(5, 8)
    experts, weights = route(logits, torch.zeros(8), top_k=3, scaling=2.5)
    torch.testing.assert_close(gate(logits, experts, scaling=2.5), weights)
    torch.testing.assert_close(weights.sum(-1), torch.full((5,), 2.5))


def _packed(w13: Tensor, w2: Tensor) -> ExpertWeights:
    w1, w3 = w13.chunk(2, dim=1)
    return ExpertWeights(w1, w3, w2)


def _one_expert(x: Tensor, weight: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    a, b = (w13 @ x).chunk(2)
    a, b = a.clamp(max=limit), b.clamp(-limit, limit)
    return w2 @ (a / (1 + (-a).exp()) * b * weight)


@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["small", "past the limit"])
def test_experts_clip_the_gate_above_and_the_rest_both_sides(num_tokens: int, size: float) -> None:
    num_experts, dim, inner, k = 5, 12, 8, 3
    x = torch.randn(num_tokens, dim) * size
    w13, w2 = torch.randn(num_experts, 2 * inner, dim), torch.randn(num_experts, dim, inner)
    experts = torch.stack([torch.randperm(num_experts)[:k] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, k)
    out = run_experts(x, experts, weights, _packed(w13, w2), 10.0, None)
    for token in range(num_tokens):
        expected = sum(
            _one_expert(x[token], weights[token, i], w13[e], w2[e], 10.0)
            for i, e in enumerate(experts[token].tolist())
        )
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-3)


def test_experts_round_after_weighing() -> None:
    x, w13, w2 = torch.randn(2, 16), torch.randn(1, 64, 16), torch.randn(1, 16, 32)
    experts, weights = torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[0.3], [1.7]])
    a, b = (x @ w13[0].mT).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(a.clamp(max=10)) * b.clamp(-10, 10) * weights
    expected = round_trip_fp8(inner, 128) @ w2[0].mT
    out = run_experts(x, experts, weights, _packed(w13, w2), 10.0, 128)
    torch.testing.assert_close(out, expected)


# --- cache rows ---------------------------------------------------------------------------------


def test_recent_rows_are_pool_rows_then_fresh_then_initial() -> None:
    pool, fresh = torch.arange(8.0).view(4, 2), torch.full((1, 2), 9.0)
    rows = recent_rows(pool, torch.tensor([3, 1]), fresh, NEVER)
    assert rows.tolist() == [[6, 7], [2, 3], [9, 9], [NEVER, NEVER]]
    assert torch.equal(recent_rows(None, None, fresh), fresh)


def test_written_rows_are_those_of_the_named_tokens() -> None:
    pool, values = torch.zeros(4, 1), torch.tensor([[1.0], [2.0], [3.0]])
    write_rows_(pool, torch.tensor([3, 0]), values, torch.tensor([2, 1]))
    assert pool.flatten().tolist() == [2, 0, 0, 3]


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="bias must be"):
        attend(
            torch.zeros(2, 1, 4), torch.zeros(3, 4), torch.zeros(2, 3, dtype=torch.int64),
            None, None, torch.zeros(2, 2), torch.zeros(1), 1.0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.zeros(1, 6))
    with pytest.raises(ValueError, match="do not fit"):
        write_rows_(torch.zeros(4, 2), torch.tensor([1]), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="top_k"):
        pick_rows(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), 3)
    with pytest.raises(ValueError, match="float32"):
        route(torch.zeros(1, 4, dtype=torch.bfloat16), torch.zeros(4), 2, 1.0)
