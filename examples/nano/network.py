"""DeepSeek-V4 for training: differentiable, over whole rows of equal length, layers stacked.

The same function as the served model (tests/unit/examples/test_nano_network.py holds them
together), written for the other direction: parameters of one kind lie in one tensor, a layer after
the other, so that rounding and the optimizer treat them at once; what depends on tokens alone runs
over all tokens of a step and compiles once; every expert runs on every token. Weights and
activations pass the roundings of inference with a straight-through gradient. The choice of the
indexer has no gradient: its scores are trained to follow the attention over the entries.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Parameters = dict[str, Tensor]
FP8, FP4 = "fp8", "fp4"

# which matrices are stored in which format; every other tensor is bf16 or fp32
FORMATS = {
    "wq_a": FP8, "wq_b": FP8, "wkv": FP8, "wo_a": FP8, "wo_b": FP8, "index_wq_b": FP8,
    "shared_w1": FP8, "shared_w2": FP8, "shared_w3": FP8, "e_proj": FP8, "h_proj": FP8,
    "w1": FP4, "w2": FP4, "w3": FP4,
}  # fmt: skip


@dataclass(frozen=True)
class Roundings:
    """What is rounded in a forward pass; `dtype` flows between the fp32 islands."""

    dtype: torch.dtype = torch.bfloat16
    activations: bool = True
    weights: bool = True


def powers_of_two_above(x: Tensor) -> Tensor:
    """The smallest power of two >= x, of positive fp32 values."""
    return ((x.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def _blocks(x: Tensor, block: int) -> tuple[Tensor, int]:
    pad = -x.shape[-1] % block
    padded = F.pad(x, (0, pad)) if pad else x
    return padded.float().unflatten(-1, (-1, block)), pad


def round_fp8(x: Tensor, block: int) -> Tensor:
    """The e4m3 round trip of blocks of the last dim, straight through for gradients."""
    values, _ = _blocks(x.detach(), block)
    amax = values.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    scale = powers_of_two_above(amax / 448.0)
    rounded = ((values / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    return x + (rounded[..., : x.shape[-1]].to(x.dtype) - x.detach())


def round_fp4(x: Tensor, block: int) -> Tensor:
    """The e2m1 round trip of blocks of the last dim, straight through for gradients."""
    values, _ = _blocks(x.detach(), block)
    amax = values.abs().amax(-1, keepdim=True).clamp_min(6.0 * 2.0**-126)
    scale = powers_of_two_above(amax / 6.0)
    values = values / scale
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    rounded = (torch.round(values / step) * step * scale).flatten(-2)
    return x + (rounded[..., : x.shape[-1]].to(x.dtype) - x.detach())


def round_fp8_matrix(w: Tensor) -> Tensor:
    """The round trip of [.., out, in] in 128 x 128 blocks, straight through."""
    rows, columns = w.shape[-2:]
    padded = F.pad(w.detach(), (0, -columns % 128, 0, -rows % 128))
    blocks = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    amax = blocks.abs().amax((-3, -1), keepdim=True).clamp_min(448.0 * 2.0**-126)
    scale = powers_of_two_above(amax / 448.0)
    rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    rounded = rounded.flatten(-4, -3).flatten(-2)[..., :rows, :columns]
    return w + (rounded - w.detach())


def rounded_weights(p: Parameters, r: Roundings) -> Parameters:
    """Every parameter as inference reads it: matrices through their stored format, in `dtype`."""
    result = {}
    for name, w in p.items():
        kind = FORMATS.get(name)
        if kind == FP8 and r.weights:
            w = round_fp8_matrix(w)
        elif kind == FP4 and r.weights:
            w = round_fp4(w, 32)
        is_matrix = kind is not None or name.endswith(("wkv", "wgate", "embed", "weights_proj"))
        result[name] = w.to(r.dtype) if is_matrix else w
    return result


def initial_parameters(config: Mapping[str, Any], generator: torch.Generator) -> Parameters:
    """fp32, on the CPU; the first dim of most is the layer (the MTP layer last)."""
    d, heads, dim = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    q_lora, n = config["q_lora_rank"], config["hc_mult"]
    groups, rank = config["o_groups"], config["o_lora_rank"]
    experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
    ratios = config["compress_ratios"]
    num, csa, hca = len(ratios), ratios.count(4), ratios.count(128)
    index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
    vocab, hashed = config["vocab_size"], config["num_hash_layers"]

    def matrix(*shape: int, gain: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * gain * shape[-1] ** -0.5

    # streams begin as equal copies: each sublayer reads their mean, and writes to them unequally
    base = torch.zeros(num, (2 + n) * n)
    base[:, :n] = -math.log(n - 1)
    base[:, 2 * n :] = (4.0 * torch.eye(n)).flatten()
    noise = torch.randn(base.shape, generator=generator)
    noise[:, 2 * n :] = 0
    p = {
        "embed": torch.randn(vocab, d, generator=generator) * 0.5,
        "head": matrix(vocab, d, gain=0.3),
        "norm": torch.ones(d),
        "hc_head_fn": torch.zeros(2, n, n * d),
        "hc_head_base": torch.full((2, n), -math.log(n - 1)),
        "hc_head_scale": torch.ones(2, 1),
        "attn_norm": torch.ones(num, d),
        "ffn_norm": torch.ones(num, d),
        "wq_a": matrix(num, q_lora, d),
        "q_norm": torch.ones(num, q_lora),
        "wq_b": matrix(num, heads * dim, q_lora),
        "wkv": matrix(num, dim, d),
        "kv_norm": torch.ones(num, dim),
        "wo_a": matrix(num, groups * rank, heads * dim // groups),
        "wo_b": matrix(num, d, groups * rank, gain=0.3),
        "attn_sink": torch.zeros(num, heads),
        "gate": matrix(num, experts, d),
        "gate_bias": torch.zeros(num, experts),
        "tid2eid": torch.rand(hashed, vocab, experts, generator=generator)
        .topk(config["num_experts_per_tok"])
        .indices,
        "w1": matrix(num, experts, inner, d),
        "w2": matrix(num, experts, d, inner, gain=0.3),
        "w3": matrix(num, experts, inner, d),
        "shared_w1": matrix(num, inner, d),
        "shared_w2": matrix(num, d, inner, gain=0.3),
        "shared_w3": matrix(num, inner, d),
        "csa_ape": torch.zeros(csa, 4, 2 * dim),
        "csa_wkv": matrix(csa, 2 * dim, d),
        "csa_wgate": matrix(csa, 2 * dim, d),
        "csa_norm": torch.ones(csa, dim),
        "hca_ape": torch.zeros(hca, 128, dim),
        "hca_wkv": matrix(hca, dim, d),
        "hca_wgate": matrix(hca, dim, d),
        "hca_norm": torch.ones(hca, dim),
        "index_wq_b": matrix(csa, index_heads * index_dim, q_lora),
        "index_weights_proj": matrix(csa, index_heads, d),
        "index_ape": torch.zeros(csa, 4, 2 * index_dim),
        "index_wkv": matrix(csa, 2 * index_dim, d),
        "index_wgate": matrix(csa, 2 * index_dim, d),
        "index_norm": torch.ones(csa, index_dim),
        "e_proj": matrix(1, d, d),
        "h_proj": matrix(1, d, d),
        "enorm": torch.ones(1, d),
        "hnorm": torch.ones(1, d),
        "mtp_norm": torch.ones(1, d),
    }
    for part in ("attn", "ffn"):
        p[f"hc_{part}_fn"] = matrix(num, (2 + n) * n, n * d, gain=0.1)
        p[f"hc_{part}_base"] = base + 0.3 * noise.roll(int(part == "ffn"), 0)
        p[f"hc_{part}_scale"] = torch.ones(num, 3)
    return p


def rope_frequencies(config: Mapping[str, Any], *, is_compressed: bool) -> Tensor:
    """Radians per position of each channel pair, [rope_dim / 2] float32."""
    dim = config["qk_rope_head_dim"]
    base = config["compress_rope_theta" if is_compressed else "rope_theta"]
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / torch.pow(torch.tensor(float(base)), exponents)
    if not is_compressed:
        return frequencies
    yarn = config["rope_scaling"]

    def pair_of(turns: float) -> float:
        positions = yarn["original_max_position_embeddings"]
        return float(dim * math.log(positions / (turns * 2 * math.pi)) / (2 * math.log(base)))

    low = max(math.floor(pair_of(yarn["beta_fast"])), 0)
    high: float = min(math.ceil(pair_of(yarn["beta_slow"])), dim - 1)
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / yarn["factor"] * ramp + frequencies * (1 - ramp)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the last channels of x [.., tokens, (heads,) dim] by pairs; cos, sin [tokens, pairs]."""
    width = 2 * cos.shape[-1]
    plain, pairs = x[..., :-width], x[..., -width:].float().unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([plain, turned.to(x.dtype)], -1)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    values = x.float()
    y = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """streams [tokens, n, d] -> x [tokens, d], post [tokens, n], comb [tokens, n, n]."""
    n = streams.shape[1]
    m = hc_coefficients(streams, fn, eps)
    pre = torch.sigmoid(m[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (m[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    x = (pre.unsqueeze(-1) * streams).sum(1)
    return x.to(streams.dtype), post, comb


def hc_coefficients(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    v = streams.flatten(1)
    inverse_rms = torch.rsqrt(v.float().square().mean(-1, keepdim=True) + eps)
    return F.linear(v, fn.to(v.dtype)).float() * inverse_rms


def hc_post(y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    n = streams.shape[1]
    outs = []
    for k in range(n):
        out = post[:, k : k + 1] * y
        for j in range(n):
            out = out + comb[:, j, k : k + 1] * streams[:, j]
        outs.append(out.to(streams.dtype))
    return torch.stack(outs, 1)


def hc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float) -> Tensor:
    pre = torch.sigmoid(hc_coefficients(streams, fn, eps) * scale + base) + eps
    return (pre.unsqueeze(-1) * streams).sum(1).to(streams.dtype)


def hadamard(x: Tensor) -> Tensor:
    width = x.shape[-1]
    y, step = x, 1
    while step < width:
        pairs = y.unflatten(-1, (-1, 2, step))
        y = torch.stack(
            [pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2
        )
        y = y.flatten(-3)
        step *= 2
    return y * width**-0.5


def linear(x: Tensor, w: Tensor, rounds: bool) -> Tensor:
    return F.linear(round_fp8(x, 128) if rounds else x, w)


def before_attention(
    streams: Tensor, p: Parameters, cos: Tensor, sin: Tensor, c: "Constants"
) -> tuple[Tensor, ...]:
    """Everything up to the scores that each token has alone: x, post, comb, qr, q, kv."""
    x, post, comb = hc_pre(
        streams, p["hc_attn_fn"], p["hc_attn_base"], p["hc_attn_scale"], c.eps, c.iterations
    )
    x = rms_norm(x, p["attn_norm"], c.eps)
    inputs = round_fp8(x, 128) if c.rounds else x
    qr = rms_norm(F.linear(inputs, p["wq_a"]), p["q_norm"], c.eps)
    kv = rms_norm(F.linear(inputs, p["wkv"]), p["kv_norm"], c.eps)
    q = linear(qr, p["wq_b"], c.rounds).unflatten(-1, (c.heads, -1))
    q = rotate(rms_norm(q, None, c.eps), cos.unsqueeze(-2), sin.unsqueeze(-2))
    kv = round_kv(rotate(kv, cos, sin), c)
    return x, post, comb, qr, q, kv


def round_kv(kv: Tensor, c: "Constants") -> Tensor:
    if not c.rounds:
        return kv
    return torch.cat([round_fp8(kv[..., : -c.rope], 64), kv[..., -c.rope :]], -1)


def after_attention(
    o: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    experts: Tensor | None,
    p: Parameters,
    cos: Tensor,
    sin: Tensor,
    c: "Constants",
) -> tuple[Tensor, Tensor]:
    """The output projection, then the experts: new streams, and how many tokens each took."""
    o = rotate(o, cos.unsqueeze(-2), -sin.unsqueeze(-2)).flatten(-2).unflatten(-1, (c.groups, -1))
    wo_a = p["wo_a"].unflatten(0, (c.groups, -1))
    z = torch.einsum("tgi,gri->tgr", o, wo_a).flatten(-2)
    streams = hc_post(linear(z, p["wo_b"], c.rounds), streams, post, comb)
    x, post, comb = hc_pre(
        streams, p["hc_ffn_fn"], p["hc_ffn_base"], p["hc_ffn_scale"], c.eps, c.iterations
    )
    x = rms_norm(x, p["ffn_norm"], c.eps)
    scores = torch.sqrt(F.softplus(F.linear(x.float(), p["gate"])))
    if experts is None:
        experts = (scores.detach() + p["gate_bias"]).topk(c.top_k, dim=-1).indices
    chosen = torch.zeros_like(scores).scatter(1, experts, 1.0)
    weights = scores * chosen
    weights = weights / weights.sum(-1, keepdim=True) * c.scaling
    inputs = round_fp8(x, 128) if c.rounds else x
    # every expert runs: the ones not chosen have weight 0
    w1, w3, w2 = p["w1"].flatten(0, 1), p["w3"].flatten(0, 1), p["w2"]
    inner = gated(F.linear(inputs, w1), F.linear(inputs, w3), c.limit)
    inner = (inner.unflatten(-1, (w2.shape[0], -1)) * weights.unsqueeze(-1)).to(x.dtype)
    inner = (round_fp8(inner, 128) if c.rounds else inner).flatten(-2)
    y = F.linear(inner, w2.transpose(0, 1).flatten(1))
    shared = gated(F.linear(inputs, p["shared_w1"]), F.linear(inputs, p["shared_w3"]), c.limit)
    y = y + linear(shared.to(x.dtype), p["shared_w2"], c.rounds)
    return hc_post(y, streams, post, comb), chosen.sum(0).detach()


def gated(a: Tensor, b: Tensor, limit: float) -> Tensor:
    return F.silu(a.float().clamp(max=limit)) * b.float().clamp(-limit, limit)


def pooled(u: Tensor, gates: Tensor, ratio: int) -> Tensor:
    """u, gates [rows, tokens, channels] -> entries [rows, tokens / ratio, width] float32."""
    u, gates = u.float().unflatten(1, (-1, ratio)), gates.unflatten(1, (-1, ratio))
    if ratio == 4:  # the block before gives its first half, the block itself its second
        width = u.shape[-1] // 2
        before_u = F.pad(u[:, :-1, :, :width], (0, 0, 0, 0, 1, 0))
        before = F.pad(gates[:, :-1, :, :width], (0, 0, 0, 0, 1, 0), value=float("-inf"))
        u = torch.cat([before_u, u[..., width:]], 2)
        gates = torch.cat([before, gates[..., width:]], 2)
    return (gates.softmax(2) * u).sum(2)


@dataclass(frozen=True)
class Constants:
    """The numbers of a config that the pieces need."""

    heads: int
    rope: int
    groups: int
    top_k: int
    scaling: float
    limit: float
    eps: float
    iterations: int
    rounds: bool


Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class Network:
    """The function of the model; parameters are given with each call."""

    def __init__(
        self,
        config: Mapping[str, Any],
        roundings: Roundings,
        device: torch.device,
        compiled: Compile = lambda f: f,
    ) -> None:
        self.config = config
        self.roundings = roundings
        self.ratios: list[int] = config["compress_ratios"]
        self.device = device
        self.constants = Constants(
            heads=config["num_attention_heads"],
            rope=config["qk_rope_head_dim"],
            groups=config["o_groups"],
            top_k=config["num_experts_per_tok"],
            scaling=config["routed_scaling_factor"],
            limit=config["swiglu_limit"],
            eps=config["rms_norm_eps"],
            iterations=config["hc_sinkhorn_iters"],
            rounds=roundings.activations,
        )
        self._before = compiled(before_attention)
        self._after = compiled(after_attention)
        self._tables: dict[tuple[bool, int], tuple[Tensor, Tensor]] = {}
        self._core = compiled(_attend)

    def rotation(self, is_compressed: bool, length: int) -> tuple[Tensor, Tensor]:
        key = (is_compressed, length)
        if key not in self._tables:
            frequencies = rope_frequencies(self.config, is_compressed=is_compressed)
            angles = torch.arange(length, dtype=torch.float32).unsqueeze(-1) * frequencies
            self._tables[key] = (angles.cos().to(self.device), angles.sin().to(self.device))
        return self._tables[key]

    def __call__(
        self, p: Parameters, ids: Tensor, *, is_sparse: bool, with_draft: bool = True
    ) -> "Outputs":
        """
        Args:
            p: as `rounded_weights` gives them.
            ids: [rows, tokens] int64, tokens a multiple of 128.
            is_sparse: whether queries see the indexer's choice or every entry.

        Returns:
            normalised states (before the head) [rows * tokens, d] of the model and of the draft
            layer (of which a row's last position is void), the indexer's loss, experts' loads.
        """
        rows, length = ids.shape
        n = self.config["hc_mult"]
        flat = ids.flatten()
        x = F.embedding(flat, p["embed"]).to(self.roundings.dtype)
        streams = x.unsqueeze(1).expand(-1, n, -1).contiguous()
        losses, loads = [], []
        split = {name: p[name].unbind(0) for name in _PER_LAYER}
        main = self.config["num_hidden_layers"]
        for layer in range(main):
            streams, loss, load = self._layer(
                p, split, layer, streams, flat, rows, length, is_sparse
            )
            loads.append(load)
            if loss is not None:
                losses.append(loss)
        eps = self.constants.eps

        def read(streams: Tensor, head: int, norm: Tensor) -> Tensor:
            names = ("fn", "base", "scale")
            fn, base, scale = (p[f"hc_head_{name}"][head] for name in names)
            return rms_norm(hc_head(streams, fn, base, scale, eps), norm, eps)

        state = read(streams, 0, p["norm"])
        draft = None
        if with_draft:
            following = ids.roll(-1, 1).flatten()
            rounds = self.constants.rounds
            e = F.embedding(following, p["embed"]).to(self.roundings.dtype)
            e = linear(rms_norm(e, p["enorm"][0], eps), p["e_proj"][0], rounds)
            h = linear(rms_norm(streams, p["hnorm"][0], eps), p["h_proj"][0], rounds)
            streams = e.unsqueeze(1) + h
            streams, _, load = self._layer(
                p, split, main, streams, following, rows, length, is_sparse
            )
            loads.append(load)
            draft = read(streams, 1, p["mtp_norm"][0])
        return Outputs(state, draft, torch.stack(losses).mean(), torch.stack(loads))

    def _layer(
        self, p: Parameters, split: dict[str, tuple[Tensor, ...]], layer: int, streams: Tensor,
        ids: Tensor, rows: int, length: int, is_sparse: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        ratio = self.ratios[layer]
        own = {name: parts[layer] for name, parts in split.items()}
        cos, sin = self.rotation(ratio != 0, length)
        cos, sin = cos.repeat(rows, 1), sin.repeat(rows, 1)
        x, post, comb, qr, q, kv = self._before(streams, own, cos, sin, self.constants)
        loss, entries, scores = None, None, None
        x_rows = x.unflatten(0, (rows, length))
        if ratio:
            prefix = "csa" if ratio == 4 else "hca"
            stage = self.ratios[:layer].count(ratio)
            entries = self._entries(p, prefix, stage, x_rows, ratio)
            if ratio == 4:
                scores = self._index_scores(p, stage, x_rows.detach(), qr.detach(), rows, length)
        arguments = (
            q.unflatten(0, (rows, length)), kv.unflatten(0, (rows, length)), entries, scores,
            own["attn_sink"], self.config["sliding_window"], ratio,
            self.config["index_topk"] if is_sparse else 0,
        )  # fmt: skip
        if length > 512 and torch.is_grad_enabled():
            o, loss = checkpoint(_attend, *arguments, use_reentrant=False)
        else:
            o, loss = self._core(*arguments)
        experts = p["tid2eid"][layer][ids] if layer < self.config["num_hash_layers"] else None
        streams, load = self._after(
            o.flatten(0, 1), streams, post, comb, experts, own, cos, sin, self.constants
        )
        return streams, loss if ratio == 4 else None, load

    def _entries(self, p: Parameters, prefix: str, stage: int, x: Tensor, ratio: int) -> Tensor:
        """x [rows, tokens, d] -> [rows, tokens / ratio, width], rotated; not yet rounded: index."""
        u = F.linear(x, p[f"{prefix}_wkv"][stage])
        gates = F.linear(x, p[f"{prefix}_wgate"][stage]).float()
        gates = gates + p[f"{prefix}_ape"][stage].repeat(x.shape[1] // ratio, 1)
        entries = pooled(u, gates, ratio).to(self.roundings.dtype)
        entries = rms_norm(entries, p[f"{prefix}_norm"][stage], self.constants.eps)
        cos, sin = self.rotation(True, x.shape[1])
        entries = rotate(entries, cos[::ratio], sin[::ratio])
        return entries if prefix == "index" else round_kv(entries, self.constants)

    def _index_scores(
        self, p: Parameters, stage: int, x: Tensor, qr: Tensor, rows: int, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [rows, tokens, heads, dim], head weights [.., heads] and keys [.., dim]."""
        heads, dim = self.config["index_n_heads"], self.config["index_head_dim"]
        q = linear(qr, p["index_wq_b"][stage], self.constants.rounds).unflatten(-1, (heads, dim))
        q = q.unflatten(0, (rows, length))
        cos, sin = self.rotation(True, length)
        q = rotate(q, cos.unsqueeze(-2), sin.unsqueeze(-2))
        keys = self._entries(p, "index", stage, x, 4)
        if self.constants.rounds:
            q, keys = round_fp4(hadamard(q), 32), round_fp4(hadamard(keys), 32)
        weights = F.linear(x, p["index_weights_proj"][stage]).float() * (dim**-0.5 * heads**-0.5)
        return q, weights, keys


_PER_LAYER = (
    "hc_attn_fn", "hc_attn_base", "hc_attn_scale", "hc_ffn_fn", "hc_ffn_base", "hc_ffn_scale",
    "attn_norm", "ffn_norm", "wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b",
    "attn_sink", "gate", "gate_bias", "w1", "w2", "w3", "shared_w1", "shared_w2", "shared_w3",
)  # fmt: skip


@dataclass
class Outputs:
    state: Tensor
    draft: Tensor | None
    index_loss: Tensor
    loads: Tensor


def best_entries(scores: Tensor, top_k: int) -> Tensor:
    """Of scores [.., entries] the top_k highest as a mask; of equal ones the first, as served."""
    lowest = scores.topk(top_k, dim=-1).values[..., -1:]
    is_above, is_equal = scores > lowest, scores == lowest
    room = top_k - is_above.sum(-1, keepdim=True)
    return is_above | (is_equal & (is_equal.cumsum(-1) <= room))


def _attend(
    q: Tensor, kv: Tensor, entries: Tensor | None, index: tuple[Tensor, Tensor, Tensor] | None,
    sink: Tensor, window: int, ratio: int, top_k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [rows, tokens, heads, dim] over the window, and over the entries or the best of them.

    Returns the outputs like q, and the indexer's loss: how far softmax(index scores) is from the
    attention over the entries, as a KL divergence.
    """
    rows, length, heads, dim = q.shape
    chunks = length // window
    folded = q.unflatten(1, (chunks, window)).transpose(2, 3).flatten(2, 3)
    blocks = kv.unflatten(1, (chunks, window))
    keys = torch.cat([F.pad(blocks[:, :-1], (0, 0, 0, 0, 1, 0)), blocks], 2)
    shape = (rows, chunks, heads, window, 2 * window)
    scores = (folded @ keys.transpose(-1, -2)).view(shape).float() * dim**-0.5
    i = torch.arange(window, device=q.device).unsqueeze(1)
    j = torch.arange(2 * window, device=q.device).unsqueeze(0)
    chunk = torch.arange(chunks, device=q.device).view(-1, 1, 1, 1)
    is_seen = (j > i) & (j <= i + window) & ((chunk > 0) | (j >= window))
    parts = [scores.masked_fill(~is_seen, float("-inf"))]
    loss = q.new_zeros((), dtype=torch.float32)
    if entries is not None:
        num = entries.shape[1]
        scores = folded.flatten(1, 2) @ entries.transpose(-1, -2)
        scores = scores.view(rows, chunks, heads, window, num).float() * dim**-0.5
        count = (torch.arange(length, device=q.device) + 1) // ratio
        is_complete = torch.arange(num, device=q.device) < count.unsqueeze(1)  # [tokens, entries]
        is_chosen = is_complete.unflatten(0, (chunks, window)).unsqueeze(1)
        if index is not None:
            index_q, weights, index_keys = index
            matches = index_q.flatten(1, 2) @ index_keys.transpose(-1, -2)
            matches = F.relu(matches.view(rows, length, -1, num).float())
            index_scores = (weights.unsqueeze(-1) * matches).sum(2)
            index_scores = index_scores.masked_fill(~is_complete, -1e30)
            with torch.no_grad():
                target = scores.masked_fill(~is_chosen, -1e30).softmax(-1).mean(2).flatten(1, 2)
                has_any = (count > 1).float()
            divergence = target * (target.clamp_min(1e-9).log() - index_scores.log_softmax(-1))
            loss = (divergence.sum(-1) * has_any).sum() / (has_any.sum() * rows)
            if top_k and num > top_k:
                best = best_entries(index_scores.detach(), top_k).unflatten(1, (chunks, window))
                is_chosen = is_chosen & best.unsqueeze(2)
        parts.append(scores.masked_fill(~is_chosen, float("-inf")))
    parts.append(sink.view(-1, 1, 1).expand(rows, chunks, heads, window, 1).float())
    attention = torch.cat(parts, -1).softmax(-1).to(q.dtype)
    shape = (rows, chunks, heads * window, -1)
    out = attention[..., : 2 * window].reshape(shape) @ keys
    if entries is not None:
        of_entries = attention[..., 2 * window : -1].reshape(rows, chunks * heads * window, -1)
        out = out + (of_entries @ entries).view(out.shape)
    out = out.view(rows, chunks, heads, window, dim).transpose(2, 3).flatten(1, 2)
    return out, loss
