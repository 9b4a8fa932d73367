"""DeepSeek-V4's step by addresses on the device: nothing is asked of the host.

Kernels work out rows from positions, slots and block tables, so that a captured graph serves
whatever these hold when it is replayed.
"""

from torch import Tensor

from scission.common.layers.numerics import Numerics
from scission.common.model.batch import ForwardBatch
from scission.common.model.config import CSA, DENSE
from scission.common.model.deepseek_v4_state import CompressorState, LayerState
from scission.common.model.deepseek_v4_step import Fold, LatentNorms
from scission.common.model.step_plan import PlanGeometry, Rotation
from scission.kernels.attention import attend_sparse
from scission.kernels.cache import write_ring_
from scission.kernels.compressor import compress_
from scission.kernels.indexer import pick_entries
from scission.kernels.latents import index_queries, norm_latents, turn_heads_
from scission.kernels.linear import Rows
from scission.kernels.rope import step_rotations


class PlacedStep:
    """By addresses on the device."""

    quantizes = True

    def __init__(self, batch: ForwardBatch, geometry: PlanGeometry, numerics: Numerics) -> None:
        self.token_ids = batch.token_ids
        self._places = batch.places
        self._window = geometry.window
        self._rounds = numerics.rounds
        self.positions = positions = batch.places.positions
        turns = step_rotations(
            positions,
            geometry.plain_frequencies,
            geometry.compressed_frequencies,
            list(geometry.overlaps),
        )
        self._plain = Rotation(turns.plain, turns.plain_inverse)
        self._compressed = Rotation(turns.compressed, turns.compressed_inverse)
        # of the first position of each token's block, by ratio
        self._blocks = turns.blocks

    def latents(
        self, x: Tensor, norms: LatentNorms, ratio: int, state: LayerState | None
    ) -> tuple[Rows, Tensor]:
        ring = state.window if state is not None else None
        rotation = self._rotation(ratio).forward
        return norm_latents(
            x,
            norms.q_weight,
            norms.kv_weight,
            norms.eps,
            rotation,
            self._rounds,
            ring,
            self._window,
            self._places,
            keeps_values=not self._rounds,
        )

    def turn_heads(self, q: Tensor, eps: float, ratio: int) -> Tensor:
        return turn_heads_(q, eps, self._rotation(ratio).forward)

    def compress(self, kv: Tensor, score: Tensor, fold: Fold, state: CompressorState) -> None:
        compress_(
            kv,
            score,
            fold.ape,
            fold.norm_weight,
            fold.norm_eps,
            self._blocks[fold.ratio],
            state.kv,
            state.score,
            state.entries,
            fold.ratio,
            fold.kind if self._rounds else None,
            fold.rope_dim,
            self._places,
        )

    def needs_choice(self, ratio: int, top_k: int) -> bool:
        return self._places.max_context // ratio > top_k

    def pick(self, q: Tensor, weights: Tensor, keys: Tensor, top_k: int) -> Tensor:
        q = index_queries(q, self._rotation(CSA).forward, self._rounds)
        return pick_entries(q, weights, keys, top_k, CSA, self._places)

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
        assert state is not None
        inverse = self._rotation(ratio).inverse
        o = attend_sparse(
            q,
            kv,
            state.window,
            self._window,
            state.entries,
            picks,
            ratio,
            sink,
            scale,
            inverse,
            self._places,
        )
        if not self._places.is_single:
            # early queries have seen what late tokens overwrite
            write_ring_(state.window, kv, self._window, self._places)
        return o

    def _rotation(self, ratio: int) -> Rotation:
        return self._plain if ratio == DENSE else self._compressed
