"""FP4 experts as the grouped kernel reads them: repacked once, at load.

A tile is 128 outputs x 128 inputs, 128 rows of 64 bytes: 16 bytes for each of the four groups of
32 inputs that share a scale, four words of eight codes. A word keeps the magnitude of its n-th code
in the low three bits of nibble n, where a byte permutation takes four at once as selectors, and the
signs where an e4m3 code has its own: of codes 0 to 3 in bits 7, 15, 23, 31, of codes 4 to 7 four
bits lower. Rows are in the order in which a warp group holds them for its matrix instruction, so
that no thread needs what another one has loaded.

Scales: one int32 an output and 128 inputs: the ue8m0 code of the largest in the lowest byte, then
four bits a group: 11 less the binades by which its scale is smaller. Decoded codes are e4m3 with
the group's share of the scale in their exponent. A group whose scale is more than 2 ** 11 below
its neighbours' is rounded to the smallest share: below 2 ** -13 of the largest weight there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128
GROUP = 32
# bits of a tile's row number, from the highest, as the numbers of the output's bits
_ROW_BITS = (6, 3, 5, 4, 2, 1, 0)
MAX_SHIFT = 11


@dataclass(frozen=True, slots=True)
class Fp4Experts:
    """Codes [experts, out / 128, in / 128, 128, 64] uint8, scales [experts, in / 128, out] int32.

    The scales of 128 outputs are in the order of a tile's rows.
    """

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
        return self.scales.shape[1] * TILE


def can_pack(out_features: int, in_features: int) -> bool:
    return not out_features % TILE and not in_features % TILE


def row_order() -> Tensor:
    """[128] int64: the output that each row of a tile holds."""
    rows = torch.arange(TILE)
    order = torch.zeros(TILE, dtype=torch.int64)
    for place, bit in enumerate(_ROW_BITS):
        order |= (rows >> (6 - place) & 1) << bit
    return order


def pack_fp4_experts(parts: list[tuple[Tensor, Tensor]]) -> Fp4Experts:
    """Repack matrices of the same experts and inputs.

    Args:
        parts: codes [experts, out, in / 2] int8 and ue8m0 scales [experts, out, in / 32] uint8;
            their outputs follow one another (gate, up).
    """
    first, _ = parts[0]
    num_experts, _, half = first.shape
    out_features, num_blocks = sum(codes.shape[1] for codes, _ in parts), half * 2 // TILE
    shape = (num_experts, out_features // TILE, num_blocks, TILE, TILE // 2)
    packed = torch.empty(shape, dtype=torch.uint8, device=first.device)
    scales = torch.empty(
        (num_experts, num_blocks, out_features), dtype=torch.int32, device=first.device
    )
    order = row_order().to(first.device)
    # an expert at a time: the nibbles, unpacked, take several times the memory
    for expert in range(num_experts):
        codes = torch.cat([part[expert].view(torch.uint8) for part, _ in parts])
        groups = torch.cat([part[expert] for _, part in parts]).int()
        nibbles = torch.stack([codes & 0x0F, codes >> 4], dim=-1).view(out_features, -1, GROUP)
        # [out, in / 128, 4]
        blocks = groups.view(out_features, num_blocks, 4)
        largest = blocks.amax(-1, keepdim=True)
        lag = largest - blocks
        nibbles = _rescale(nibbles, (lag - MAX_SHIFT).clamp_min(0).view(out_features, -1, 1))
        shifts = (MAX_SHIFT - lag).clamp_min(0)
        words = largest.squeeze(-1)
        for group in range(4):
            words = words | shifts[..., group] << 8 + 4 * group
        scales[expert] = _tiles(words, order).permute(2, 0, 1).reshape(num_blocks, out_features)
        # [row tile, row, block, bytes] -> [row tile, block, row, bytes]
        tiles = _tiles(_words(nibbles).view(out_features, num_blocks, TILE // 2), order)
        packed[expert] = tiles.transpose(1, 2)
    return Fp4Experts(packed, scales)


def _tiles(rows: Tensor, order: Tensor) -> Tensor:
    """[out, ...] -> [out / 128, 128, ...], each tile's rows in their order."""
    return rows.view(-1, TILE, *rows.shape[1:]).index_select(1, order)


def _words(nibbles: Tensor) -> Tensor:
    """[.., 32] codes -> [.., 16] uint8, four words of eight codes each."""
    codes = nibbles.reshape(-1, 4, 8).int()
    words = torch.zeros(codes.shape[:2], dtype=torch.int64, device=codes.device)
    for n in range(8):
        magnitude, sign = codes[..., n] & 7, codes[..., n].long() >> 3
        words |= magnitude.long() << 4 * n
        words |= sign << (8 * n + 7 if n < 4 else 8 * (n - 4) + 3)
    data = torch.stack([words >> 8 * i & 0xFF for i in range(4)], dim=-1)
    return data.to(torch.uint8).view(*nibbles.shape[:-1], 16)


def _rescale(nibbles: Tensor, binades: Tensor) -> Tensor:
    """Codes of values 2 ** binades smaller, to nearest; the same where it is 0."""
    if not bool(binades.any()):
        return nibbles
    steps = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6], device=nibbles.device)
    values = steps[(nibbles & 7).long()] * torch.exp2(-binades.float())
    bounds = (steps[1:] + steps[:-1]) / 2
    codes = torch.bucketize(values, bounds)
    # half-way between two codes goes to the even one
    codes += (values == bounds[codes.clamp_max(6)]) & (codes % 2 == 1)
    return torch.where(binades > 0, codes.to(torch.uint8) | nibbles & 8, nibbles)
