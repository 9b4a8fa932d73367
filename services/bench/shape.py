"""What of a model a pass reads and multiplies, told from its config: what floors follow from."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scission.common.model.config import CSA, DENSE, DeepseekV4Config
from scission.common.model.ministral3 import Ministral3Config
from scission.common.model.qwen3 import Qwen3Config
from scission.common.model.registry import find_architecture
from scission.common.model.step3p5 import Step3p5Config

_NOTHING = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Shape:
    """One model. Names of tensors are whole names as stored."""

    ignored: tuple[re.Pattern[str], ...]
    tables: re.Pattern[str]  # read by rows, one a token
    head: re.Pattern[str]  # multiplied for a prompt's last token alone
    experts: re.Pattern[str]
    expert_share: float  # of the experts, that one token picks
    # operations of attention over a sequence whose queries see 1, 2, .. tokens
    attention: Callable[[NDArray[np.float64]], float]
    # of a component's rows, that a step reads at most
    row_limits: Mapping[str, int]

    def reads(self, name: str) -> bool:
        return not any(pattern.fullmatch(name) for pattern in self.ignored)

    def picked(self, batch: int) -> float:
        """The share of the experts that independent tokens are expected to pick."""
        return 1 - (1 - self.expert_share) ** batch


def shape_of(raw: Mapping[str, Any]) -> Shape:
    """Of a config.json.

    Raises:
        CheckpointError: not a config of ours.
    """
    architecture = find_architecture(raw)
    config = architecture.parse(raw)
    ignored = architecture.ignored(config)
    match config:
        case DeepseekV4Config():
            return _deepseek_v4(config, (*ignored, re.compile(r"mtp\..+")))
        case Qwen3Config():
            whole = (config.num_attention_heads * config.head_dim, None)
            return _dense(
                [whole] * config.num_hidden_layers, ignored, is_tied=config.tie_word_embeddings
            )
        case Ministral3Config():
            windowed = (config.num_attention_heads * config.head_dim, config.sliding_window)
            return _dense(
                [windowed] * config.num_hidden_layers,
                ignored,
                is_tied=config.tie_word_embeddings,
            )
        case Step3p5Config():
            kinds = {
                name: (kind.num_heads * kind.head_dim, kind.window)
                for name, kind in config.kinds.items()
            }
            share = config.moe_top_k / config.moe_num_experts
            return _dense([kinds[name] for name in config.layer_kinds], ignored, share)
    raise AssertionError(f"{architecture.name} has no shape")


def _dense(
    layers: Sequence[tuple[int, int | None]],
    ignored: tuple[re.Pattern[str], ...],
    expert_share: float = 1.0,
    *,
    is_tied: bool = False,
) -> Shape:
    """
    Args:
        layers: channels of all query heads and window of each.
        is_tied: the embedding is the head as well, and read whole.
    """

    def attention(seen: NDArray[np.float64]) -> float:
        return float(
            sum(
                4 * width * np.minimum(seen, window if window is not None else np.inf).sum()
                for width, window in layers
            )
        )

    table = re.compile(r".*\.embed_tokens\.weight")
    return Shape(
        ignored,
        _NOTHING if is_tied else table,
        table if is_tied else re.compile(r"(.*\.)?lm_head\.weight"),
        re.compile(r".*\.moe\.(gate|up|down)_proj\..+"),
        expert_share,
        attention,
        {},
    )


def _deepseek_v4(config: DeepseekV4Config, ignored: tuple[re.Pattern[str], ...]) -> Shape:
    """Queries see a window and entries, of which the indexer scores all and picks some."""

    def attention(seen: NDArray[np.float64]) -> float:
        window = np.minimum(seen, config.sliding_window).sum()
        total = 0.0
        for ratio in config.layer_ratios:
            entries = window
            if ratio != DENSE:
                compressed = seen // ratio
                if ratio == CSA:
                    total += 2 * config.index_n_heads * config.index_head_dim * compressed.sum()
                    compressed = np.minimum(compressed, config.index_topk)
                entries = entries + compressed.sum()
            total += 4 * config.heads_dim * entries
        return float(total)

    return Shape(
        ignored,
        re.compile(r"embed\.weight|.*\.tid2eid"),
        re.compile(r"head\.weight"),
        re.compile(r".*\.ffn\.experts\..+"),
        config.num_experts_per_tok / config.n_routed_experts,
        attention,
        {"csa_kv": config.index_topk},
    )
