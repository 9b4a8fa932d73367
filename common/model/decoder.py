"""What decoders with per-head K and V share: their state, attention over it, and the outer loop."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage
from scission.common.layers.linear import VocabParallelEmbedding, VocabParallelHead
from scission.common.layers.norm import RMSNorm
from scission.common.layers.numerics import Numerics
from scission.common.model.architecture import OnLayers
from scission.common.model.batch import ForwardBatch
from scission.common.model.dense_plan import KindPlan, LayerKind, plan_kinds
from scission.kernels.cache import recent_rows, write_rows_
from scission.kernels.dense_attention import attend_dense

NUM_LAYER_GROUPS = 4


@dataclass(frozen=True, slots=True)
class KeyValues:
    """One layer's rows of a storage: [rows, num_kv_heads * head_dim] each, blocks or rings."""

    k: Tensor
    v: Tensor


class DecoderLayer(Protocol):
    def __call__(self, x: Tensor, plan: KindPlan, state: KeyValues) -> Tensor:
        """[num_tokens, dim] -> [num_tokens, dim]; writes the step's K and V."""


class ResidualLayer:
    """Attention, then a feed-forward layer, each on a normalised copy of the residual stream."""

    def __init__(
        self,
        attention_norm: RMSNorm,
        attention: DecoderLayer,
        mlp_norm: RMSNorm,
        mlp: Callable[[Tensor], Tensor],
    ) -> None:
        self._attention_norm = attention_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    def __call__(self, x: Tensor, plan: KindPlan, state: KeyValues) -> Tensor:
        x = x + self._attention(self._attention_norm(x), plan, state)
        return x + self._mlp(self._mlp_norm(x))


class Decoder:
    """Embedding, layers, norm, head. `forward` computes a batch's logits and writes its state."""

    def __init__(
        self,
        embed: VocabParallelEmbedding,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        head: VocabParallelHead,
        kinds: Mapping[str, LayerKind],
        layer_kinds: Sequence[str],
        layout: CacheLayout,
    ) -> None:
        """
        Args:
            kinds: by name: those of `layout`'s components.
            layer_kinds: the name of each layer's kind.
        """
        self.layout = layout
        self.layer_groups = layer_groups(len(layers))
        self._embed = embed
        self._layers = layers
        self._norm = norm
        self._head = head
        self._kinds = kinds
        self._layer_kinds = layer_kinds
        # views of the storage that was used last
        self._bound: tuple[CacheStorage, list[KeyValues]] | None = None

    def forward(
        self, batch: ForwardBatch, storage: CacheStorage, on_layers: OnLayers | None = None
    ) -> Tensor:
        """Compute a batch; its sequences' state in `storage` is brought up to the chunks' ends.

        Args:
            batch: any mix of whole prompts, chunks, single tokens and padding.
            storage: of this model's layout.
            on_layers: called as each layer group [first, last) is done: its paged rows are final.

        Returns:
            [num_logits, vocab_size] float32, of the batch's `logits_at`.
        """
        plans = plan_kinds(batch, self._kinds, self.layout.block_size)
        states = self._states(storage)
        x = self._embed(batch.token_ids)
        for first, last in self.layer_groups:
            for i in range(first, last):
                x = self._layers[i](x, plans[self._layer_kinds[i]], states[i])
            if on_layers is not None:
                on_layers(first, last)
        return self._head(self._norm(x.index_select(0, batch.logits_at)))

    def _states(self, storage: CacheStorage) -> list[KeyValues]:
        if self._bound is None or self._bound[0] is not storage:
            states = [self._layer_state(storage, i) for i in range(len(self._layers))]
            self._bound = (storage, states)
        return self._bound[1]

    def _layer_state(self, storage: CacheStorage, layer: int) -> KeyValues:
        kind = self._layer_kinds[layer]
        k, v = (storage.layout.component(f"{kind}_{part}") for part in ("k", "v"))
        at = k.layers.index(layer)
        return KeyValues(storage.rows(k)[at], storage.rows(v)[at])


def attend_and_keep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: KindPlan,
    state: KeyValues,
    scale: float,
    sink: Tensor | None = None,
) -> Tensor:
    """Attend over the state and the step's own tokens, and write these into the state.

    Args:
        q: [num_tokens, num_heads, head_dim], turned to its position.
        k, v: [num_tokens, num_kv_heads, head_dim], k turned.
        scale, sink: of `attend_dense`.

    Returns:
        [num_tokens, num_heads, head_dim].
    """
    heads = k.shape[1:]
    k, v, writes = k.flatten(1), v.flatten(1), plan.writes
    if plan.look_back is None:
        write_rows_(state.k, writes.rows, k, writes.tokens)
        write_rows_(state.v, writes.rows, v, writes.tokens)
        keys, values = state.k, state.v
    else:
        keys = recent_rows(state.k, plan.look_back, k)
        values = recent_rows(state.v, plan.look_back, v)
    keys, values = keys.view(-1, *heads), values.view(-1, *heads)
    o = attend_dense(q, keys, values, plan.keys, scale, plan.window, sink)
    if plan.look_back is not None:
        write_rows_(state.k, writes.rows, k, writes.tokens)
        write_rows_(state.v, writes.rows, v, writes.tokens)
    return o


def key_value_layout(
    layer_kinds: Sequence[str],
    windows: Mapping[str, int | None],
    rows: Mapping[str, tuple[int, int]],
    numerics: Numerics,
    block_size: int,
) -> CacheLayout:
    """K and V of every kind of layer: of all tokens in blocks, or of a window's in rings.

    A ring holds the window; what the next query can see, the token itself not counted, is live.

    Args:
        layer_kinds: the name of each layer's kind.
        windows: by kind; None: all tokens.
        rows: by kind: the shape of a row of K or V, key-value heads and channels of a head.
    """
    components = []
    for kind, window in windows.items():
        layers = tuple(i for i, name in enumerate(layer_kinds) if name == kind)
        for part in ("k", "v"):
            name = f"{kind}_{part}"
            if layers and window is None:
                components.append(
                    Component(name, Kind.PAGED, layers, rows[kind], numerics.dtype_name)
                )
            elif layers and window is not None:
                components.append(
                    Component(
                        name,
                        Kind.RING,
                        layers,
                        rows[kind],
                        numerics.dtype_name,
                        ring_size=window,
                        live_lookback=window - 1,
                    )
                )
    return CacheLayout(tuple(components), block_size)


def layer_groups(num_layers: int) -> tuple[tuple[int, int], ...]:
    """[first, last) of up to NUM_LAYER_GROUPS groups of (nearly) equal size."""
    count = min(NUM_LAYER_GROUPS, num_layers)
    bounds = [group * num_layers // count for group in range(count + 1)]
    return tuple(itertools.pairwise(bounds))
