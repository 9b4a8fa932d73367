"""The state that DeepSeek-V4 keeps of a request: its layout, and one layer's rows of a storage."""

from dataclasses import dataclass

from torch import Tensor

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage
from scission.common.layers.numerics import Numerics
from scission.common.model.config import CSA, HCA, DeepseekV4Config

BLOCK_SIZE = 128  # tokens: the least common multiple of the ratios


@dataclass(frozen=True, slots=True)
class CompressorState:
    """A compressor's rows of one layer, flattened to [rows, width]."""

    kv: Tensor
    score: Tensor
    entries: Tensor


@dataclass(frozen=True, slots=True)
class LayerState:
    """One layer's rows of a storage, flattened to [rows, width]."""

    window: Tensor
    compressor: CompressorState | None
    indexer: CompressorState | None

    @property
    def entries(self) -> Tensor | None:
        return self.compressor.entries if self.compressor is not None else None


def cache_layout(
    config: DeepseekV4Config, numerics: Numerics, block_size: int = BLOCK_SIZE
) -> CacheLayout:
    """The state that a request has, and what of it is live (specification, sections 5 and 11)."""
    ratios = config.layer_ratios
    every = tuple(range(len(ratios)))
    csa = tuple(layer for layer in every if ratios[layer] == CSA)
    hca = tuple(layer for layer in every if ratios[layer] == HCA)
    kv, index, dtype = (config.head_dim,), (config.index_head_dim,), numerics.dtype_name
    window = config.sliding_window
    components = [
        Component(
            "window_kv", Kind.RING, every, kv, dtype, ring_size=window, live_lookback=window - 1
        )
    ]
    for name, ratio, layers, row in (
        ("csa_kv", CSA, csa, kv),
        ("csa_index", CSA, csa, index),
        ("hca_kv", HCA, hca, kv),
    ):
        if layers:
            components.append(Component(name, Kind.PAGED, layers, row, dtype, tokens_per_row=ratio))
    for name, ratio, layers, width in (
        ("csa", CSA, csa, config.head_dim),
        ("index", CSA, csa, config.index_head_dim),
        ("hca", HCA, hca, config.head_dim),
    ):
        if layers:
            components += _compressor_rings(name, ratio, layers, width)
    return CacheLayout(tuple(components), block_size)


def _compressor_rings(
    name: str, ratio: int, layers: tuple[int, ...], width: int
) -> list[Component]:
    """With overlap (CSA) two blocks of rows; the one before the open block is live too."""
    k = 2 if ratio == CSA else 1
    return [
        Component(
            f"{name}_{part}_state",
            Kind.RING,
            layers,
            (k * width,),
            "float32",
            ring_size=k * ratio,
            live_align=ratio,
            live_lookback=(k - 1) * ratio,
            initial=initial,
        )
        for part, initial in (("kv", 0.0), ("score", float("-inf")))
    ]


def layer_state(storage: CacheStorage, layer: int) -> LayerState:
    """Views of the storage, of model layer `layer`."""
    rows: dict[str, Tensor] = {}
    for component in storage.layout.components:
        if layer in component.layers:
            rows[component.name] = storage.rows(component)[component.layers.index(layer)]

    def compressor(prefix: str, entries: str) -> CompressorState | None:
        if entries not in rows:
            return None
        return CompressorState(
            rows[f"{prefix}_kv_state"], rows[f"{prefix}_score_state"], rows[entries]
        )

    return LayerState(
        window=rows["window_kv"],
        compressor=compressor("csa", "csa_kv") or compressor("hca", "hca_kv"),
        indexer=compressor("index", "csa_index"),
    )
