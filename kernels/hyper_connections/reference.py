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
    comb = _sinkhorn(comb.view(-1, n * n), n, connection.eps, connection.num_iterations)
    x = torch.bmm(gates[:, :n].unsqueeze(1), h).squeeze(1)  # 7
    return x.to(streams.dtype), gates[:, n:], comb.view(-1, n, n)


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


def _sinkhorn(comb: Tensor, n: int, eps: float, num_iterations: int) -> Tensor:
    """Step 6 on comb [num_tokens, n * n], in place: columns, then rows and columns in turn.

    The sums are products with a 0/1 matrix: one operation gives every element its divisor, which
    on the CPU costs a third of a reduction, an addition and a broadcast division.
    """
    sum_rows, sum_columns, eps_row = _sinkhorn_constants(n, eps, comb.device)
    addmm, divide = torch.addmm, comb.div_
    sums = addmm(eps_row, comb, sum_columns)
    divide(sums)
    for _ in range(num_iterations - 1):
        divide(addmm(eps_row, comb, sum_rows, out=sums))
        divide(addmm(eps_row, comb, sum_columns, out=sums))
    return comb


@functools.cache
def _gate_constants(n: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """pre = sigmoid + eps and post = 2 sigmoid, side by side: offsets and factors, [2 * n]."""
    zeros, ones = torch.zeros(n, device=device), torch.ones(n, device=device)
    return torch.cat([zeros + eps, zeros]), torch.cat([ones, ones * 2])


@functools.cache
def _sinkhorn_constants(n: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices [n * n, n * n] that sum over k (a row) or over j (a column), and eps [n * n]."""
    eye, ones = torch.eye(n, device=device), torch.ones(n, n, device=device)
    return torch.kron(eye, ones), torch.kron(ones, eye), torch.full((n * n,), eps, device=device)
