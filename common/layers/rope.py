"""Rotary frequencies: plain, and YaRN's blend for contexts beyond the trained one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Pairs that turn less than `beta_slow` times in the original context are slowed by `factor`,
    pairs that turn more than `beta_fast` times stay, those between are blended.

    `rotation_scale` multiplies cos and sin.
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    rotation_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Pairs that turn less than `low_freq_factor` times in the original context are slowed by
    `factor`, pairs that turn more than `high_freq_factor` times stay, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


def llama3_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Plain frequencies [rope_dim / 2] float32, scaled."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    mix = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * mix + frequencies / scaling.factor * (1 - mix)


def rope_frequencies(rope_dim: int, base: float, yarn: YarnScaling | None = None) -> Tensor:
    """Radians per position of each channel pair: [rope_dim / 2] float32, on the CPU."""
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim
    frequencies = 1.0 / torch.pow(torch.tensor(base, dtype=torch.float32), exponents)
    if yarn is None:
        return frequencies

    def pair_of(turns: float) -> float:
        """The (fractional) pair that turns so often in the original context."""
        ratio = yarn.original_max_positions / (turns * 2 * math.pi)
        return rope_dim * math.log(ratio) / (2 * math.log(base))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high: float = min(math.ceil(pair_of(yarn.beta_slow)), rope_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(rope_dim // 2, dtype=torch.float32)
    ramp = ((pairs - low) / (high - low)).clamp(0, 1)
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)
