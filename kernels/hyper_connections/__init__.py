"""Manifold-constrained hyper-connections (mHC): n residual streams that sublayers read and write.

Per token a sublayer reads sum_j pre_j h_j, and its output y gives the next streams
h'_k = post_k y + sum_j comb[j, k] h_j. The coefficients come from the streams; comb is nearly
doubly stochastic (Sinkhorn). All fp32 inside.

`hc_pre` and `hc_post` are the two halves as the specification has them. `hc_read` and `hc_write`
do the same with the norm that follows and with the writing put off to the next read.
"""

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scission.kernels.hyper_connections import reference
from scission.kernels.hyper_connections.streams import Mix, Pending, Streams
from scission.kernels.linear import QuantizedRows, quantize_rows
from scission.kernels.moe.outputs import ExpertOutputs
from scission.kernels.norm import rms_norm
from scission.kernels.target import Target, target_of

if TYPE_CHECKING:
    from scission.kernels.hyper_connections.mix_streams import Reading

__all__ = [
    "HyperConnection",
    "Mix",
    "Streams",
    "hc_head",
    "hc_post",
    "hc_pre",
    "hc_read",
    "hc_read_head",
    "hc_values",
    "hc_write",
]

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
    # fn as matrices of bfloat16 that matrix units multiply, where there are kernels
    fn_parts: Tensor | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = None
        if target_of(self.fn.device) is not None:
            from scission.kernels.hyper_connections.mix_streams import bf16_parts

            parts = bf16_parts(self.fn)
        object.__setattr__(self, "fn_parts", parts)
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


def hc_read(
    streams: Streams,
    connection: HyperConnection,
    norm_weight: Tensor,
    norm_eps: float,
    *,
    quantizes: bool,
) -> tuple[Tensor | QuantizedRows, Mix]:
    """What a sublayer reads, normalised; what was pending in the streams is written first.

    Args:
        streams: brought up to date in place.
        norm_weight: [d] float32, of the RMSNorm before the sublayer.
        norm_eps: of that norm.
        quantizes: x is wanted as e4m3 codes, too (scaled by powers of two, blocks of 128).

    Returns:
        x [num_tokens, d] of the streams' dtype, or quantised with x as `values`; and what
        `hc_write` takes.
    """
    target = target_of(streams.values.device)
    if target is None or not _has_kernels(streams):
        x, post, comb = hc_pre(_up_to_date(streams), connection)
        x = rms_norm(x, norm_weight, norm_eps)
        return quantize_rows(x, "ue8m0") if quantizes else x, Mix(post, comb)
    reading = _read(streams, connection, norm_weight, norm_eps, target, quantizes=quantizes)
    assert reading.post is not None and reading.comb is not None
    mix = Mix(reading.post, reading.comb)
    if reading.codes is None or reading.scales is None:
        return reading.values, mix
    return QuantizedRows(reading.values, reading.codes, reading.scales), mix


def hc_write(y: Tensor | ExpertOutputs, streams: Streams, mix: Mix) -> Streams:
    """The streams after a sublayer that read `streams` by `mix` and put out y.

    Args:
        y: [num_tokens, d] of the streams' dtype, or what experts put out, not summed yet.
        streams: as `hc_read` left them; they share memory with the result and are void afterwards.
    """
    num_tokens, _, d = streams.values.shape
    found = (y.num_tokens, y.rows.shape[2]) if isinstance(y, ExpertOutputs) else y.shape
    if found != (num_tokens, d):
        raise ValueError(f"y {list(found)} does not fit streams {list(streams.values.shape)}")
    assert streams.pending is None, "streams are read before they are written"
    return Streams(streams.values, Pending(y, mix))


def hc_read_head(
    streams: Streams, connection: HyperConnection, norm_weight: Tensor, norm_eps: float
) -> Tensor:
    """`hc_head` of the streams, brought up to date, and the final norm: [num_tokens, d]."""
    target = target_of(streams.values.device)
    if target is None or not _has_kernels(streams):
        return rms_norm(hc_head(_up_to_date(streams), connection), norm_weight, norm_eps)
    return _read(streams, connection, norm_weight, norm_eps, target, quantizes=False).values


def _has_kernels(streams: Streams) -> bool:
    # only where a kernel is launched is Triton needed
    from scission.kernels.hyper_connections.mix_streams import can_run

    return can_run(streams.values)


def _read(
    streams: Streams,
    connection: HyperConnection,
    norm_weight: Tensor,
    norm_eps: float,
    target: Target,
    *,
    quantizes: bool,
) -> "Reading":
    from scission.kernels.hyper_connections import mix_streams

    n, c, pending = streams.values.shape[1], connection, streams.pending
    _check(streams.values, c, num_coefficients=n * (2 + n) if c.num_iterations else n)
    streams.values, coefficients = mix_streams.score_streams(
        streams.values,
        pending.y if pending is not None else None,
        pending.mix.post if pending is not None else None,
        pending.mix.comb if pending is not None else None,
        c.fn,
        c.fn_parts if c.fn_parts is not None else mix_streams.bf16_parts(c.fn),
        target,
    )
    streams.pending = None
    return mix_streams.read_streams(
        streams.values,
        coefficients,
        c.scale,
        c.base,
        c.norm_eps,
        c.eps,
        c.num_iterations,
        norm_weight,
        norm_eps,
        target,
        quantizes=quantizes,
    )


def hc_values(streams: Streams) -> Tensor:
    """The streams as they are once everything is written: [num_tokens, n, d]."""
    return _up_to_date(streams)


def _up_to_date(streams: Streams) -> Tensor:
    pending = streams.pending
    if pending is not None:
        h, mix = streams.values, pending.mix
        streams.values = hc_post(pending.summed(h.dtype), h, mix.post, mix.comb)
        streams.pending = None
    return streams.values


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
