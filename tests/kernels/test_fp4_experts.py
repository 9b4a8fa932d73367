"""Experts in codes: layout, choice, grouping and products against their definitions."""

import pytest
import torch
from torch import Tensor

from scission.kernels.gated_experts.reference import route_sigmoid
from scission.kernels.linear import quantize_rows
from scission.kernels.linear.rows import QuantizedRows
from scission.kernels.moe import ExpertOutputs, ExpertWeights, grouped_experts, reference
from scission.kernels.moe.choose_experts import Routing, choose_experts, num_counters
from scission.kernels.moe.coded import CodedExperts, SharedExpert
from scission.kernels.moe.fp4_layout import (
    Fp4Experts,
    can_pack,
    pack_fp4_experts,
    row_order,
)
from scission.kernels.moe.group_rows import group_rows
from scission.kernels.moe.grouped_experts import Activation, Fp8Experts
from scission.kernels.moe.row_groups import RowGroups
from scission.kernels.moe.sum_rows import sum_rows
from scission.kernels.quant import (
    dequantize_block_fp8,
    dequantize_group_fp4,
    quantize_block_fp8,
    quantize_group_fp4,
    round_trip_fp8,
    scale_values,
)
from scission.kernels.target import Target, target_of
from scission.kernels.testing import relative_error

# the reference's products round to bf16 (1.7e-3); a last bit that differs there moves few of the
# inner values' e4m3 codes to their neighbours, 1/16 away
TOLERANCE = 5e-3
LIMIT = 10.0
VOCAB = 50

# tokens, top_k, experts, dim, inner
SMALL = [(1, 2, 4, 256, 256), (5, 3, 7, 128, 256), (18, 2, 3, 128, 128)]
MANY = [(5, 3, 7, 256, 128), (40, 2, 2, 128, 256), (70, 2, 2, 128, 128)]
REAL = [(1, 6, 256, 4096, 2048), (8, 6, 256, 4096, 2048), (64, 6, 256, 4096, 2048)]


class Case:
    """Random experts, a router and tokens; the definitions run on decoded values."""

    def __init__(
        self, shape: tuple[int, int, int, int, int], device: torch.device, seed: int = 0
    ) -> None:
        num_tokens, top_k, num_experts, dim, inner = shape
        generator = torch.Generator(device).manual_seed(seed)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        def matrix(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
            parts = [
                quantize_group_fp4(random(outputs, inputs) * inputs**-0.5)
                for _ in range(num_experts)
            ]
            codes, scales = zip(*parts, strict=True)
            return torch.stack(codes), torch.stack(scales)

        self.top_k = top_k
        self.x = random(num_tokens, dim).to(torch.bfloat16)
        self.gate = (random(num_experts, dim) * dim**-0.5).to(torch.bfloat16)
        self.bias = random(num_experts) * 0.1
        self.table = torch.stack(
            [
                torch.randperm(num_experts, generator=generator, device=device)[:top_k]
                for _ in range(VOCAB)
            ]
        )
        self.token_ids = torch.randint(0, VOCAB, (num_tokens,), generator=generator, device=device)
        self.parts = [matrix(inner, dim), matrix(inner, dim), matrix(dim, inner)]
        self.shared = [
            quantize_block_fp8(random(outputs, inputs) * inputs**-0.5)
            for outputs, inputs in ((inner, dim), (inner, dim), (dim, inner))
        ]

    def routing(self, *, is_hashed: bool = False, first: int = 0, last: int = -1) -> Routing:
        return Routing(
            self.gate,
            None if is_hashed else self.bias,
            self.table if is_hashed else None,
            self.top_k,
            1.5,
            "sqrtsoftplus",
            first,
            (self.gate.shape[0] if last < 0 else last) - first,
        )

    def chosen(self, *, is_hashed: bool = False) -> tuple[Tensor, Tensor]:
        logits = torch.mm(self.x.float(), self.gate.float().mT)
        if is_hashed:
            experts = self.table[self.token_ids]
            return experts, reference.gate(logits, experts, 1.5)
        return reference.route(logits, self.bias, self.top_k, 1.5)

    def experts(self, target: Target, *, has_shared: bool, is_hashed: bool) -> CodedExperts:
        w1, w3, w2 = self.parts
        shared = None
        if has_shared:
            s1, s3, s2 = (
                (codes[None], scale_values(scales)[None]) for codes, scales in self.shared
            )
            both = (torch.cat(parts, dim=1) for parts in zip(s1, s3, strict=True))
            shared = SharedExpert(Fp8Experts(*both), Fp8Experts(*s2), LIMIT)
        return CodedExperts(
            self.routing(is_hashed=is_hashed),
            pack_fp4_experts([w1, w3]),
            pack_fp4_experts([w2]),
            Activation(LIMIT, True, "ue8m0"),
            shared,
            target,
        )

    def expected(self, *, has_shared: bool, is_hashed: bool) -> Tensor:
        # bf16 holds every value
        w1, w3, w2 = (dequantize_group_fp4(*part).to(torch.bfloat16) for part in self.parts)
        if has_shared:
            values = (dequantize_block_fp8(*part).to(torch.bfloat16) for part in self.shared)
            w1, w3, w2 = (
                torch.cat([w, s[None]]) for w, s in zip((w1, w3, w2), values, strict=True)
            )
        values_of = ExpertWeights(w1, w3, w2)
        experts, weights = self.chosen(is_hashed=is_hashed)
        return reference.run_experts(
            round_trip_fp8(self.x, 128),
            experts,
            weights,
            values_of.w13,
            values_of.w2,
            LIMIT,
            128,
            int(has_shared),
        )

    def rows(self) -> QuantizedRows:
        return quantize_rows(self.x, "ue8m0")


def _sum(outputs: ExpertOutputs) -> Tensor:
    return sum_rows(outputs.rows, outputs.row_of, None, torch.float32)


def _unpack(packed: Fp4Experts) -> Tensor:
    """[experts, out, in] float32, from the layout's own words."""
    steps = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    num_experts, row_tiles, num_blocks = packed.codes.shape[:3]
    words = packed.codes.view(num_experts, row_tiles, num_blocks, 128, 4, 4, 4).long()
    words = sum(words[..., i] << 8 * i for i in range(4))  # [.., row, group, word]
    magnitudes = torch.stack([words >> 4 * n & 7 for n in range(8)], dim=-1)
    places = [8 * n + 7 if n < 4 else 8 * (n - 4) + 3 for n in range(8)]
    signs = torch.stack([words >> place & 1 for place in places], dim=-1)
    values = (steps[magnitudes] * (1 - 2 * signs)).flatten(-2)  # [.., row, group, 32]
    scales = packed.scales.view(num_experts, num_blocks, row_tiles, 128).transpose(1, 2)
    shares = torch.stack([scales >> 8 + 4 * group & 15 for group in range(4)], dim=-1)
    exponents = (scales & 0xFF).unsqueeze(-1) - 127 + shares - 11
    tiles = (values * torch.exp2(exponents.float()).unsqueeze(-1)).flatten(-2)
    rows = torch.empty_like(tiles)
    rows[..., row_order(), :] = tiles
    return rows.transpose(2, 3).reshape(num_experts, row_tiles * 128, num_blocks * 128)


def test_packed_experts_hold_the_same_values() -> None:
    case = Case((1, 1, 3, 256, 128), torch.device("cpu"))
    w1, w3, w2 = (dequantize_group_fp4(*part) for part in case.parts)
    parts = case.parts
    assert torch.equal(_unpack(pack_fp4_experts([parts[0], parts[1]])), torch.cat([w1, w3], 1))
    assert torch.equal(_unpack(pack_fp4_experts([parts[2]])), w2)


def test_packed_groups_far_below_their_neighbours_are_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(128, 128, generator=generator)
    values[:, 32:64] *= 2.0**-11
    values[:, 64:96] *= 2.0**-14
    codes, scales = quantize_group_fp4(values)
    exact = dequantize_group_fp4(codes, scales)
    packed = _unpack(pack_fp4_experts([(codes[None], scales[None])]))[0]
    assert torch.equal(packed[:, :32], exact[:, :32])
    error = (packed - exact).abs().amax(1)
    assert (error <= exact.abs().amax(1) * 2.0**-12).all()


def test_only_whole_tiles_are_packed() -> None:
    assert can_pack(128, 256) and not can_pack(64, 128) and not can_pack(128, 192)


def _check_groups(groups: RowGroups, experts: Tensor, weights: Tensor) -> None:
    """Every pair has one row, in blocks of one expert, in order of expert."""
    num_tokens, k = experts.shape
    row_of = groups.row_of[:, :k]
    assert ((row_of >= 0) == (experts >= 0)).all()
    rows = row_of[row_of >= 0]
    assert sorted(rows.tolist()) == list(range(len(rows)))
    tokens = torch.arange(num_tokens, device=experts.device)[:, None].expand_as(experts)
    assert torch.equal(groups.row_tokens[rows.long()].long(), tokens[row_of >= 0])
    assert torch.allclose(groups.row_weights[rows.long()], weights[row_of >= 0], rtol=1e-5)
    expert_of = torch.empty(len(rows), dtype=torch.int64, device=experts.device)
    expert_of[rows.long()] = experts[row_of >= 0].long()
    assert (expert_of.diff() >= 0).all()
    seen: list[int] = []
    for expert, (first, end) in zip(
        groups.block_experts.tolist(), groups.block_rows.tolist(), strict=True
    ):
        if expert >= 0:
            assert 0 < end - first <= groups.block_m
            assert (expert_of[first:end] == expert).all()
            seen += range(first, end)
    assert seen == list(range(len(rows)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("num_tokens", [1, 9, 100])
def test_groups_hold_every_pair_once_in_blocks_of_one_expert(
    num_tokens: int, block_m: int, kernel_device: torch.device
) -> None:
    experts = torch.randint(-1, 6, (num_tokens, 3), device=kernel_device)
    weights = torch.rand(num_tokens, 3, device=kernel_device)
    groups = group_rows(experts, weights, 5, block_m)
    _check_groups(groups, torch.where(experts < 5, experts, -1), weights)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("is_hashed", [False, True])
@pytest.mark.parametrize("shape", [(1, 6, 40, 256, 128), (19, 3, 7, 128, 128)], ids=str)
def test_few_tokens_are_routed_and_grouped_in_one_launch(
    shape: tuple[int, int, int, int, int],
    is_hashed: bool,
    kernel_device: torch.device,
    kernel_target: Target,
) -> None:
    case = Case(shape, kernel_device)
    counters = torch.zeros(num_counters(), dtype=torch.int32, device=kernel_device)
    positions = torch.arange(shape[0], device=kernel_device)
    if shape[0] > 1:
        positions[2] = -1
    first, last = (0, shape[2]) if is_hashed else (1, shape[2] - 1)
    groups = choose_experts(
        case.x,
        case.routing(is_hashed=is_hashed, first=first, last=last),
        case.token_ids,
        positions,
        16,
        2,
        counters,
        kernel_target,
    )
    experts, weights = case.chosen(is_hashed=is_hashed)
    if not is_hashed:
        # the definition leaves the order open: here it is by score
        scores = (case.x.float() @ case.gate.float().mT).cpu()
        scores = torch.nn.functional.softplus(scores).sqrt() + case.bias.cpu()
        order = scores.gather(1, experts.cpu()).argsort(1, descending=True).to(kernel_device)
        experts, weights = experts.gather(1, order), weights.gather(1, order)
    is_here = (experts >= first) & (experts < last) & (positions >= 0)[:, None]
    _check_groups(groups, torch.where(is_here, experts - first, -1), weights)
    num_pairs = experts.numel()
    shared = torch.arange(shape[0], device=kernel_device)[:, None] + num_pairs
    assert torch.equal(
        groups.row_of[:, shape[1] :].long(), torch.cat([shared, shared + shape[0]], dim=1)
    )
    assert not counters.any()


def test_of_equal_scores_the_lowest_experts_are_chosen(
    kernel_device: torch.device, kernel_target: Target
) -> None:
    gate = torch.zeros(12, 128, dtype=torch.bfloat16, device=kernel_device)
    bias = torch.zeros(12, device=kernel_device)
    bias[7] = 1.0
    counters = torch.zeros(num_counters(), dtype=torch.int32, device=kernel_device)
    ids = torch.zeros(2, dtype=torch.int64, device=kernel_device)
    x = torch.ones(2, 128, dtype=torch.bfloat16, device=kernel_device)
    routing = Routing(gate, bias, None, 3, 1.0, "sqrtsoftplus", 0, 12)
    groups = choose_experts(x, routing, ids, None, 16, 0, counters, kernel_target)
    assert groups.block_experts.tolist()[:3] == [0, 1, 7]


def test_an_expert_that_a_table_names_twice_has_both_weights(
    kernel_device: torch.device, kernel_target: Target
) -> None:
    case = Case((3, 3, 5, 128, 128), kernel_device)
    case.table[:, 2] = case.table[:, 0]
    counters = torch.zeros(num_counters(), dtype=torch.int32, device=kernel_device)
    groups = choose_experts(
        case.x, case.routing(is_hashed=True), case.token_ids, None, 16, 0, counters, kernel_target
    )
    experts, weights = case.chosen(is_hashed=True)
    weights[:, 0] += weights[:, 2]
    experts = experts.clone()
    experts[:, 2] = -1
    _check_groups(groups, experts, weights)


def test_sigmoid_scores_choose_as_their_definition_does(
    kernel_device: torch.device, kernel_target: Target
) -> None:
    case = Case((3, 3, 9, 128, 128), kernel_device)
    gate = torch.randn(9, 128, device=kernel_device)
    counters = torch.zeros(num_counters(), dtype=torch.int32, device=kernel_device)
    routing = Routing(gate, case.bias, None, 3, 3.0, "sigmoid", 0, 9)
    groups = choose_experts(case.x, routing, case.token_ids, None, 16, 0, counters, kernel_target)
    experts, weights = route_sigmoid(case.x.float() @ gate.mT, case.bias, 3, 3.0)
    _check_groups(groups, experts, weights)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("has_shared", [True, False])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_few_rows_equal_their_reference(
    shape: tuple[int, int, int, int, int],
    has_shared: bool,
    kernel_device: torch.device,
    kernel_target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # large shapes divide the inputs
    split = 2 if shape[3] == 256 else 1
    monkeypatch.setattr(grouped_experts, "pick_split", lambda programs, blocks: split)
    case = Case(shape, kernel_device)
    kind = {"has_shared": has_shared, "is_hashed": shape[0] == 5}
    experts = case.experts(kernel_target, **kind)
    outputs = experts.run_few(case.rows(), case.token_ids, None)
    assert relative_error(_sum(outputs), case.expected(**kind)) <= TOLERANCE
    assert not experts._counters.any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", MANY, ids=str)
def test_many_rows_equal_their_reference(
    shape: tuple[int, int, int, int, int], kernel_device: torch.device, kernel_target: Target
) -> None:
    case = Case(shape, kernel_device)
    kind = {"has_shared": False, "is_hashed": False}
    experts = case.experts(kernel_target, **kind)
    actual = _sum(experts.run_many(case.rows(), case.token_ids))
    assert relative_error(actual, case.expected(**kind)) <= TOLERANCE


def test_no_tokens_pass(kernel_device: torch.device, kernel_target: Target) -> None:
    case = Case((1, 2, 4, 128, 128), kernel_device)
    experts = case.experts(kernel_target, has_shared=False, is_hashed=False)
    rows = quantize_rows(case.x[:0], "ue8m0")
    assert _sum(experts.run_many(rows, case.token_ids[:0])).shape == (0, 128)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_experts_equal_their_reference_at_real_shapes(
    shape: tuple[int, int, int, int, int],
) -> None:
    device = torch.device("cuda", 0)
    target = target_of(device)
    assert target is not None
    case = Case(shape, device)
    kind = {"has_shared": True, "is_hashed": False}
    experts = case.experts(target, **kind)
    first = _sum(experts.run_few(case.rows(), case.token_ids, None))
    assert relative_error(first, case.expected(**kind)) <= TOLERANCE
    assert torch.equal(_sum(experts.run_few(case.rows(), case.token_ids, None)), first)


@pytest.mark.gpu
def test_captured_experts_replay_the_eager_ones_bit_for_bit() -> None:
    device = torch.device("cuda", 0)
    target = target_of(device)
    assert target is not None
    case = Case((4, 6, 64, 1024, 512), device)
    experts = case.experts(target, has_shared=True, is_hashed=False)

    def run() -> Tensor:
        return _sum(experts.run_few(case.rows(), case.token_ids, None))

    eager = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    # other tokens in the same buffer
    case.x.copy_(case.x.flip(0))
    graph.replay()
    assert torch.equal(captured, eager.flip(0))
