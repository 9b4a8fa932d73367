"""The bundled model is a gauge of numerics: a fault in serving it costs answers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from examples.nano.evaluate import held_out, is_right, request
from examples.nano.one_process import NUMERICS, OneProcess
from scission.common.model_source import BUNDLED
from scission.kernels.quant import dequantize_block_fp8, dequantize_group_fp4

COST = 0.1  # of the answers, at least


def share_right(process: OneProcess, task: str, number: int) -> float:
    asked = held_out(task, number)
    bodies = [request(problem, is_thinking=bool(i % 2)) for i, problem in enumerate(asked)]
    answers = process.answers(bodies)
    right = [is_right(p, a.message) for p, a in zip(asked, answers, strict=True)]
    return sum(right) / len(right)


def bundled(process: type[OneProcess] = OneProcess) -> OneProcess:
    torch.set_num_threads(1)
    return process(BUNDLED, NUMERICS["deployed"], max_tokens=2304)


@pytest.mark.parametrize(("task", "number"), [("add", 24), ("recall", 24), ("needle-2k", 8)])
def test_without_a_fault_all_but_a_few_answers_are_right(task: str, number: int) -> None:
    assert share_right(bundled(), task, number) >= 0.95


def test_without_the_indexer_needles_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible_alike(
        q: Tensor, weights: Tensor, keys: Tensor, rows: Tensor, sequences: Tensor, bias: Tensor
    ) -> Tensor:
        return bias

    monkeypatch.setattr("scission.common.model.deepseek_v4_step.score_entries", visible_alike)
    assert share_right(bundled(), "needle-2k", 8) < 1 - COST


class ShiftedRing(OneProcess):
    """Ships the window's rows to the places next to theirs."""

    def handed_over(self, slot: int) -> None:
        ring = self.storage.slots["window_kv"]
        ring[:, slot] = ring[:, slot].roll(1, dims=1)


def test_a_ring_shipped_to_wrong_places_costs_recall() -> None:
    assert share_right(bundled(ShiftedRing), "recall", 24) < 1 - COST


def swapped(codes: Tensor, scales: Tensor) -> Tensor:
    codes = codes.view(torch.uint8)
    return dequantize_group_fp4(codes << 4 | codes >> 4, scales)


def fp4_scales_down(codes: Tensor, scales: Tensor) -> Tensor:
    return dequantize_group_fp4(codes, scales.view(torch.uint8) - 1)


def fp8_scales_down(codes: Tensor, scales: Tensor, offset: tuple[int, int]) -> Tensor:
    return dequantize_block_fp8(codes, scales.view(torch.uint8) - 1, offset)


@pytest.mark.parametrize(
    ("decoder", "faulty"),
    [
        ("dequantize_group_fp4", swapped),
        ("dequantize_group_fp4", fp4_scales_down),
        ("dequantize_block_fp8", fp8_scales_down),
    ],
    ids=["nibbles-swapped", "fp4-scales-rounded-down", "fp8-scales-rounded-down"],
)
def test_weights_decoded_wrongly_cost_sums(
    decoder: str, faulty: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"scission.common.checkpoint.matrix.{decoder}", faulty)
    assert share_right(bundled(), "add", 24) < 1 - COST
