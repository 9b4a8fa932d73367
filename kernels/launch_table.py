"""Every Triton kernel with every signature it is launched with, one table for all targets.

What is cross-compiled and checked without the hardware is what stands here; the tiles come from the
functions that the launchers themselves pick from.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scission.kernels.activation import launches as activation_launches
from scission.kernels.attention import launches as attention_launches
from scission.kernels.cache import launches as cache_launches
from scission.kernels.compressor import launches as compressor_launches
from scission.kernels.decode_rows import launches as decode_rows_launches
from scission.kernels.dense_attention import launches as heads_launches
from scission.kernels.hyper_connections import launches as hyper_connection_launches
from scission.kernels.indexer import launches as indexer_launches
from scission.kernels.latents import launches as latent_launches
from scission.kernels.linear import launches as linear_launches
from scission.kernels.moe import launches as moe_launches
from scission.kernels.norm import launches as norm_launches
from scission.kernels.rope import launches as rope_launches
from scission.kernels.sampling import launches as sampling_launches
from scission.kernels.target import Target

# Triton's default
_NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class Launch:
    """One specialisation of one kernel.

    types: of the run-time arguments in order, in Triton's words; a trailing ":16" says that the
    value (of a pointer, always) is a multiple of 16. constants: the constexpr arguments.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = _NUM_WARPS

    @property
    def name(self) -> str:
        values = "-".join(f"{name.lower()}={value}" for name, value in self.constants.items())
        inputs = self.types.get("x_ptr", "").removeprefix("*")
        return "-".join(filter(None, (self.kernel.__name__, inputs, values)))


def launches(target: Target) -> Iterator[Launch]:
    """All of one target's."""
    yield from _linear(target)
    yield from _dense(target)
    yield from _state(target)
    yield from _sparse_attention(target)
    yield from _indexer(target)
    yield from _decode_steps()
    yield from _mixing(target)


def _linear(target: Target) -> Iterator[Launch]:
    for launch in linear_launches.launches(target):
        yield Launch(*launch)


def _dense(target: Target) -> Iterator[Launch]:
    """Attention of per-head K and V, norms and gates between dense layers."""
    for launch in (
        *heads_launches.launches(target),
        *norm_launches.launches(target),
        *activation_launches.launches(target),
    ):
        yield Launch(*launch)


def _decode_steps() -> Iterator[Launch]:
    """What a captured step runs besides the model, the same for every target."""
    for folder in (sampling_launches, decode_rows_launches):
        for kernel, types, constants, num_warps in folder.launches():
            yield Launch(kernel, types, constants, num_warps)


def _state(target: Target) -> Iterator[Launch]:
    """DeepSeek-V4's rotations, latents, compressors and rings."""
    for launch in (
        *rope_launches.launches(),
        *latent_launches.launches(target),
        *compressor_launches.launches(target),
        *cache_launches.launches(),
    ):
        yield Launch(*launch)


def _sparse_attention(target: Target) -> Iterator[Launch]:
    for launch in attention_launches.launches(target):
        yield Launch(*launch)


def _indexer(target: Target) -> Iterator[Launch]:
    for launch in indexer_launches.launches(target):
        yield Launch(*launch)


def _mixing(target: Target) -> Iterator[Launch]:
    """Hyper-connections, norms, gates and experts."""
    for launch in (*hyper_connection_launches.launches(target), *moe_launches.launches(target)):
        yield Launch(*launch)
