"""Linear layers over FP8 codes: the kernels against their definition."""

import pytest
import torch
from torch import Tensor

from scission.kernels.linear import block_fp8, linear_block_fp8, quantize_input, reference
from scission.kernels.quant import quantize_block_fp8, ue8m0_to_float
from scission.kernels.target import Target, target_of
from scission.kernels.testing import relative_error

# the output's bf16 rounds by 2 ** -9 at most, about 1.7e-3 over a tensor; Hopper's FP8 dot keeps
# 14 bits of a block's sum (1.2e-4)
TOLERANCE = 2.5e-3

# rows, out, in
SMALL = [
    (1, 64, 128),
    (3, 130, 256),
    (17, 192, 640),
    (33, 64, 384),
    (65, 200, 128),
    (130, 136, 256),
]
REAL = [
    (1, 4096, 4096),
    (7, 1536, 4096),
    (32, 32768, 1024),
    (63, 4096, 2048),
    (129, 4096, 4096),
    (1000, 6144, 4096),
]


def _case(rows: int, outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator) * 3
    w = torch.randn(outputs, inputs, generator=generator) * 0.1
    # scales that differ from block to block
    w *= torch.exp2(torch.arange(outputs).unsqueeze(1) // 128 % 5)
    codes, scales = quantize_block_fp8(w.to(device))
    return x.to(device, torch.bfloat16), codes, ue8m0_to_float(scales)


def _run(x: Tensor, codes: Tensor, scales: Tensor, target: Target, rounds: bool) -> Tensor:
    if not rounds:
        return block_fp8.linear_block_fp8(x, None, codes, scales, target)
    x_codes, x_scales = quantize_input.quantize_input(x, target)
    return block_fp8.linear_block_fp8(x_codes, x_scales, codes, scales, target)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("rounds", [True, False], ids=["rounds", "keeps"])
def test_linear_equals_its_reference(
    shape: tuple[int, int, int],
    rounds: bool,
    kernel_device: torch.device,
    kernel_target: Target,
) -> None:
    x, codes, scales = _case(*shape, kernel_device)
    expected = reference.linear_block_fp8(x, codes, scales, rounds)
    actual = _run(x, codes, scales, kernel_target, rounds)
    assert relative_error(actual, expected) <= TOLERANCE


@pytest.mark.usefixtures("poisoned")
def test_codes_and_scales_of_inputs_equal_the_references(
    kernel_device: torch.device, kernel_target: Target
) -> None:
    x = torch.randn(5, 1152, device=kernel_device) * torch.logspace(
        -6, 6, 1152, device=kernel_device
    )
    x[0] = 0
    x[1, 0] = 448
    x[2, 5] = 449
    x = x.to(torch.bfloat16)
    codes, scales = quantize_input.quantize_input(x, kernel_target)
    expected_codes, expected_scales = reference.quantize_input(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.float(), expected_codes.float())


def test_rows_of_a_wider_tensor_are_read_where_they_lie(
    kernel_device: torch.device, kernel_target: Target
) -> None:
    x, codes, scales = _case(6, 64, 256, kernel_device)
    wide = torch.full((6, 400), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 128:384] = x
    for rounds in (True, False):
        actual = _run(wide[:, 128:384], codes, scales, kernel_target, rounds)
        assert torch.equal(actual, _run(x, codes, scales, kernel_target, rounds))


def test_no_rows_and_no_outputs_pass(kernel_device: torch.device, kernel_target: Target) -> None:
    x, codes, scales = _case(2, 64, 128, kernel_device)
    assert _run(x[:0], codes, scales, kernel_target, True).shape == (0, 64)
    assert _run(x, codes[:0], scales[:0], kernel_target, False).shape == (2, 0)


def test_the_cpu_runs_the_reference() -> None:
    x, codes, scales = _case(3, 130, 256, torch.device("cpu"))
    for rounds in (True, False):
        expected = reference.linear_block_fp8(x, codes, scales, rounds)
        assert torch.equal(linear_block_fp8(x, codes, scales, rounds_input=rounds), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x, c, s: (x[:, :128], c, s), r"\[3, 128\]"),
        (lambda x, c, s: (x, c.float(), s), "float32"),
        (lambda x, c, s: (x, c, s[:1]), r"\[2, 2\]"),
        (lambda x, c, s: (x, c, s.to(torch.bfloat16)), "bfloat16"),
    ],
)
def test_wrong_arguments_are_named(change: object, named: str) -> None:
    assert callable(change)
    with pytest.raises(ValueError, match=named):
        linear_block_fp8(*change(*_case(3, 130, 256, torch.device("cpu"))))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", REAL, ids=str)
@pytest.mark.parametrize("rounds", [True, False], ids=["rounds", "keeps"])
def test_linear_equals_its_reference_at_real_shapes(
    shape: tuple[int, int, int], rounds: bool
) -> None:
    x, codes, scales = _case(*shape, torch.device("cuda", 0))
    expected = reference.linear_block_fp8(x, codes, scales, rounds)
    first = linear_block_fp8(x, codes, scales, rounds_input=rounds)
    assert relative_error(first, expected) <= TOLERANCE
    assert torch.equal(linear_block_fp8(x, codes, scales, rounds_input=rounds), first)


@pytest.mark.gpu
def test_a_captured_linear_replays_the_eager_one_bit_for_bit() -> None:
    device = torch.device("cuda", 0)
    assert target_of(device) is not None
    x, codes, scales = _case(5, 4096, 4096, device)
    eager = linear_block_fp8(x, codes, scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_block_fp8(x, codes, scales)
    graph.replay()
    assert torch.equal(captured, eager)
