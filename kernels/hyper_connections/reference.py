"""mHC in plain PyTorch: the definition. The specification's step numbers stand beside the steps."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from scission.kernels.norm.reference import inverse_rms

if TYPE_CHECKING:
    from scission.kernels.hyper_connections import HyperConnection


def hc_pre(streams: Tensor, connection: HyperConnection) -> tuple[Tensor, Tensor, Tensor]:
    n = streams.shape[1]
    h = streams.float()
    coefficients = _coefficients(h, connection)
    offset, factor = _gate_constants(n, connection.eps, streams.device)
    gates = torch.addcmul(offset, coefficients[:, : 2 * n].sigmoid(), factor)  # 3, 4
    comb = coefficients[:, 2 * n :].view(-1, n, n).softmax(-1).add_(connection.eps)  # 5
    comb = _sinkhorn(comb, connection.eps, connection.num_iterations)
    x = torch.bmm(gates[:, :n].unsqueeze(1), h).squeeze(1)  # 7
    return x.to(streams.dtype), gates[:, n:], comb


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    written = post.unsqueeze(2) * y.unsqueeze(1)
    # the sum runs over the FIRST index of comb
    return torch.baddbmm(written, comb.mT, streams.float()).to(streams.dtype)


def hc_head(streams: Tensor, connection: HyperConnection) -> Tensor:
    h = streams.float()
    pre = _coefficients(h, connection).sigmoid() + connection.eps
    return torch.bmm(pre.unsqueeze(1), h).squeeze(1).to(streams.dtype)


def _coefficients(h: Tensor, connection: HyperConnection) -> Tensor:
    v = h.flatten(1)  # 1: stream-major
    m = F.linear(v, connection.fn).mul_(inverse_rms(v, connection.norm_eps))  # 2
    return torch.addcmul(connection.base, m, connection.scale)


def _sinkhorn(comb: Tensor, eps: float, num_iterations: int) -> Tensor:
    """Step 6 on comb [num_tokens, n, n]: columns, then rows and columns in turn.

    One product with a constant matrix gives every element its divisor, a sum plus eps: on a CPU
    two small operations a normalisation instead of three larger ones. The eps comes in by a
    last column that stays 1.
    """
    num_tokens, n, _ = comb.shape
    sum_rows, sum_columns = _sinkhorn_constants(n, eps, comb.device)
    table = comb.new_ones(num_tokens, n * n + 1)
    result = table[:, :-1].view(num_tokens, n, n).copy_(comb)
    mm, divide = torch.mm, table.div_
    sums = mm(table, sum_columns)
    divide(sums)
    for _ in range(num_iterations - 1):
        divide(mm(table, sum_rows, out=sums))
        divide(mm(table, sum_columns, out=sums))
    return result


@functools.cache
def _gate_constants(n: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """pre = sigmoid + eps and post = 2 sigmoid, side by side: offsets and factors, [2 * n]."""
    zeros, ones = torch.zeros(n, device=device), torch.ones(n, device=device)
    return torch.cat([zeros + eps, zeros]), torch.cat([ones, ones * 2])


@functools.cache
def _sinkhorn_constants(n: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices [n * n + 1, n * n + 1]: a row (x, 1) times one is (sums of x + eps, 1).

    The first sums over k (rows of comb), the second over j (columns).
    """
    eye, ones = torch.eye(n, device=device), torch.ones(n, n, device=device)
    last = torch.full((1, n * n), eps, device=device)
    corner = torch.tensor([[0.0]] * (n * n) + [[1.0]], device=device)

    def extended(sums: Tensor) -> Tensor:
        return torch.cat([torch.cat([sums, last]), corner], dim=1)

    return extended(torch.kron(eye, ones)), extended(torch.kron(ones, eye))
