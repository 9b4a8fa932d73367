"""The MTP layer against the specification's formulas, written token by token in fp64."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.model.batch import SequenceChunk, build_batch
from scission.common.model.deepseek_v4 import DeepseekV4
from scission.common.model.load import LoadedModel
from tests.one_process import CPU, load_exact
from tests.reference_checkpoint import dequantized_state, tiny_config

CONFIG = tiny_config(num_hidden_layers=2, compress_ratios=[0, 4, 0], num_hash_layers=0)
NUM_TOKENS = 30  # beyond the window


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mtp")
    write_random_deepseek_v4(directory, CONFIG, seed=3)
    return directory


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return load_exact(checkpoint)


@torch.inference_mode()
def test_mtp_layer_follows_the_formulas(checkpoint: Path, loaded: LoadedModel) -> None:
    tokens = torch.randint(0, 320, (NUM_TOKENS + 1,)).tolist()
    model = loaded.model
    assert isinstance(model, DeepseekV4)
    storage = CacheStorage(loaded.layout, 2, 2, CPU)
    chunk = SequenceChunk(tokens[:-1], 0, [1], 1, logits="none")
    streams = model.run_layers(build_batch([chunk], CPU), storage)
    following = SequenceChunk(tokens[1:], 0, [1], 1, logits="all")
    drafted = model.draft_logits(streams, build_batch([following], CPU))

    state = {name: t.double() for name, t in dequantized_state(checkpoint).items()}
    expected = _Mtp(state, CONFIG).logits(streams.double(), tokens[1:])
    torch.testing.assert_close(drafted.double(), expected, rtol=1e-4, atol=1e-3)


@torch.inference_mode()
def test_mtp_of_a_batch_equals_each_alone(loaded: LoadedModel) -> None:
    model = loaded.model
    assert isinstance(model, DeepseekV4)
    streams = torch.randn(21, 4, 160)
    chunks = [
        SequenceChunk(list(range(n)), 0, [1], slot, logits="all") for n, slot in ((20, 1), (1, 2))
    ]
    together = model.draft_logits(streams, build_batch(chunks, CPU))
    alone = [
        model.draft_logits(part, build_batch([chunk], CPU))
        for part, chunk in zip((streams[:20], streams[20:]), chunks, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


class _Mtp:
    """Section 8 on the weights by name; one position at a time where the formulas have one."""

    def __init__(self, state: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.w = state
        self.c = config

    def logits(self, h: Tensor, next_tokens: list[int]) -> Tensor:
        w = self.w
        e = self._norm(w["embed.weight"][next_tokens], "mtp.0.enorm") @ w["mtp.0.e_proj.weight"].T
        g = self._norm(h, "mtp.0.hnorm") @ w["mtp.0.h_proj.weight"].T
        s = self._sublayer(e.unsqueeze(1) + g, "attn", self._attention)
        s = self._sublayer(s, "ffn", self._experts)
        n = self.c["hc_mult"]
        coefficients = self._coefficients(s, "mtp.0.hc_head", [n])
        a = coefficients.sigmoid() + self.c["hc_eps"]
        x = (a.unsqueeze(-1) * s).sum(1)
        return self._norm(x, "mtp.0.norm") @ w["head.weight"].T

    def _sublayer(self, s: Tensor, kind: str, run: Callable[[Tensor], Tensor]) -> Tensor:
        n, eps = self.c["hc_mult"], self.c["hc_eps"]
        m = self._coefficients(s, f"mtp.0.hc_{kind}", [n, n, n * n])
        a = m[:, :n].sigmoid() + eps
        post = 2 * m[:, n : 2 * n].sigmoid()
        comb = m[:, 2 * n :].reshape(-1, n, n).softmax(-1) + eps
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        for _ in range(self.c["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(2, keepdim=True) + eps)
            comb = comb / (comb.sum(1, keepdim=True) + eps)
        y = run(self._norm((a.unsqueeze(-1) * s).sum(1), f"mtp.0.{kind}_norm"))
        return post.unsqueeze(-1) * y.unsqueeze(1) + torch.einsum("tjk,tjd->tkd", comb, s)

    def _coefficients(self, s: Tensor, name: str, parts: list[int]) -> Tensor:
        v = s.flatten(1)
        m = (v @ self.w[f"{name}_fn"].T) * self._inverse_rms(v)
        scale = torch.cat(
            [p.expand(n) for p, n in zip(self.w[f"{name}_scale"], parts, strict=True)]
        )
        return m * scale + self.w[f"{name}_base"]

    def _attention(self, x: Tensor) -> Tensor:
        c = self.c
        heads, dim, rope, window = (
            c["num_attention_heads"],
            c["head_dim"],
            c["qk_rope_head_dim"],
            c["sliding_window"],
        )
        qr = self._norm(x @ self._attn("wq_a"), "mtp.0.attn.q_norm")
        q = (qr @ self._attn("wq_b")).view(-1, heads, dim)
        q = q * self._inverse_rms(q)
        kv = self._norm(x @ self._attn("wkv"), "mtp.0.attn.kv_norm")
        q = torch.stack([_turn(q[p], p, rope) for p in range(len(q))])
        kv = torch.stack([_turn(kv[p], p, rope) for p in range(len(kv))])
        outputs = []
        for p in range(len(x)):
            keys = kv[max(0, p - window + 1) : p + 1]
            e = (q[p] @ keys.T * dim**-0.5).exp()
            o = (e @ keys) / (e.sum(-1) + self.w["mtp.0.attn.attn_sink"].exp()).unsqueeze(-1)
            outputs.append(_turn(o, -p, rope))
        grouped = torch.stack(outputs).view(len(x), c["o_groups"], -1)
        wo_a = self.w["mtp.0.attn.wo_a.weight"].view(c["o_groups"], c["o_lora_rank"], -1)
        z: Tensor = torch.einsum("tgi,gri->tgr", grouped, wo_a)
        return z.flatten(1) @ self._attn("wo_b")

    def _experts(self, x: Tensor) -> Tensor:
        c, w = self.c, self.w
        scores = torch.nn.functional.softplus(x @ w["mtp.0.ffn.gate.weight"].T).sqrt()
        chosen = (scores + w["mtp.0.ffn.gate.bias"]).topk(c["num_experts_per_tok"]).indices
        outputs = []
        for p in range(len(x)):
            own = scores[p, chosen[p]]
            weights = own / own.sum() * c["routed_scaling_factor"]
            y = self._expert(x[p], "mtp.0.ffn.shared_experts")
            for expert, weight in zip(chosen[p].tolist(), weights, strict=True):
                y = y + weight * self._expert(x[p], f"mtp.0.ffn.experts.{expert}")
            outputs.append(y)
        return torch.stack(outputs)

    def _expert(self, x: Tensor, name: str) -> Tensor:
        w1, w2, w3 = (self.w[f"{name}.w{i}.weight"] for i in (1, 2, 3))
        limit = self.c["swiglu_limit"]
        a, b = (w1 @ x).clamp(max=limit), (w3 @ x).clamp(-limit, limit)
        return w2 @ (a * a.sigmoid() * b)

    def _attn(self, name: str) -> Tensor:
        return self.w[f"mtp.0.attn.{name}.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * self._inverse_rms(x) * self.w[f"{name}.weight"]

    def _inverse_rms(self, x: Tensor) -> Tensor:
        eps: float = self.c["rms_norm_eps"]
        return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def _turn(x: Tensor, position: int, rope_dim: int) -> Tensor:
    """[.., dim] by plain rope at one position."""
    out = x.clone()
    first = x.shape[-1] - rope_dim
    for pair in range(rope_dim // 2):
        angle = position * 10000 ** (-2 * pair / rope_dim)
        cos, sin = math.cos(angle), math.sin(angle)
        a, b = x[..., first + 2 * pair], x[..., first + 2 * pair + 1]
        out[..., first + 2 * pair] = a * cos - b * sin
        out[..., first + 2 * pair + 1] = a * sin + b * cos
    return out
