"""FP4 experts as the grouped kernel reads them: repacked once, at load.

Codes: tiles of 64 outputs x 64 inputs, each 64 rows of 32 bytes, one after another along the
inputs; byte j of a row holds input j in its low nibble and input 32 + j in its high one, so that
either nibble of a row of bytes is one group of 32 inputs, which share a scale. Scales: one int32
an output and 128 inputs, the codes of the four groups from the lowest byte up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 64
SCALE_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Fp4Experts:
    """Codes [experts, out / 64, in / 64, 64, 32] uint8, scales [experts, in / 128, out] int32."""

    codes: Tensor
    scales: Tensor

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        return self.scales.shape[2]

    @property
    def in_features(self) -> int:
        return self.scales.shape[1] * SCALE_BLOCK


def can_pack(out_features: int, in_features: int) -> bool:
    return not out_features % SCALE_BLOCK and not in_features % SCALE_BLOCK


def pack_fp4_experts(parts: list[tuple[Tensor, Tensor]]) -> Fp4Experts:
    """Repack matrices of the same experts and inputs.

    Args:
        parts: codes [experts, out, in / 2] int8 and ue8m0 scales [experts, out, in / 32] uint8;
            their outputs follow one another (gate, up).
    """
    first, _ = parts[0]
    num_experts, _, half = first.shape
    out_features = sum(codes.shape[1] for codes, _ in parts)
    shape = (num_experts, out_features // TILE, half * 2 // TILE, TILE, TILE // 2)
    packed = torch.empty(shape, dtype=torch.uint8, device=first.device)
    num_blocks = half * 2 // SCALE_BLOCK
    scales = torch.empty(
        (num_experts, num_blocks, out_features), dtype=torch.int32, device=first.device
    )
    # an expert at a time: the nibbles, unpacked, take several times the memory
    for expert in range(num_experts):
        codes = torch.cat([part[expert].view(torch.uint8) for part, _ in parts])
        nibbles = torch.stack([codes & 0x0F, codes >> 4], dim=-1)
        # [row tile, row, column tile, half, 32]
        halves = nibbles.view(-1, TILE, half * 2 // TILE, 2, TILE // 2)
        tiles = halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)
        packed[expert] = tiles.transpose(1, 2)
        groups = torch.cat([part[expert] for _, part in parts])
        words = groups.contiguous().view(torch.int32)
        scales[expert] = words.T
    return Fp4Experts(packed, scales)
