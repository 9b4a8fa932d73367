"""Experts in FP4 codes: layout, grouping and products against their definitions."""

import pytest
import torch
from torch import Tensor

from scission.kernels.moe import ExpertWeights, reference
from scission.kernels.moe.fp4_layout import Fp4Experts, pack_fp4_experts
from scission.kernels.moe.group_rows import group_rows
from scission.kernels.moe.grouped_fp4 import run_fp4_experts
from scission.kernels.quant import dequantize_group_fp4, quantize_group_fp4, round_trip_fp8
from scission.kernels.target import Target, target_of
from scission.kernels.testing import relative_error

# the reference's products round to bf16 (1.7e-3); a last bit that differs there moves few of the
# inner values' e4m3 codes to their neighbours, 1/16 away
TOLERANCE = 5e-3
LIMIT = 10.0

# tokens, top_k, experts, dim, inner
SMALL = [(1, 2, 4, 128, 128), (5, 3, 7, 256, 128), (40, 2, 2, 128, 256), (70, 2, 2, 128, 128)]
REAL = [(1, 6, 256, 4096, 2048), (8, 6, 256, 4096, 2048), (700, 6, 64, 4096, 2048)]


class Case:
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

        self.x = random(num_tokens, dim).to(torch.bfloat16)
        self.experts = torch.stack(
            [
                torch.randperm(num_experts, generator=generator, device=device)[:top_k]
                for _ in range(num_tokens)
            ]
        )
        self.weights = random(num_tokens, top_k).abs() + 0.1
        w1, w3, w2 = matrix(inner, dim), matrix(inner, dim), matrix(dim, inner)
        self.parts = (w1, w3, w2)
        self.w13 = pack_fp4_experts([w1, w3])
        self.w2 = pack_fp4_experts([w2])

    def expected(self) -> Tensor:
        # bf16 holds every value
        values = ExpertWeights(
            *(dequantize_group_fp4(*part).to(torch.bfloat16) for part in self.parts)
        )
        x = round_trip_fp8(self.x, 128)
        return reference.run_experts(
            x, self.experts, self.weights, values.w13, values.w2, LIMIT, 128, 0
        )

    def run(self, target: Target) -> Tensor:
        return run_fp4_experts(self.x, self.experts, self.weights, self.w13, self.w2, LIMIT, target)


def _unpack(packed: Fp4Experts) -> Tensor:
    """[experts, out, in] float32, from the layout's own words."""
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    nibbles = torch.cat([packed.codes & 0x0F, packed.codes >> 4], dim=-1)
    tiles = values[nibbles.long()]  # [experts, row tile, column tile, row, column]
    whole = tiles.transpose(2, 3).reshape(packed.num_experts, packed.out_features, -1)
    words = packed.scales.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    groups = words.view(torch.uint8)
    return whole * torch.exp2(groups.float() - 127).repeat_interleave(32, dim=-1)


def test_packed_experts_hold_the_same_values() -> None:
    case = Case((1, 1, 3, 256, 128), torch.device("cpu"))
    w1, w3, w2 = (dequantize_group_fp4(*part) for part in case.parts)
    assert torch.equal(_unpack(case.w13), torch.cat([w1, w3], dim=1))
    assert torch.equal(_unpack(case.w2), w2)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("num_tokens", [1, 9, 100])
def test_groups_hold_every_pair_once_in_blocks_of_one_expert(
    num_tokens: int, block_m: int, kernel_device: torch.device
) -> None:
    experts = torch.randint(0, 5, (num_tokens, 3), device=kernel_device)
    groups = group_rows(experts, 8, block_m)
    flat = experts.flatten()
    assert sorted(groups.pairs.tolist()) == list(range(num_tokens * 3))
    assert groups.pairs[groups.rows.long()].tolist() == list(range(num_tokens * 3))
    seen: list[int] = []
    for expert, (first, end) in zip(
        groups.block_experts.tolist(), groups.block_rows.tolist(), strict=True
    ):
        if expert < 0:
            continue
        assert 0 < end - first <= block_m
        assert (flat[groups.pairs[first:end]] == expert).all()
        seen += range(first, end)
    assert seen == list(range(num_tokens * 3))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_fp4_experts_equal_their_reference(
    shape: tuple[int, int, int, int, int], kernel_device: torch.device, kernel_target: Target
) -> None:
    case = Case(shape, kernel_device)
    assert relative_error(case.run(kernel_target), case.expected()) <= TOLERANCE


def test_no_tokens_pass(kernel_device: torch.device, kernel_target: Target) -> None:
    case = Case((1, 2, 4, 128, 128), kernel_device)
    case.x, case.experts, case.weights = case.x[:0], case.experts[:0], case.weights[:0]
    assert case.run(kernel_target).shape == (0, 128)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_fp4_experts_equal_their_reference_at_real_shapes(
    shape: tuple[int, int, int, int, int],
) -> None:
    device = torch.device("cuda", 0)
    target = target_of(device)
    assert target is not None
    case = Case(shape, device)
    first = case.run(target)
    assert relative_error(first, case.expected()) <= TOLERANCE
    assert torch.equal(case.run(target), first)


@pytest.mark.gpu
def test_captured_experts_replay_the_eager_ones_bit_for_bit() -> None:
    device = torch.device("cuda", 0)
    target = target_of(device)
    assert target is not None
    case = Case((4, 6, 64, 1024, 512), device)
    eager = case.run(target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(target)
    # other experts in the same buffers
    case.experts.copy_(case.experts.flip(0))
    case.x.copy_(case.x.flip(0))
    case.weights.copy_(case.weights.flip(0))
    graph.replay()
    assert torch.equal(captured, eager.flip(0))
