"""What decoders with per-head K and V share: their layers' outline, their state, the outer loop."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage
from scission.common.layers.linear import VocabParallelEmbedding, VocabParallelHead
from scission.common.layers.norm import RMSNorm
from scission.common.layers.numerics import Numerics
from scission.common.layers.row_input import RowInput
from scission.common.model.architecture import OnLayers
from scission.common.model.batch import ForwardBatch
from scission.common.model.dense_plan import LayerKind
from scission.common.model.dense_step import KeyValues, Step, plan_steps
from scission.kernels.linear import Rows, Sums, whole_sums
from scission.kernels.target import target_of

NUM_LAYER_GROUPS = 4


class DecoderLayer(Protocol):
    @property
    def captures(self) -> bool:
        """Whether nothing asks the host, given kernels."""

    def __call__(
        self, x: Tensor, y: Sums | None, step: Step, state: KeyValues
    ) -> tuple[Tensor, Sums]:
        """The residual stream [num_tokens, dim] and what is still to be added to it, of the layer
        before and of this one; writes the step's K and V.
        """


class Attention(Protocol):
    @property
    def input(self) -> RowInput:
        """How the rows are taken."""

    def __call__(self, x: Rows, step: Step, state: KeyValues) -> Sums:
        """[num_tokens, dim], normalised -> [num_tokens, dim]; writes the step's K and V."""


class FeedForward(Protocol):
    @property
    def captures(self) -> bool:
        """Whether nothing asks the host."""

    @property
    def input(self) -> RowInput:
        """How the rows are taken."""

    def __call__(self, x: Rows) -> Sums:
        """[num_tokens, dim], normalised -> [num_tokens, dim]."""


class ResidualLayer:
    """Attention, then a feed-forward layer, each on a normalised copy of the residual stream.

    What a sublayer gives is added together with the next one's norm.
    """

    def __init__(
        self,
        attention_norm: RMSNorm,
        attention: Attention,
        mlp_norm: RMSNorm,
        mlp: FeedForward,
    ) -> None:
        self._attention_norm = attention_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    @property
    def captures(self) -> bool:
        return self._mlp.captures

    def __call__(
        self, x: Tensor, y: Sums | None, step: Step, state: KeyValues
    ) -> tuple[Tensor, Sums]:
        x, rows = _add_and_norm(x, y, self._attention_norm, self._attention.input)
        y = self._attention(rows, step, state)
        x, rows = _add_and_norm(x, y, self._mlp_norm, self._mlp.input)
        return x, self._mlp(rows)


def _add_and_norm(
    x: Tensor, y: Sums | None, norm: RMSNorm, wanted: RowInput
) -> tuple[Tensor, Rows]:
    return norm.add(x, y, wanted.scaling, wanted.static_scale, keeps_values=wanted.keeps_values)


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
        numerics: Numerics,
    ) -> None:
        """
        Args:
            kinds: by name: those of `layout`'s components.
            layer_kinds: the name of each layer's kind.
        """
        self.layout = layout
        # references ask the host for lengths
        has_kernels = target_of(norm.weight.device) is not None
        is_launched = has_kernels and numerics.dtype == torch.bfloat16
        self.captures = is_launched and all(layer.captures for layer in layers)
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
        steps = plan_steps(batch, self._kinds, self.layout.block_size)
        states = self._states(storage)
        x = self._embed(batch.token_ids)
        y: Sums | None = None
        for first, last in self.layer_groups:
            for i in range(first, last):
                x, y = self._layers[i](x, y, steps[self._layer_kinds[i]], states[i])
            if on_layers is not None:
                on_layers(first, last)
        added = batch.logit_rows(whole_sums(y)) if y is not None else None
        _, rows = self._norm.add(batch.logit_rows(x), added)
        assert isinstance(rows, Tensor)
        return self._head(rows)

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
