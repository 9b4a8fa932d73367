"""What the engine and its tools need to know of a kind of model, gathered in one value."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from scission.common.cache.layout import CacheLayout
from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint.table import Stored, TensorSpec
from scission.common.checkpoint.weights import Weights
from scission.common.layers.numerics import Numerics
from scission.common.model.batch import ForwardBatch
from scission.common.parallel.ranks import Ranks

BLOCK_SIZE = 128  # tokens

OnLayers = Callable[[int, int], None]


class Model(Protocol):
    """What engines need of a model."""

    @property
    def layout(self) -> CacheLayout:
        """The state a request has."""

    @property
    def layer_groups(self) -> tuple[tuple[int, int], ...]:
        """[first, last) model layers; after each group its paged rows of the step are final."""

    @property
    def captures(self) -> bool:
        """Whether a pass over single tokens asks nothing of the host: it can be a captured graph.

        Such a pass reads of a batch only tensors and the bounds of its `places`.
        """

    def forward(
        self, batch: ForwardBatch, storage: CacheStorage, on_layers: OnLayers | None = None
    ) -> Tensor:
        """Logits [num_logits, vocab_size] float32; writes the state in place."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is asked of every config."""

    vocab_size: int
    max_position_embeddings: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    rope: object  # JSON values: whatever decides how positions enter
    layers: Mapping[str, int] = field(default_factory=dict)  # how many of which kind, in words


Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Architecture(Generic[Config]):
    """One kind of model: `name` is what config.json's `architectures` calls it."""

    name: str
    parse: Callable[[Mapping[str, Any]], Config]
    facts: Callable[[Config], Facts]
    layout: Callable[[Config, Numerics, int], CacheLayout]  # of all ranks; int: the block size
    build: Callable[[Weights, Config, Ranks, Numerics, int], Model]
    table: Callable[[Mapping[str, Any], Stored], dict[str, TensorSpec]]
    random_values: Callable[[str, tuple[int, ...], Mapping[str, Any], torch.Generator], Tensor]
    # whole names of tensors that are not loaded
    ignored: Callable[[Config], tuple[re.Pattern[str], ...]] = lambda config: ()
