"""A step in the eyes of DeepSeek-V4's attention layers: what they do with positions and state.

`ListedStep` goes by row lists that the host has planned (`step_plan`), in plain PyTorch: every
device, every dtype, and the definition. `PlacedStep` (deepseek_v4_placed.py) asks nothing of the
host.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from scission.common.layers.numerics import Numerics
from scission.common.model.config import CSA, DENSE
from scission.common.model.deepseek_v4_state import CompressorState, LayerState
from scission.common.model.step_plan import Rotation, StepPlan
from scission.kernels.attention import attend
from scission.kernels.cache import recent_rows, write_rows_
from scission.kernels.compressor import pool_blocks
from scission.kernels.indexer import hadamard, pick_rows, score_entries
from scission.kernels.linear import Rows
from scission.kernels.norm import rms_norm
from scission.kernels.rope import rotate_


@dataclass(frozen=True, slots=True)
class LatentNorms:
    """Of what queries and the key-value head are made from, side by side."""

    q_weight: Tensor  # [q_lora] float32
    kv_weight: Tensor  # [head_dim] float32
    eps: float
    rope_dim: int


@dataclass(frozen=True, slots=True)
class Fold:
    """A compressor's parameters: how the tokens of a block become one entry."""

    ratio: int
    width: int
    ape: Tensor  # [ratio, width, doubled with overlap] float32
    norm_weight: Tensor  # [width] float32
    norm_eps: float
    rope_dim: int
    kind: Literal["kv", "index"]  # which rounding entries take


class Step(Protocol):
    """One batch. Ratios name a layer's kind, as in the config."""

    @property
    def token_ids(self) -> Tensor:
        """[num_tokens] int64."""

    @property
    def positions(self) -> Tensor:
        """[num_tokens] int64; -1: padding."""

    @property
    def quantizes(self) -> bool:
        """Whether rows are handed to linear layers as codes where these take codes."""

    def latents(
        self, x: Tensor, norms: LatentNorms, ratio: int, state: LayerState | None
    ) -> tuple[Rows, Tensor]:
        """The normalised query latent, and this step's key-value rows as they are kept.

        Args:
            x: [num_tokens, q_lora + head_dim].
            state: None: nothing is kept.
        """

    def turn_heads(self, q: Tensor, eps: float, ratio: int) -> Tensor:
        """[num_tokens, num_heads, head_dim]: normalised without weight, turned; in place."""

    def compress(self, kv: Tensor, score: Tensor, fold: Fold, state: CompressorState) -> None:
        """Write the entries that this step completes, and the rings.

        Args:
            kv, score: [num_tokens, width, doubled with overlap] float32, the two projections of x.
        """

    def needs_choice(self, ratio: int, top_k: int) -> bool:
        """Whether some query may see more than top_k entries."""

    def pick(self, q: Tensor, weights: Tensor, keys: Tensor, top_k: int) -> Tensor:
        """The pool rows of the best CSA entries of each query, [num_tokens, top_k].

        Args:
            q: [num_tokens, num_heads, dim], the indexer's queries as projected.
            weights: [num_tokens, num_heads] float32, of any sign, up to a positive factor.
            keys: the pool of index entries.
        """

    def attend(
        self,
        q: Tensor,
        kv: Tensor,
        ratio: int,
        state: LayerState | None,
        picks: Tensor | None,
        sink: Tensor,
        scale: float,
    ) -> Tensor:
        """Attention over the window and the entries, turned back; the window's rows are kept.

        Args:
            q: [num_tokens, num_heads, head_dim], from `turn_heads`.
            kv: [num_tokens, head_dim], from `latents`.
            picks: from `pick`; None: every visible entry of the layer's ratio.
        """


class ListedStep:
    """By the row lists of a plan."""

    quantizes = False

    def __init__(self, plan: StepPlan, window: int, numerics: Numerics) -> None:
        """`window`: its size in tokens."""
        self.token_ids = plan.token_ids
        self.positions = plan.positions
        self._plan = plan
        self._window = window
        self._numerics = numerics

    def latents(
        self, x: Tensor, norms: LatentNorms, ratio: int, state: LayerState | None
    ) -> tuple[Rows, Tensor]:
        widths = [norms.q_weight.shape[0], norms.kv_weight.shape[0]]
        qr, kv = torch.split_with_sizes(x, widths, dim=-1)
        qr, kv = rms_norm(qr, norms.q_weight, norms.eps), rms_norm(kv, norms.kv_weight, norms.eps)
        rotate_(kv, self._rotation(ratio).forward)
        return qr, self._numerics.round_kv(kv, norms.rope_dim)

    def turn_heads(self, q: Tensor, eps: float, ratio: int) -> Tensor:
        return rotate_(rms_norm(q, None, eps), self._rotation(ratio).forward)

    def compress(self, kv: Tensor, score: Tensor, fold: Fold, state: CompressorState) -> None:
        compression = self._plan.compressions[fold.ratio]
        score = score + fold.ape.index_select(0, compression.phases)
        if compression.num_entries:
            recent_kv = recent_rows(state.kv, compression.look_back, kv, 0.0)
            recent_score = recent_rows(state.score, compression.look_back, score, float("-inf"))
            entries = pool_blocks(
                recent_kv.view(-1, fold.width),
                recent_score.view(-1, fold.width),
                compression.sources,
            )
            entries = rms_norm(entries.to(self._numerics.dtype), fold.norm_weight, fold.norm_eps)
            rotate_(entries, compression.rotation)
            entries = (
                self._index_values(entries)
                if fold.kind == "index"
                else self._numerics.round_kv(entries, fold.rope_dim)
            )
            write_rows_(state.entries, compression.rows, entries)
        ring_size = 2 * fold.ratio if fold.ratio == CSA else fold.ratio
        writes = self._plan.ring_writes[ring_size]
        write_rows_(state.kv, writes.rows, kv, writes.tokens)
        write_rows_(state.score, writes.rows, score, writes.tokens)

    def needs_choice(self, ratio: int, top_k: int) -> bool:
        seen = self._plan.entries[ratio]
        return seen is not None and seen.attended is None

    def pick(self, q: Tensor, weights: Tensor, keys: Tensor, top_k: int) -> Tensor:
        seen, sequences = self._plan.entries[CSA], self._plan.sequences
        assert seen is not None
        q = self._index_values(rotate_(q, self._rotation(CSA).forward))
        # visibility comes before the choice
        scores = score_entries(q, weights, keys, seen.rows, sequences, seen.bias)
        return pick_rows(scores, seen.rows, sequences, top_k)

    def attend(
        self,
        q: Tensor,
        kv: Tensor,
        ratio: int,
        state: LayerState | None,
        picks: Tensor | None,
        sink: Tensor,
        scale: float,
    ) -> Tensor:
        plan = self._plan
        bias, entries = plan.window.bias, None
        seen = plan.entries[ratio] if ratio != DENSE and state is not None else None
        if seen is not None and state is not None:
            bias, entries = seen.attention_bias, state.entries
            picks = seen.attended if picks is None else picks
        ring = state.window if state is not None else None
        if ring is not None and plan.window.look_back is None:
            self._write_window(ring, kv)
            window = ring
        else:
            window = recent_rows(ring, plan.window.look_back, kv)
        o = attend(q, window, plan.window.rows, entries, picks, bias, sink, scale)
        if ring is not None and plan.window.look_back is not None:
            self._write_window(ring, kv)
        # values carry the rotation of their own position: turn back by the query's
        return rotate_(o, self._rotation(ratio).inverse)

    def _write_window(self, ring: Tensor, kv: Tensor) -> None:
        writes = self._plan.ring_writes[self._window]
        write_rows_(ring, writes.rows, kv, writes.tokens)

    def _rotation(self, ratio: int) -> Rotation:
        return self._plan.plain_rotation if ratio == DENSE else self._plan.compressed_rotation

    def _index_values(self, x: Tensor) -> Tensor:
        """Hadamard, then the round trip. Without it the (orthogonal) transform cancels out."""
        return self._numerics.round_index(hadamard(x)) if self._numerics.rounds else x
