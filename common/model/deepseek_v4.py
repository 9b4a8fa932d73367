"""DeepSeek-V4: hyper-connected layers of sparse attention over compressed keys, and of experts.

Reads top to bottom like the specification: model, layer, attention, compressor, indexer. It serves
prefill and decode alike: a batch is flat and ragged. What layers do with positions and state is a
`Step`'s: by rows that the host has planned (`deepseek_v4_step`), or by addresses on the device
(`deepseek_v4_placed`).
"""

import itertools
from typing import Literal

import torch
from torch import Tensor

from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint.weights import Weights
from scission.common.layers.attention import Float32Linear, GroupedOutput
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
from scission.common.model.architecture import OnLayers
from scission.common.model.batch import ForwardBatch
from scission.common.model.config import CSA, DENSE, HCA, DeepseekV4Config
from scission.common.model.deepseek_v4_placed import PlacedStep
from scission.common.model.deepseek_v4_state import (
    BLOCK_SIZE,
    LayerState,
    cache_layout,
    layer_state,
)
from scission.common.model.deepseek_v4_step import (
    Fold,
    LatentNorms,
    ListedStep,
    Step,
)
from scission.common.model.step_plan import PlanGeometry, plan_step
from scission.common.parallel.ranks import Ranks
from scission.kernels.attention import can_attend_sparse
from scission.kernels.hyper_connections import (
    HyperConnection,
    Streams,
    hc_read,
    hc_read_head,
    hc_values,
    hc_write,
)
from scission.kernels.indexer import can_pick
from scission.kernels.linear import Rows
from scission.kernels.target import target_of

NUM_LAYER_GROUPS = 4


class DeepseekV4:
    """The whole model. `forward` computes a batch's logits and writes its state."""

    def __init__(
        self,
        w: Weights,
        config: DeepseekV4Config,
        ranks: Ranks,
        numerics: Numerics,
        block_size: int = BLOCK_SIZE,
        *,
        is_placed: bool | None = None,
    ) -> None:
        """Pulls every tensor it needs from the weights; complete afterwards.

        Args:
            block_size: tokens of a block of state, a multiple of BLOCK_SIZE.
            is_placed: goes by addresses on the device (`PlacedStep`); None: where there are kernels
                for that.

        Raises:
            CheckpointError: a tensor is missing or not what the config says.
        """
        self.config = config
        self._numerics = numerics
        if is_placed is None:
            is_placed = (
                target_of(w.device) is not None
                and numerics.dtype == torch.bfloat16
                and can_attend_sparse(config.head_dim)
                and can_pick(config.index_n_heads, config.index_head_dim)
            )
        self._is_placed = is_placed
        self.captures = is_placed and target_of(w.device) is not None
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
        streams = self._run_layers(batch, storage, on_layers)
        if batch.logits_at.shape[0] != batch.num_tokens:
            streams = streams.select(batch.logits_at)
        norm = self._norm
        return self._head(hc_read_head(streams, self._hc_head, norm.weight, norm.eps))

    def run_layers(
        self, batch: ForwardBatch, storage: CacheStorage, on_layers: OnLayers | None = None
    ) -> Tensor:
        """`forward` without the head: the streams [num_tokens, n, d] after the last layer."""
        return hc_values(self._run_layers(batch, storage, on_layers))

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
        step = ListedStep(plan, self._geometry.window, self._numerics)
        x = self._mtp(self._embed(batch.token_ids), streams, step)
        return self._head(x.index_select(0, batch.logits_at))

    def _step(self, batch: ForwardBatch) -> Step:
        if self._is_placed:
            return PlacedStep(batch, self._geometry, self._numerics)
        plan = plan_step(batch, self._geometry)
        return ListedStep(plan, self._geometry.window, self._numerics)

    def _run_layers(
        self, batch: ForwardBatch, storage: CacheStorage, on_layers: OnLayers | None
    ) -> Streams:
        step = self._step(batch)
        states = self._states(storage)
        streams = Streams.of(self._embed(batch.token_ids), self.config.hc_mult)
        for first, last in self.layer_groups:
            for layer, state in zip(self._layers[first:last], states[first:last], strict=True):
                streams = layer(streams, step, state)
            if on_layers is not None:
                on_layers(first, last)
        return streams

    def _states(self, storage: CacheStorage) -> "list[LayerState]":
        if self._bound is None or self._bound[0] is not storage:
            states = [layer_state(storage, layer) for layer in range(len(self._layers))]
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

    def __call__(self, streams: Streams, step: Step, state: LayerState | None) -> Streams:
        """`state` None: a fresh window, not kept."""
        norm = self._attention_norm
        x, mix = hc_read(
            streams, self._hc_attention, norm.weight, norm.eps, quantizes=step.quantizes
        )
        streams = hc_write(self._attention(x, step, state), streams, mix)
        norm = self._experts_norm
        x, mix = hc_read(streams, self._hc_experts, norm.weight, norm.eps, quantizes=step.quantizes)
        y = self._experts.unsummed(x, step.token_ids, step.positions)
        return hc_write(y, streams, mix)


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
        self._eps = eps
        self._head_dim = head_dim
        self._wq_a_wkv = Linear(
            [w.matrix("wq_a", q_lora, d), w.matrix("wkv", head_dim, d)], numerics
        )
        self._norms = LatentNorms(
            RMSNorm(w, "q_norm", q_lora, eps).weight,
            RMSNorm(w, "kv_norm", head_dim, eps).weight,
            eps,
            config.qk_rope_head_dim,
        )
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
        self._compressor = Compressor(w.scope("compressor"), config, ratio, head_dim, "kv")
        matrices = list(self._compressor.projections)
        if ratio == CSA:
            self._indexer = Indexer(w.scope("indexer"), config, numerics)
            matrices += [self._indexer.head_weights, *self._indexer.compressor.projections]
        # everything that is projected from x in fp32, as one product
        self._states = Float32Linear(matrices, numerics.dtype)
        self._state_widths = [matrix.out_features for matrix in matrices]

    def __call__(self, x: Rows, step: Step, state: LayerState | None) -> Tensor:
        """[num_tokens, d], normalised -> [num_tokens, d]."""
        latent, kv = step.latents(self._wq_a_wkv(x), self._norms, self._ratio, state)
        q = self._wq_b(latent).view(kv.shape[0], -1, self._head_dim)
        q = step.turn_heads(q, self._eps, self._ratio)
        picks = None
        if self._compressor is not None and state is not None:
            picks = self._compress(x, latent, step, state)
        o = step.attend(q, kv, self._ratio, state, picks, self._sink, self._head_dim**-0.5)
        return self._out(o)

    def _compress(self, x: Rows, latent: Rows, step: Step, state: LayerState) -> Tensor | None:
        """Bring the compressed entries up to date; the choice of them, where there is one."""
        assert self._compressor is not None and state.compressor is not None
        projected = torch.split_with_sizes(self._states(x), self._state_widths, dim=-1)
        step.compress(projected[0], projected[1], self._compressor.fold, state.compressor)
        if self._indexer is None:
            return None
        assert state.indexer is not None
        step.compress(projected[3], projected[4], self._indexer.compressor.fold, state.indexer)
        return self._indexer(latent, projected[2], step, state.indexer.entries)


class Compressor:
    """Folds each block of `ratio` tokens into one entry; with overlap (CSA) of two blocks."""

    def __init__(
        self,
        w: Weights,
        config: DeepseekV4Config,
        ratio: int,
        width: int,
        kind: Literal["kv", "index"],
    ) -> None:
        projected = 2 * width if ratio == CSA else width
        self.projections = (
            w.matrix("wkv", projected, config.hidden_size),
            w.matrix("wgate", projected, config.hidden_size),
        )
        eps = config.rms_norm_eps
        self.fold = Fold(
            ratio,
            width,
            w.tensor("ape", (ratio, projected), torch.float32),
            RMSNorm(w, "norm", width, eps).weight,
            eps,
            config.qk_rope_head_dim,
            kind,
        )


class Indexer:
    """Picks the CSA entries that a query attends to, by small keys of its own."""

    def __init__(self, w: Weights, config: DeepseekV4Config, numerics: Numerics) -> None:
        heads, dim, d = config.index_n_heads, config.index_head_dim, config.hidden_size
        self._top_k = config.index_topk
        self.compressor = Compressor(w.scope("compressor"), config, CSA, dim, "index")
        self.head_weights = w.matrix("weights_proj", heads, d)
        self._wq_b = Linear([w.matrix("wq_b", heads * dim, config.q_lora_rank)], numerics)
        self._dim = dim

    def __call__(
        self, latent: Rows, head_weights: Tensor, step: Step, keys: Tensor
    ) -> Tensor | None:
        """The rows of the best entries of each query; None where each may attend to all it sees.

        Args:
            latent: [num_tokens, q_lora], the attention's normalised low-rank query.
            head_weights: [num_tokens, num_heads] float32, of any sign.
            keys: the pool of index entries.
        """
        if not step.needs_choice(CSA, self._top_k):
            return None
        q = self._wq_b(latent).view(head_weights.shape[0], -1, self._dim)
        # without the factor dim ** -0.5 heads ** -0.5 that all scores have: it picks the same
        return step.pick(q, head_weights, keys, self._top_k)


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

    def __call__(self, embedded: Tensor, streams: Tensor, step: Step) -> Tensor:
        """embedded [num_tokens, d] (next tokens), streams [num_tokens, n, d] -> [num_tokens, d]."""
        e = self._e_proj(self._embed_norm(embedded))
        h = self._h_proj(self._stream_norm(streams))
        after = self._layer(Streams(e.unsqueeze(1) + h), step, None)
        return hc_read_head(after, self._hc_head, self._norm.weight, self._norm.eps)


def layer_groups(num_layers: int) -> tuple[tuple[int, int], ...]:
    """[first, last) of up to NUM_LAYER_GROUPS groups of (nearly) equal size."""
    count = min(NUM_LAYER_GROUPS, num_layers)
    bounds = [group * num_layers // count for group in range(count + 1)]
    return tuple(itertools.pairwise(bounds))


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
