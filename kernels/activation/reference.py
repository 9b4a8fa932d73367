"""The gate of a gated feed-forward layer in plain PyTorch: the definition."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor, limit: float | None) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = F.silu(gate)
    if limit is not None:
        gate, up = gate.clamp_(max=limit), up.clamp(-limit, limit)
    return gate.mul_(up).to(gate_up.dtype)


def clamped_silu_mul(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate.clamp(max=limit)).mul_(up.clamp(-limit, limit)).to(gate_up.dtype)
