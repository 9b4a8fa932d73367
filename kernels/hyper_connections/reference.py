"""mHC in plain PyTorch: the definition. The specification's step numbers stand beside the steps.

The functions take tensors and numbers only, and no Python beyond TorchScript's: see `__init__`.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def hc_pre(
    streams: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    norm_eps: Tensor,
    gate_offset: Tensor,
    gate_factor: Tensor,
    sum_rows: Tensor,
    sum_columns: Tensor,
    eps: float,
    num_iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_eps` to `sum_columns` are the `constants`."""
    n = streams.size(1)
    h = streams.float()
    m = coefficients(h, fn, scale, base, norm_eps)
    gates = torch.addcmul(gate_offset, m[:, : 2 * n].sigmoid(), gate_factor)  # 3, 4
    comb = m[:, 2 * n :].reshape(-1, n, n).softmax(-1).add_(eps)  # 5
    comb = sinkhorn(comb, sum_rows, sum_columns, num_iterations)
    x = torch.bmm(gates[:, :n].unsqueeze(1), h).squeeze(1)  # 7
    return x.to(streams.dtype), gates[:, n:], comb


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    written = post.unsqueeze(2) * y.unsqueeze(1)
    # the sum runs over the FIRST index of comb
    return torch.baddbmm(written, comb.mT, streams.float()).to(streams.dtype)


def hc_head(
    streams: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: Tensor, eps: float
) -> Tensor:
    h = streams.float()
    pre = coefficients(h, fn, scale, base, norm_eps).sigmoid() + eps
    return torch.bmm(pre.unsqueeze(1), h).squeeze(1).to(streams.dtype)


def coefficients(h: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: Tensor) -> Tensor:
    v = h.flatten(1)  # 1: stream-major
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    inverse_rms = torch.addcmul(norm_eps, norm, norm, value=1.0 / v.size(1)).rsqrt_()
    return torch.addcmul(base, F.linear(v, fn).mul_(inverse_rms), scale)  # 2


def sinkhorn(comb: Tensor, sum_rows: Tensor, sum_columns: Tensor, num_iterations: int) -> Tensor:
    """Step 6 on comb [num_tokens, n, n]: columns, then rows and columns in turn.

    One product with a constant matrix gives every element its divisor, a sum plus eps: on a CPU
    two small operations a normalisation instead of three larger ones. The eps comes in by a
    last column that stays 1.
    """
    num_tokens, n = comb.size(0), comb.size(1)
    table = comb.new_ones([num_tokens, n * n + 1])
    result = table[:, :-1].view(num_tokens, n, n).copy_(comb)
    sums = torch.mm(table, sum_columns)
    table.div_(sums)
    for _ in range(num_iterations - 1):
        torch.mm(table, sum_rows, out=sums)
        table.div_(sums)
        torch.mm(table, sum_columns, out=sums)
        table.div_(sums)
    return result


@functools.cache
def constants(
    n: int, norm_eps: float, eps: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `hc_pre` computes with besides the parameters.

    Returns:
        norm_eps []; offsets and factors [2 n] of the gates (pre = sigmoid + eps, post = 2
        sigmoid, side by side); two matrices [n * n + 1, n * n + 1] by which a row (x, 1) becomes
        (sums of x + eps, 1): the first sums over k (rows of comb), the second over j (columns).
    """
    zeros, ones = torch.zeros(n, device=device), torch.ones(n, device=device)
    last = torch.full((1, n * n), eps, device=device)
    corner = torch.tensor([[0.0]] * (n * n) + [[1.0]], device=device)
    eye, square = torch.eye(n, device=device), torch.ones(n, n, device=device)
    sum_rows, sum_columns = (
        torch.cat([torch.cat([sums, last]), corner], dim=1)
        for sums in (torch.kron(eye, square), torch.kron(square, eye))
    )
    return (
        torch.tensor(norm_eps, device=device),
        torch.cat([zeros + eps, zeros]),
        torch.cat([ones, ones * 2]),
        sum_rows,
        sum_columns,
    )
