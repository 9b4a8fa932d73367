"""What is rounded where: one setting for a whole model, the same on prefill and decode."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scission.common.errors import ConfigError
from scission.kernels.quant import round_trip_fp4, round_trip_fp8

# blocks of the round trips that the model was trained with (specification, section 2.4)
KV_BLOCK = 64
LINEAR_BLOCK = 128
INDEX_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Numerics:
    """`dtype` flows between the fp32 islands; `rounds` applies the trained-in round trips."""

    dtype: torch.dtype
    rounds: bool

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"dtype must be float32 or bfloat16, got {self.dtype}")
        if not self.rounds and self.dtype != torch.float32:
            raise ConfigError(f"numerics exact requires dtype float32, got {self.dtype}")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def round_kv(self, kv: Tensor, rope_dim: int) -> Tensor:
        """The KV round trip, in place on all but the last rope_dim channels of [n, dim]."""
        if self.rounds:
            plain = kv[:, :-rope_dim]
            plain.copy_(round_trip_fp8(plain, KV_BLOCK))
        return kv

    def round_index(self, x: Tensor) -> Tensor:
        """The indexer's round trip of queries and keys, [.., index_head_dim]."""
        return round_trip_fp4(x, INDEX_BLOCK) if self.rounds else x
