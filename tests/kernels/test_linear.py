"""Linear layers over FP8 codes: the kernels against their definition."""

import pytest
import torch
from torch import Tensor

from scission.kernels.linear import (
    QuantizedRows,
    Scaling,
    SplitSums,
    block_fp8,
    decode_blocks,
    linear_bf16,
    linear_block_fp8,
    linear_grouped,
    linear_grouped_parts,
    quantize_input,
    quantize_rows,
    quantize_sums,
    reference,
    round_trip_rows,
    split_sums,
    stream_bf16,
)
from scission.kernels.quant import dequantize_block_fp8, quantize_block_fp8, ue8m0_to_float
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
    (2, 64, 1408),
    (40, 128, 1280),
]
REAL = [
    (1, 4096, 4096),
    (7, 1536, 4096),
    (32, 32768, 1024),
    (63, 4096, 2048),
    (129, 4096, 4096),
    # the library takes rows in fours
    (1001, 6144, 4096),
    (8192, 4096, 1280),
]


def _case(rows: int, outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator) * 3
    w = torch.randn(outputs, inputs, generator=generator) * 0.1
    # scales that differ from block to block
    w *= torch.exp2(torch.arange(outputs).unsqueeze(1) // 128 % 5)
    codes, scales = quantize_block_fp8(w.to(device))
    return x.to(device, torch.bfloat16), codes, ue8m0_to_float(scales)


def _static_scale(scaling: Scaling | None, device: torch.device) -> Tensor | None:
    # the largest inputs saturate
    return torch.tensor(0.013, device=device) if scaling == "static" else None


def _run(
    x: Tensor, codes: Tensor, scales: Tensor, target: Target, scaling: Scaling | None
) -> Tensor:
    if scaling is None:
        return block_fp8.linear_block_fp8(x, None, codes, scales, target)
    static_scale = _static_scale(scaling, x.device)
    x_codes, x_scales = quantize_input.quantize_input(x, target, scaling, static_scale)
    return block_fp8.linear_block_fp8(x_codes, x_scales, codes, scales, target)


def _expected(x: Tensor, codes: Tensor, scales: Tensor, scaling: Scaling | None) -> Tensor:
    if scaling is None:
        return reference.linear_block_fp8(x, codes, scales, x.dtype)
    rounded = round_trip_rows(x.float(), scaling, _static_scale(scaling, x.device))
    return reference.linear_block_fp8(rounded, codes, scales, x.dtype)


SCALINGS = pytest.mark.parametrize(
    "scaling", [None, "ue8m0", "dynamic", "static"], ids=lambda scaling: scaling or "unrounded"
)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SMALL, ids=str)
@SCALINGS
def test_linear_equals_its_reference(
    shape: tuple[int, int, int],
    scaling: Scaling | None,
    kernel_device: torch.device,
    kernel_target: Target,
) -> None:
    x, codes, scales = _case(*shape, kernel_device)
    actual = _run(x, codes, scales, kernel_target, scaling)
    assert relative_error(actual, _expected(x, codes, scales, scaling)) <= TOLERANCE


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scaling", ["ue8m0", "dynamic", "static"])
def test_codes_and_scales_of_inputs_equal_the_references(
    scaling: Scaling, kernel_device: torch.device, kernel_target: Target
) -> None:
    x = torch.randn(5, 1152, device=kernel_device) * torch.logspace(
        -6, 6, 1152, device=kernel_device
    )
    x[0] = 0
    x[1, 0] = 448
    x[2, 5] = 449
    x[3, :128] *= 1e-12
    x = x.to(torch.bfloat16)
    static_scale = _static_scale(scaling, kernel_device)
    codes, scales = quantize_input.quantize_input(x, kernel_target, scaling, static_scale)
    expected_codes, expected_scales = reference.quantize_input(x, scaling, static_scale)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.float(), expected_codes.float())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scaling", ["ue8m0", "dynamic", "static"])
@pytest.mark.parametrize("split", [2, 5])
def test_parts_of_sums_are_quantised_as_their_sums(
    scaling: Scaling, split: int, kernel_device: torch.device, kernel_target: Target
) -> None:
    parts = torch.randn(split, 3, 640, device=kernel_device)
    # whatever order they are added in
    parts = (parts * 256).round() / 256
    static_scale = _static_scale(scaling, kernel_device)
    rows = quantize_sums.quantize_sums(SplitSums(parts), scaling, static_scale, kernel_target)
    sums = parts.sum(0).to(torch.bfloat16)
    codes, scales = reference.quantize_input(sums, scaling, static_scale)
    assert rows.values is None
    assert torch.equal(rows.scales, scales)
    assert torch.equal(rows.codes.float(), codes.float())


@pytest.mark.parametrize("scaling", ["ue8m0", "dynamic", "static"])
@pytest.mark.parametrize("width", [256, 200])
def test_codes_and_scales_stand_for_the_round_trip(scaling: Scaling, width: int) -> None:
    x = torch.randn(7, width) * torch.logspace(-4, 4, width)
    static_scale = _static_scale(scaling, x.device)
    rows = quantize_rows(x, scaling, static_scale)
    assert rows.values is x and rows.is_static == (scaling == "static")
    assert torch.equal(rows.dequantize(x.dtype), round_trip_rows(x, scaling, static_scale))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_groups_have_inputs_of_their_own(
    rows: int, kernel_device: torch.device, kernel_target: Target
) -> None:
    x, codes, scales = _case(rows * 3, 3 * 128, 256, kernel_device)
    # groups of a token need not lie side by side
    x = x.view(3, rows, 256).transpose(0, 1)
    actual = block_fp8.linear_grouped(x, codes, scales, kernel_target)
    expected = reference.linear_grouped(x, codes, scales)
    assert actual.shape == (rows, 3, 128)
    assert relative_error(actual, expected) <= TOLERANCE
    for group in range(3):
        part = slice(group * 128, (group + 1) * 128)
        one = reference.linear_block_fp8(
            x[:, group], codes[part], scales[group : group + 1], x.dtype
        )
        assert torch.equal(linear_grouped(x.cpu(), codes.cpu(), scales.cpu())[:, group], one.cpu())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(1, 64, 256), (5, 130, 1280), (32, 64, 640)], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_weights_equal_the_reference(
    shape: tuple[int, int, int],
    out_dtype: torch.dtype,
    kernel_device: torch.device,
    kernel_target: Target,
) -> None:
    rows, outputs, inputs = shape
    x = torch.randn(rows, inputs, device=kernel_device).to(torch.bfloat16)
    w = torch.randn(outputs, inputs, device=kernel_device).to(torch.bfloat16)
    actual = stream_bf16.stream_bf16(x, w, out_dtype, kernel_target)
    expected = reference.linear_bf16(x, w, out_dtype)
    assert actual.dtype == out_dtype
    # float32 sums in another order; bfloat16 rounds them
    tolerance = 1e-5 if out_dtype == torch.float32 else TOLERANCE
    assert relative_error(actual, expected) <= tolerance


@pytest.mark.parametrize("num_tiles", [1, 24, 64, 96, 384])
@pytest.mark.parametrize("num_blocks", [1, 8, 32, 96])
def test_splits_leave_no_program_without_a_block(num_tiles: int, num_blocks: int) -> None:
    split = split_sums.pick_split(num_tiles, num_blocks, 192)
    blocks_per_split = -(-num_blocks // split)
    assert 1 <= split <= split_sums.MAX_SPLIT
    assert (split - 1) * blocks_per_split < num_blocks


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("outputs", [128, 200])
def test_decoded_blocks_equal_the_reference(
    outputs: int, kernel_device: torch.device, kernel_target: Target
) -> None:
    _, codes, scales = _case(1, outputs, 384, kernel_device)
    expected = dequantize_block_fp8(codes, scales).to(torch.bfloat16)
    assert torch.equal(decode_blocks.decode_blocks(codes, scales), expected)


def test_rows_of_a_wider_tensor_are_read_where_they_lie(
    kernel_device: torch.device, kernel_target: Target
) -> None:
    x, codes, scales = _case(6, 64, 256, kernel_device)
    wide = torch.full((6, 400), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 128:384] = x
    for scaling in (None, "ue8m0"):
        actual = _run(wide[:, 128:384], codes, scales, kernel_target, scaling)
        assert torch.equal(actual, _run(x, codes, scales, kernel_target, scaling))


def test_no_rows_and_no_outputs_pass(kernel_device: torch.device, kernel_target: Target) -> None:
    x, codes, scales = _case(2, 64, 128, kernel_device)
    assert _run(x[:0], codes, scales, kernel_target, "ue8m0").shape == (0, 64)
    assert _run(x, codes[:0], scales[:0], kernel_target, None).shape == (2, 0)


@SCALINGS
def test_the_cpu_runs_the_reference(scaling: Scaling | None) -> None:
    x, codes, scales = _case(3, 130, 256, torch.device("cpu"))
    x = x.float()
    static_scale = _static_scale(scaling, x.device)
    rows = x if scaling is None else quantize_rows(x, scaling, static_scale)
    expected = _expected(x, codes, scales, scaling)
    assert torch.equal(linear_block_fp8(rows, codes, scales), expected)


def test_quantised_rows_without_values_give_bfloat16() -> None:
    x, codes, scales = _case(3, 130, 256, torch.device("cpu"))
    rows = quantize_rows(x, "ue8m0")
    bare = QuantizedRows(None, rows.codes, rows.scales)
    assert torch.equal(linear_block_fp8(bare, codes, scales), linear_block_fp8(rows, codes, scales))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_a_bfloat16_matrix_is_summed_in_float32(out_dtype: torch.dtype) -> None:
    x = torch.randn(3, 200).to(torch.bfloat16)
    w = torch.randn(40, 200).to(torch.bfloat16)
    expected = (x.float() @ w.float().mT).to(out_dtype)
    torch.testing.assert_close(linear_bf16(x, w, out_dtype), expected)


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
@SCALINGS
def test_linear_equals_its_reference_at_real_shapes(
    shape: tuple[int, int, int], scaling: Scaling | None
) -> None:
    x, codes, scales = _case(*shape, torch.device("cuda", 0))
    static_scale = _static_scale(scaling, x.device)
    rows = x if scaling is None else quantize_rows(x, scaling, static_scale)
    first = linear_block_fp8(rows, codes, scales)
    assert relative_error(first, _expected(x, codes, scales, scaling)) <= TOLERANCE
    assert torch.equal(linear_block_fp8(rows, codes, scales), first)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [1, 9, 64, 100, 1000])
def test_groups_equal_their_reference_at_real_shapes(rows: int) -> None:
    x, codes, scales = _case(rows * 8, 8 * 1024, 4096, torch.device("cuda", 0))
    x = x.view(rows, 8, 4096)
    first = linear_grouped(x, codes, scales)
    assert relative_error(first, reference.linear_grouped(x, codes, scales)) <= TOLERANCE
    assert torch.equal(linear_grouped(x, codes, scales), first)
    whole = quantize_rows(first.flatten(1), "ue8m0")
    parts = quantize_rows(linear_grouped_parts(x, codes, scales), "ue8m0")
    assert torch.equal(parts.codes.float(), whole.codes.float())
    assert torch.equal(parts.scales, whole.scales)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(1, 151936, 4096), (30, 2688, 4096), (200, 2560, 4096)], ids=str)
def test_bfloat16_weights_equal_their_reference_at_real_shapes(shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x, w = (
        torch.randn(n, inputs, generator=generator, device="cuda", dtype=torch.bfloat16)
        for n in (rows, outputs)
    )
    logits = linear_bf16(x, w, torch.float32)
    assert relative_error(logits, reference.linear_bf16(x, w, torch.float32)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40, 200])
def test_captured_layers_replay_the_eager_ones_bit_for_bit(rows: int) -> None:
    """Each launch depends on the one before, among them one of no kernel of ours."""
    device = torch.device("cuda", 0)
    assert target_of(device) is not None
    x, codes, scales = _case(rows, 4096, 4096, device)
    kept = torch.zeros_like(x)

    def step() -> Tensor:
        kept.copy_(x)
        y = linear_block_fp8(quantize_rows(kept, "dynamic"), codes, scales)
        return linear_block_fp8(quantize_rows(y, "ue8m0"), codes, scales)

    eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        kept.zero_()
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)
