"""Hyper-connections, norms and gates as the layers use them, against their definitions."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scission.kernels.activation import clamped_silu_mul, silu_mul, silu_mul_rows
from scission.kernels.hyper_connections import (
    HyperConnection,
    Mix,
    Streams,
    hc_head,
    hc_post,
    hc_pre,
    hc_read,
    hc_read_head,
    hc_write,
    mix_streams,
)
from scission.kernels.hyper_connections import reference as hc_reference
from scission.kernels.linear import QuantizedRows, Scaling, quantize_rows
from scission.kernels.moe.outputs import ExpertOutputs
from scission.kernels.norm import add_norm, rms_norm
from scission.kernels.target import Target
from scission.kernels.testing import relative_error

EPS = 1e-6


def random_connection(
    n: int, d: int, generator: torch.Generator, *, is_head: bool = False
) -> HyperConnection:
    rows = n if is_head else (2 + n) * n

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    return HyperConnection(
        fn=random(rows, n * d) * (n * d) ** -0.5,
        scale=random(rows) * 0.5 + 1,
        base=random(rows) * 0.3,
        norm_eps=EPS,
        eps=EPS,
        num_iterations=0 if is_head else 20,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_writes_what_was_pending(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    n, d, tokens = 4, 128, 5
    connections = [random_connection(n, d, generator) for _ in range(3)]
    weight = torch.rand(d, generator=generator) + 0.5
    x = torch.randn(tokens, d, generator=generator).to(dtype)
    outputs = [torch.randn(tokens, d, generator=generator).to(dtype) for _ in range(2)]

    streams = Streams.of(x, n)
    expected = x.unsqueeze(1).repeat(1, n, 1)
    for connection, y in zip(connections, outputs, strict=False):
        read, mix = hc_read(streams, connection, weight, EPS, quantizes=False)
        wanted, post, comb = hc_pre(expected, connection)
        assert torch.equal(read, rms_norm(wanted, weight, EPS))
        streams = hc_write(y, streams, mix)
        expected = hc_post(y, expected, post, comb)
    rows = torch.tensor([4, 1])
    head = random_connection(n, d, generator, is_head=True)
    actual = hc_read_head(streams.select(rows), head, weight, EPS)
    assert torch.equal(actual, rms_norm(hc_head(expected[rows], head), weight, EPS))


def test_reading_quantises_what_it_returns() -> None:
    generator = torch.Generator().manual_seed(0)
    connection = random_connection(4, 128, generator)
    streams = Streams.of(torch.randn(3, 128, generator=generator).bfloat16(), 4)
    rows, _ = hc_read(streams, connection, torch.ones(128), EPS, quantizes=True)
    x, _ = hc_read(streams, connection, torch.ones(128), EPS, quantizes=False)
    assert isinstance(rows, QuantizedRows) and isinstance(x, Tensor)
    expected = quantize_rows(x, "ue8m0")
    assert torch.equal(rows.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(rows.scales, expected.scales)
    assert rows.values is not None and torch.equal(rows.values, x)


def test_experts_outputs_are_summed_where_they_are_read() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = ExpertOutputs(
        torch.randn(2, 9, 128, generator=generator),
        torch.tensor([[0, 3, 8], [1, 2, 7], [4, 5, 6]], dtype=torch.int32),
    )
    y = outputs.rows.sum(0)[outputs.row_of.long()].sum(1).bfloat16()
    h = torch.randn(3, 4, 128, generator=generator).bfloat16()
    mix = Mix(torch.rand(3, 4, generator=generator), torch.rand(3, 4, 4, generator=generator))
    connection = random_connection(4, 128, generator)
    lazy, whole = hc_write(outputs, Streams(h), mix), hc_write(y, Streams(h), mix)
    for streams in (lazy, whole):
        hc_read(streams, connection, torch.ones(128), EPS, quantizes=False)
    assert torch.allclose(lazy.values.float(), whole.values.float(), rtol=2**-8)
    assert torch.equal(lazy.values, hc_post(outputs.sum(h.dtype), h, mix.post, mix.comb))


def test_an_output_that_does_not_fit_is_refused() -> None:
    streams = Streams(torch.zeros(2, 4, 128))
    mix = Mix(torch.zeros(2, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="does not fit"):
        hc_write(torch.zeros(2, 64), streams, mix)


@pytest.mark.parametrize("quantizes", [None, "ue8m0", "dynamic", "static"])
@pytest.mark.parametrize("has_y", [True, False])
def test_residual_sum_and_norm_are_one_operation(quantizes: Scaling | None, has_y: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 256, generator=generator).bfloat16() for _ in range(2))
    weight = torch.rand(256, generator=generator) + 0.5
    scale = torch.tensor(0.02) if quantizes == "static" else None
    total, rows = add_norm(x, y if has_y else None, weight, EPS, quantizes, scale)
    expected = x + y if has_y else x
    assert torch.equal(total, expected)
    normed = rms_norm(expected, weight, EPS)
    if quantizes is None:
        assert isinstance(rows, Tensor) and torch.equal(rows, normed)
        return
    wanted = quantize_rows(normed, quantizes, scale)
    assert isinstance(rows, QuantizedRows) and rows.values is None
    assert torch.equal(rows.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    assert torch.equal(rows.scales, wanted.scales)


def test_gate_is_clamped_after_silu_or_before_it() -> None:
    gate_up = torch.tensor([[9.0, -9.0, 2.0, -20.0]])
    silu = torch.nn.functional.silu
    after = silu_mul(gate_up, 3.0)
    assert torch.allclose(after, torch.tensor([[3.0 * 2.0, silu(torch.tensor(-9.0)) * -3.0]]))
    before = clamped_silu_mul(gate_up, 3.0)
    expected = [[silu(torch.tensor(3.0)) * 2.0, silu(torch.tensor(-9.0)) * -3.0]]
    assert torch.allclose(before, torch.tensor(expected))


def test_gated_rows_are_quantised_as_the_next_layer_takes_them() -> None:
    gate_up = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = silu_mul_rows(gate_up, 7.0, "dynamic")
    expected = quantize_rows(silu_mul(gate_up, 7.0), "dynamic")
    assert torch.equal(rows.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(rows.scales, expected.scales)


def _run_kernels_everywhere(monkeypatch: pytest.MonkeyPatch, target: Target) -> None:
    """The interpreter's CPU counts as a device with kernels."""
    for package in ("hyper_connections",):
        monkeypatch.setattr(f"scission.kernels.{package}.target_of", lambda _: target)


class StreamCase:
    """One sublayer's read with something pending, by kernels and by definition."""

    def __init__(self, num_tokens: int, d: int, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.connection = random_connection(4, d, generator)
        self.head = random_connection(4, d, generator, is_head=True)
        self.weight = random(d).abs() + 0.5
        self.values = random(num_tokens, 4, d).bfloat16()
        self.y = random(num_tokens, d).bfloat16()
        self.mix = Mix(random(num_tokens, 4).abs(), random(num_tokens, 4, 4).abs() * 0.25)
        rows = torch.randperm(num_tokens * 3, generator=generator, device=device)
        self.outputs = ExpertOutputs(
            random(2, num_tokens * 3, d), rows.view(num_tokens, 3).to(torch.int32)
        )
        if num_tokens > 1:
            # padding: a row of nobody
            self.outputs.row_of[1] = -1

    def streams(self, kind: str) -> Streams:
        if kind == "first":
            return Streams.of(self.y, 4)
        y = self.y if kind == "summed" else self.outputs
        return hc_write(y, Streams(self.values.clone()), self.mix)

    def written(self, kind: str) -> Tensor:
        """The streams with what was pending."""
        if kind == "first":
            return self.streams("first").values
        y = self.y
        if kind == "rows":
            real = self.outputs.row_of >= 0
            found = self.outputs.rows.sum(0)[self.outputs.row_of.clamp_min(0).long()]
            y = (found * real.unsqueeze(-1)).sum(1).bfloat16()
        return hc_reference.hc_post(y, self.values, self.mix.post, self.mix.comb)


def _on_cpu(connection: HyperConnection) -> HyperConnection:
    c = connection
    return replace(c, fn=c.fn.cpu(), scale=c.scale.cpu(), base=c.base.cpu())


def _check_reading(case: StreamCase, kind: str) -> None:
    streams = case.streams(kind)
    rows, mix = hc_read(streams, case.connection, case.weight, EPS, quantizes=True)
    assert isinstance(rows, QuantizedRows) and rows.values is not None
    assert streams.pending is None
    # what is summed in another order rounds to a neighbour here and there
    assert relative_error(streams.values, case.written(kind)) <= 1e-4
    h, weight = streams.values.cpu(), case.weight.cpu()
    x, post, comb = hc_pre(h, _on_cpu(case.connection))
    assert relative_error(rows.values.cpu(), rms_norm(x, weight, EPS)) <= 1e-3
    # float32 sums of 4 d products, in matrix units for some, and quick exponentials
    assert relative_error(mix.post.cpu(), post) <= 5e-5
    assert relative_error(mix.comb.cpu(), comb) <= 5e-5
    wanted = quantize_rows(rows.values.cpu(), "ue8m0")
    # as numbers: what rounds to zero may have lost its sign
    assert torch.equal(rows.codes.cpu().float(), wanted.codes.float())
    assert torch.equal(rows.scales.cpu(), wanted.scales)
    head = hc_read_head(case.streams(kind), case.head, case.weight, EPS)
    expected = rms_norm(hc_head(h, _on_cpu(case.head)), weight, EPS)
    assert relative_error(head.cpu(), expected) <= 1e-3


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("num_tokens", "d", "kind"),
    [
        (1, 384, "rows"),
        (2, 128, "first"),
        (17, 128, "summed"),
        (17, 128, "rows"),
        (21, 128, "first"),
        (21, 256, "rows"),
    ],
)
def test_streams_kernels_equal_their_references(
    num_tokens: int,
    d: int,
    kind: str,
    kernel_device: torch.device,
    kernel_target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _run_kernels_everywhere(monkeypatch, kernel_target)
    # in tiles, and by a product of matrices
    monkeypatch.setattr(mix_streams, "FEW_TOKENS", 2)
    monkeypatch.setattr(mix_streams, "MANY_TOKENS", 20)
    case = StreamCase(num_tokens, d, kernel_device)
    _check_reading(case, kind)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["first", "summed", "rows"])
@pytest.mark.parametrize(
    ("num_tokens", "d"), [(1, 4096), (8, 4096), (64, 4096), (1, 7168), (300, 7168), (2048, 4096)]
)
def test_streams_kernels_equal_their_references_at_real_shapes(
    num_tokens: int, d: int, kind: str
) -> None:
    _check_reading(StreamCase(num_tokens, d, torch.device("cuda", 0)), kind)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64])
def test_captured_reads_replay_the_eager_ones_bit_for_bit(num_tokens: int) -> None:
    case = StreamCase(num_tokens, 4096, torch.device("cuda", 0))

    def run() -> tuple[Tensor, Tensor, Tensor]:
        streams = case.streams("rows")
        x, mix = hc_read(streams, case.connection, case.weight, EPS, quantizes=False)
        assert isinstance(x, Tensor)
        return x, mix.comb, streams.values

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    # other streams in the same buffer
    case.values.copy_(case.values.flip(2))
    eager = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
