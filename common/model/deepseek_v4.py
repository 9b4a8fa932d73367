"""DeepSeek-V4: hyper-connected layers of sparse attention over compressed keys, and of experts.

Reads top to bottom like the specification: model, layer, attention, compressor, indexer. One file
serves prefill and decode: a batch is flat and ragged, and what it means for the caches is planned
once a step (`step_plan`).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint.weights import Weights
from scission.common.layers.attention import GroupedOutput
from scission.common.layers.linear import (
    ColumnParallelLinear,
    Linear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from scission.common.layers.moe import HashRouter, MoE, ScoreRouter
from scission.common.layers.norm import RMSNorm
from scission.common.layers.numerics import Numerics
from scission.common.layers.rope import rope_frequencies
from scission.common.model.batch import ForwardBatch
from scission.common.model.config import CSA, DENSE, HCA, DeepseekV4Config
from scission.common.model.step_plan import PlanGeometry, StepPlan, plan_step
from scission.common.parallel.ranks import Ranks
from scission.kernels.attention import attend
from scission.kernels.cache import recent_rows, write_rows_
from scission.kernels.compressor import pool_blocks
from scission.kernels.hyper_connections import HyperConnection, hc_head, hc_post, hc_pre
from scission.kernels.indexer import hadamard, pick_rows, score_entries
from scission.kernels.norm import rms_norm
from scission.kernels.rope import rotate_

BLOCK_SIZE = 128  # tokens: the least common multiple of the ratios
NUM_LAYER_GROUPS = 4

OnLayers = Callable[[int, int], None]


class DeepseekV4:
    """The whole model. `forward` computes a batch's logits and writes its state."""

    def __init__(
        self,
        w: Weights,
        config: DeepseekV4Config,
        ranks: Ranks,
        numerics: Numerics,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        """Pulls every tensor it needs from the weights; complete afterwards.

        Args:
            block_size: tokens of a block of state, a multiple of BLOCK_SIZE.

        Raises:
            CheckpointError: a tensor is missing or not what the config says.
        """
        self.config = config
        self.layout = cache_layout(config, numerics, block_size)
        self.layer_groups = layer_groups(config.num_hidden_layers)
        d, eps = config.hidden_size, config.rms_norm_eps
        self._embed = VocabParallelEmbedding(w, "embed", config.vocab_size, d, ranks.tp, numerics)
        self._layers = [
            Layer(
                w.scope("layers", str(i)),
                config,
                ratio,
                i < config.num_hash_layers,
                ranks,
                numerics,
            )
            for i, ratio in enumerate(config.layer_ratios)
        ]
        self._hc_head = _hyper_connection(w, "hc_head", config, is_head=True)
        self._norm = RMSNorm(w, "norm", d, eps)
        self._head = VocabParallelHead(w, "head", config.vocab_size, d, ranks.tp)
        self._mtp = (
            MultiTokenPredictor(w.scope("mtp", "0"), config, ranks, numerics)
            if config.num_nextn_predict_layers
            else None
        )
        rope_dim = config.qk_rope_head_dim
        self._geometry = PlanGeometry(
            window=config.sliding_window,
            block_size=block_size,
            overlaps={ratio: ratio == CSA for ratio in sorted(set(config.layer_ratios) - {DENSE})},
            limits={CSA: config.index_topk, HCA: None},
            plain_frequencies=rope_frequencies(rope_dim, config.rope_theta).to(w.device),
            compressed_frequencies=rope_frequencies(
                rope_dim, config.compress_rope_theta, config.rope_scaling
            ).to(w.device),
        )
        # views of the storage that was used last
        self._bound: tuple[CacheStorage, list[LayerState]] | None = None

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
        streams = self.run_layers(batch, storage, on_layers)
        return self._logits(streams.index_select(0, batch.logits_at))

    def run_layers(
        self, batch: ForwardBatch, storage: CacheStorage, on_layers: OnLayers | None = None
    ) -> Tensor:
        """`forward` without the head: the streams [num_tokens, n, d] after the last layer."""
        plan = plan_step(batch, self._geometry)
        states = self._states(storage)
        x = self._embed(batch.token_ids)
        streams = x.unsqueeze(1).repeat(1, self.config.hc_mult, 1)
        for first, last in self.layer_groups:
            for layer, state in zip(self._layers[first:last], states[first:last], strict=True):
                streams = layer(streams, plan, state)
            if on_layers is not None:
                on_layers(first, last)
        return streams

    def draft_logits(self, streams: Tensor, batch: ForwardBatch) -> Tensor:
        """What the MTP layer expects after the next token, from a whole prompt's streams.

        Args:
            streams: [num_tokens, n, d], from `run_layers`.
            batch: the same positions, whole sequences from 0, with the NEXT token at each.

        Returns:
            [num_logits, vocab_size] float32 for the token after that, of the batch's `logits_at`.
        """
        assert self._mtp is not None, "the checkpoint has no MTP layer"
        assert not any(batch.starts), "the MTP layer keeps no window between steps"
        plan = plan_step(batch, self._geometry, keeps_window=False)
        x = self._mtp(self._embed(batch.token_ids), streams, plan)
        return self._head(x.index_select(0, batch.logits_at))

    def _logits(self, streams: Tensor) -> Tensor:
        return self._head(self._norm(hc_head(streams, self._hc_head)))

    def _states(self, storage: CacheStorage) -> "list[LayerState]":
        if self._bound is None or self._bound[0] is not storage:
            states = [_layer_state(storage, layer) for layer in range(len(self._layers))]
            self._bound = (storage, states)
        return self._bound[1]


class Layer:
    """Attention, then experts, each reading from and writing to the streams."""

    def __init__(
        self,
        w: Weights,
        config: DeepseekV4Config,
        ratio: int,
        is_hashed: bool,
        ranks: Ranks,
        numerics: Numerics,
    ) -> None:
        d, eps = config.hidden_size, config.rms_norm_eps
        self._hc_attention = _hyper_connection(w, "hc_attn", config)
        self._attention_norm = RMSNorm(w, "attn_norm", d, eps)
        self._attention = Attention(w.scope("attn"), config, ratio, ranks, numerics)
        self._hc_experts = _hyper_connection(w, "hc_ffn", config)
        self._experts_norm = RMSNorm(w, "ffn_norm", d, eps)
        self._experts = _mixture(w.scope("ffn"), config, is_hashed, ranks, numerics)

    def __call__(self, streams: Tensor, plan: StepPlan, state: "LayerState | None") -> Tensor:
        """[num_tokens, n, d] -> [num_tokens, n, d]; `state` None: a fresh window, not kept."""
        x, post, comb = hc_pre(streams, self._hc_attention)
        y = self._attention(self._attention_norm(x), plan, state)
        streams = hc_post(y, streams, post, comb)
        x, post, comb = hc_pre(streams, self._hc_experts)
        y = self._experts(self._experts_norm(x), plan.token_ids)
        return hc_post(y, streams, post, comb)


class Attention:
    """One key-value head for all queries: a sliding window, and compressed entries by ratio.

    Ratio 0 has the window alone, 128 (HCA) every entry, 4 (CSA) the entries the indexer picks.
    """

    def __init__(
        self, w: Weights, config: DeepseekV4Config, ratio: int, ranks: Ranks, numerics: Numerics
    ) -> None:
        d, head_dim, q_lora = config.hidden_size, config.head_dim, config.q_lora_rank
        eps, heads = config.rms_norm_eps, config.num_attention_heads
        self._ratio = ratio
        self._window = config.sliding_window
        self._numerics = numerics
        self._eps = eps
        self._head_dim = head_dim
        self._rope_dim = config.qk_rope_head_dim
        self._q_kv_split = [q_lora, head_dim]
        self._wq_a_wkv = Linear(
            [w.matrix("wq_a", q_lora, d), w.matrix("wkv", head_dim, d)], numerics
        )
        self._q_norm = RMSNorm(w, "q_norm", q_lora, eps)
        self._kv_norm = RMSNorm(w, "kv_norm", head_dim, eps)
        self._wq_b = ColumnParallelLinear(
            w, "wq_b", config.heads_dim, q_lora, ranks.tp, numerics, align=head_dim
        )
        tp = ranks.tp
        local_heads = self._wq_b.weight.shape[0] // head_dim
        first_head = tp.rank * -(-heads // tp.size)
        sink = w.tensor("attn_sink", (heads,), torch.float32)
        self._sink = sink[first_head : first_head + local_heads].contiguous()
        self._out = GroupedOutput(
            w, d, config.heads_dim, config.o_groups, config.o_lora_rank, tp, numerics
        )
        self._compressor: Compressor | None = None
        self._indexer: Indexer | None = None
        if ratio == DENSE:
            return
        fp32 = Numerics(torch.float32, rounds=False)
        self._compressor = Compressor(w.scope("compressor"), config, ratio, head_dim, numerics)
        matrices = list(self._compressor.projections)
        if ratio == CSA:
            self._indexer = Indexer(w.scope("indexer"), config, numerics)
            matrices += [self._indexer.head_weights, *self._indexer.compressor.projections]
        # everything that is projected from x in fp32, as one product
        self._states = Linear(matrices, fp32)
        self._state_widths = [matrix.out_features for matrix in matrices]

    def __call__(self, x: Tensor, plan: StepPlan, state: "LayerState | None") -> Tensor:
        """[num_tokens, d], normalised -> [num_tokens, d]."""
        rotation = plan.plain_rotation if self._ratio == DENSE else plan.compressed_rotation
        qr, kv = torch.split_with_sizes(self._wq_a_wkv(x), self._q_kv_split, dim=-1)
        qr, kv = self._q_norm(qr), self._kv_norm(kv)
        q = self._wq_b(qr).view(x.shape[0], -1, self._head_dim)
        q = rotate_(rms_norm(q, None, self._eps), rotation.forward)
        kv = self._numerics.round_kv(rotate_(kv, rotation.forward), self._rope_dim)

        bias, entries, entry_rows = plan.window.bias, None, None
        if self._compressor is not None and state is not None:
            entry_rows = self._compress(x, qr, plan, state)
            seen = plan.entries[self._ratio]
            if seen is not None:
                bias, entries = seen.attention_bias, state.entries

        ring = state.window if state is not None else None
        if ring is not None and plan.window.look_back is None:
            self._write_window(ring, kv, plan)
            window = ring
        else:
            window = recent_rows(ring, plan.window.look_back, kv)
        o = attend(
            q, window, plan.window.rows, entries, entry_rows, bias, self._sink, self._head_dim**-0.5
        )
        if ring is not None and plan.window.look_back is not None:
            self._write_window(ring, kv, plan)
        # values carry the rotation of their own position: turn back by the query's
        return self._out(rotate_(o, rotation.inverse))

    def _write_window(self, ring: Tensor, kv: Tensor, plan: StepPlan) -> None:
        writes = plan.ring_writes[self._window]
        write_rows_(ring, writes.rows, kv, writes.tokens)

    def _compress(
        self, x: Tensor, qr: Tensor, plan: StepPlan, state: "LayerState"
    ) -> Tensor | None:
        """Bring the compressed entries up to date; the rows that queries attend to, if any."""
        assert self._compressor is not None and state.compressor is not None
        projected = torch.split_with_sizes(self._states(x.float()), self._state_widths, dim=-1)
        self._compressor(projected[0], projected[1], plan, state.compressor)
        if self._indexer is not None:
            assert state.indexer is not None
            self._indexer.compressor(projected[3], projected[4], plan, state.indexer)
        seen = plan.entries[self._ratio]
        if seen is None or seen.attended is not None:
            return seen.attended if seen is not None else None
        assert self._indexer is not None and state.indexer is not None
        return self._indexer(qr, projected[2], plan, state.indexer.entries)


class Compressor:
    """Folds each block of `ratio` tokens into one entry; with overlap (CSA) of two blocks."""

    def __init__(
        self, w: Weights, config: DeepseekV4Config, ratio: int, width: int, numerics: Numerics,
        *, is_index: bool = False,
    ) -> None:  # fmt: skip
        self._ratio = ratio
        self._width = width
        self._is_index = is_index
        self._rope_dim = config.qk_rope_head_dim
        self._numerics = numerics
        projected = 2 * width if ratio == CSA else width
        self.projections = (
            w.matrix("wkv", projected, config.hidden_size),
            w.matrix("wgate", projected, config.hidden_size),
        )
        self._ring_size = 2 * ratio if ratio == CSA else ratio
        self._ape = w.tensor("ape", (ratio, projected), torch.float32)
        self._norm = RMSNorm(w, "norm", width, config.rms_norm_eps)

    def __call__(self, kv: Tensor, score: Tensor, plan: StepPlan, state: "CompressorState") -> None:
        """Write the entries that this step completes, and the rings.

        Args:
            kv, score: [num_tokens, width, doubled with overlap] float32, the two projections of x.
        """
        compression = plan.compressions[self._ratio]
        score = score + self._ape.index_select(0, compression.phases)
        if compression.num_entries:
            recent_kv = recent_rows(state.kv, compression.look_back, kv, 0.0)
            recent_score = recent_rows(state.score, compression.look_back, score, float("-inf"))
            entries = pool_blocks(
                recent_kv.view(-1, self._width),
                recent_score.view(-1, self._width),
                compression.sources,
            )
            entries = self._norm(entries.to(self._numerics.dtype))
            rotate_(entries, compression.rotation)
            entries = (
                _index_values(entries, self._numerics)
                if self._is_index
                else self._numerics.round_kv(entries, self._rope_dim)
            )
            write_rows_(state.entries, compression.rows, entries)
        writes = plan.ring_writes[self._ring_size]
        write_rows_(state.kv, writes.rows, kv, writes.tokens)
        write_rows_(state.score, writes.rows, score, writes.tokens)


class Indexer:
    """Picks the CSA entries that a query attends to, by small keys of its own."""

    def __init__(self, w: Weights, config: DeepseekV4Config, numerics: Numerics) -> None:
        heads, dim, d = config.index_n_heads, config.index_head_dim, config.hidden_size
        self._top_k = config.index_topk
        self.compressor = Compressor(
            w.scope("compressor"), config, CSA, dim, numerics, is_index=True
        )
        self.head_weights = w.matrix("weights_proj", heads, d)
        self._wq_b = Linear([w.matrix("wq_b", heads * dim, config.q_lora_rank)], numerics)
        self._dim = dim
        self._scale = dim**-0.5 * heads**-0.5
        self._numerics = numerics

    def __call__(self, qr: Tensor, head_weights: Tensor, plan: StepPlan, keys: Tensor) -> Tensor:
        """The rows of the best entries of each query: [num_tokens, top_k] int64.

        Args:
            qr: [num_tokens, q_lora], the attention's normalised low-rank query.
            head_weights: [num_tokens, num_heads] float32, of any sign.
            keys: the pool of index entries.
        """
        seen = plan.entries[CSA]
        assert seen is not None
        q = self._wq_b(qr).view(qr.shape[0], -1, self._dim)
        q = _index_values(rotate_(q, plan.compressed_rotation.forward), self._numerics)
        # visibility comes before the choice
        scores = score_entries(
            q, head_weights * self._scale, keys, seen.rows, plan.sequences, seen.bias
        )
        return pick_rows(scores, seen.rows, plan.sequences, self._top_k)


class MultiTokenPredictor:
    """The MTP layer: from position p's streams and token p + 1, the normalised state for p + 2."""

    def __init__(
        self, w: Weights, config: DeepseekV4Config, ranks: Ranks, numerics: Numerics
    ) -> None:
        d, eps = config.hidden_size, config.rms_norm_eps
        self._embed_norm = RMSNorm(w, "enorm", d, eps)
        self._stream_norm = RMSNorm(w, "hnorm", d, eps)
        self._e_proj = Linear([w.matrix("e_proj", d, d)], numerics)
        self._h_proj = Linear([w.matrix("h_proj", d, d)], numerics)
        self._layer = Layer(w, config, DENSE, is_hashed=False, ranks=ranks, numerics=numerics)
        self._hc_head = _hyper_connection(w, "hc_head", config, is_head=True)
        self._norm = RMSNorm(w, "norm", d, eps)

    def __call__(self, embedded: Tensor, streams: Tensor, plan: StepPlan) -> Tensor:
        """embedded [num_tokens, d] (next tokens), streams [num_tokens, n, d] -> [num_tokens, d]."""
        e = self._e_proj(self._embed_norm(embedded))
        h = self._h_proj(self._stream_norm(streams))
        streams = self._layer(e.unsqueeze(1) + h, plan, None)
        return self._norm(hc_head(streams, self._hc_head))


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


def layer_groups(num_layers: int) -> tuple[tuple[int, int], ...]:
    """[first, last) of up to NUM_LAYER_GROUPS groups of (nearly) equal size."""
    count = min(NUM_LAYER_GROUPS, num_layers)
    bounds = [group * num_layers // count for group in range(count + 1)]
    return tuple(itertools.pairwise(bounds))


def _layer_state(storage: CacheStorage, layer: int) -> LayerState:
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


def _index_values(x: Tensor, numerics: Numerics) -> Tensor:
    """Hadamard, then the round trip. Without rounding the (orthogonal) transform cancels out."""
    return numerics.round_index(hadamard(x)) if numerics.rounds else x


def _hyper_connection(
    w: Weights, name: str, config: DeepseekV4Config, *, is_head: bool = False
) -> HyperConnection:
    n = config.hc_mult
    parts = [n] if is_head else [n, n, n * n]
    scale = w.tensor(f"{name}_scale", (len(parts),), torch.float32)
    return HyperConnection(
        fn=w.tensor(f"{name}_fn", (sum(parts), n * config.hidden_size), torch.float32),
        scale=torch.cat([scale[i : i + 1].expand(part) for i, part in enumerate(parts)]),
        base=w.tensor(f"{name}_base", (sum(parts),), torch.float32),
        norm_eps=config.rms_norm_eps,
        eps=config.hc_eps,
        num_iterations=0 if is_head else config.hc_sinkhorn_iters,
    )


def _mixture(
    w: Weights, config: DeepseekV4Config, is_hashed: bool, ranks: Ranks, numerics: Numerics
) -> MoE:
    d, num_experts = config.hidden_size, config.n_routed_experts
    top_k, scaling = config.num_experts_per_tok, config.routed_scaling_factor
    gate = w.scope("gate")
    router: ScoreRouter | HashRouter = (
        HashRouter(gate, d, num_experts, top_k, scaling, config.vocab_size)
        if is_hashed
        else ScoreRouter(gate, d, num_experts, top_k, scaling)
    )
    inner, limit = config.moe_intermediate_size, config.swiglu_limit
    return MoE(w, router, d, inner, num_experts, limit, ranks.ep, numerics)
