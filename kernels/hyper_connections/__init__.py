"""Manifold-constrained hyper-connections (mHC): n residual streams that sublayers read and write.

Per token a sublayer reads sum_j pre_j h_j, and its output y gives the next streams
h'_k = post_k y + sum_j comb[j, k] h_j. The coefficients come from the streams; comb is nearly
doubly stochastic (Sinkhorn). All fp32 inside.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from scission.kernels.hyper_connections import reference

__all__ = ["HyperConnection", "hc_head", "hc_post", "hc_pre"]

with warnings.catch_warnings():
    # deprecated in favour of torch.compile, which needs a C++ compiler where it runs
    warnings.simplefilter("ignore")
    # hc_pre is a hundred operations on 16 numbers a token: without Python between them it takes
    # 42 instead of 70 us for one token, 60 instead of 86 us for eight. The same bits either way.
    _hc_pre_on_cpu = torch.jit.script(reference.hc_pre)


@dataclass(frozen=True, slots=True)
class HyperConnection:
    """The parameters of one sublayer's coefficients, float32, for n streams of width d.

    `fn` is [(2 + n) n, n d]; `scale` and `base` are [(2 + n) n], scale expanded to every
    coefficient. For the head, which only reads, the first dim is n.
    """

    fn: Tensor
    scale: Tensor
    base: Tensor
    norm_eps: float
    eps: float
    num_iterations: int  # of Sinkhorn; 0 for the head

    def __post_init__(self) -> None:
        rows = self.fn.shape[:1]
        if self.scale.shape != rows or self.base.shape != rows:
            raise ValueError(f"scale and base must be {list(rows)}, got {list(self.scale.shape)}")


def hc_pre(streams: Tensor, connection: HyperConnection) -> tuple[Tensor, Tensor, Tensor]:
    """What the sublayer reads, and how its output goes back.

    Args:
        streams: [num_tokens, n, d] float32 or bfloat16.

    Returns:
        x [num_tokens, d] of the streams' dtype, post [num_tokens, n] and comb [num_tokens, n, n]
        (from stream, to stream) float32.
    """
    _check(streams, connection, num_coefficients=streams.shape[1] * (2 + streams.shape[1]))
    run = _hc_pre_on_cpu if streams.device.type == "cpu" else reference.hc_pre
    x, post, comb = run(
        streams,
        connection.fn,
        connection.scale,
        connection.base,
        *_constants(streams, connection),
        connection.eps,
        connection.num_iterations,
    )
    return x, post, comb


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams after the sublayer: h'_k = post_k y + sum_j comb[j, k] h_j.

    Args:
        y: [num_tokens, d], the sublayer's output.
        streams: [num_tokens, n, d], as `hc_pre` read them.
        post, comb: from `hc_pre`.

    Returns:
        [num_tokens, n, d] of the streams' dtype.
    """
    if y.shape != (streams.shape[0], streams.shape[2]):
        raise ValueError(f"y {list(y.shape)} does not fit streams {list(streams.shape)}")
    return reference.hc_post(y, streams, post, comb)


def hc_head(streams: Tensor, connection: HyperConnection) -> Tensor:
    """The weighted sum of the streams that goes to the final norm: [num_tokens, d]."""
    _check(streams, connection, num_coefficients=streams.shape[1])
    c = connection
    norm_eps = _constants(streams, c)[0]
    return reference.hc_head(streams, c.fn, c.scale, c.base, norm_eps, c.eps)


def _constants(
    streams: Tensor, connection: HyperConnection
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = streams.shape[1]
    return reference.constants(n, connection.norm_eps, connection.eps, streams.device)


def _check(streams: Tensor, connection: HyperConnection, num_coefficients: int) -> None:
    wanted = (num_coefficients, streams.shape[1] * streams.shape[2])
    if connection.fn.shape != wanted or connection.fn.dtype != torch.float32:
        raise ValueError(
            f"streams {list(streams.shape)} need fn {list(wanted)} float32, "
            f"got {list(connection.fn.shape)} {connection.fn.dtype}"
        )
