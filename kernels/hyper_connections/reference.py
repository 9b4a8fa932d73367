"""mHC in plain PyTorch: the definition. The specification's step numbers stand beside the steps."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from scission.kernels.hyper_connections import HyperConnection


def hc_pre(streams: Tensor, connection: HyperConnection) -> tuple[Tensor, Tensor, Tensor]:
    n = streams.shape[1]
    h = streams.float()
    coefficients = _coefficients(h, connection)
    gates = coefficients[:, : 2 * n].sigmoid()
    pre = gates[:, :n] + connection.eps  # 3
    post = gates[:, n:] * 2.0  # 4
    comb = coefficients[:, 2 * n :].view(-1, n, n).softmax(-1).add_(connection.eps)  # 5
    comb = _sinkhorn(comb.view(-1, n * n), n, connection.eps, connection.num_iterations)
    x = torch.bmm(pre.unsqueeze(1), h).squeeze(1)  # 7
    return x.to(streams.dtype), post, comb.view(-1, n, n)


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
    m = F.linear(F.rms_norm(v, v.shape[-1:], None, connection.norm_eps), connection.fn)  # 2
    return torch.addcmul(connection.base, m, connection.scale)


def _sinkhorn(comb: Tensor, n: int, eps: float, num_iterations: int) -> Tensor:
    """Step 6 on comb [num_tokens, n * n], in place: columns, then rows and columns in turn.

    The sums are products with a 0/1 matrix: one operation gives every element its divisor, which
    on the CPU costs a third of a reduction, an addition and a broadcast division.
    """
    sum_rows, sum_columns, eps_row = _sinkhorn_constants(n, eps, comb.device)
    sums = torch.addmm(eps_row, comb, sum_columns)
    comb.div_(sums)
    for _ in range(num_iterations - 1):
        comb.div_(torch.addmm(eps_row, comb, sum_rows, out=sums))
        comb.div_(torch.addmm(eps_row, comb, sum_columns, out=sums))
    return comb


@functools.cache
def _sinkhorn_constants(n: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices [n * n, n * n] that sum over k (a row) or over j (a column), and eps [n * n]."""
    eye, ones = torch.eye(n, device=device), torch.ones(n, n, device=device)
    return torch.kron(eye, ones), torch.kron(ones, eye), torch.full((n * n,), eps, device=device)
