"""DeepSeek-V4's checkpoint: the table of its tensors, what a loader may leave, random values for
it.

The table is that of the published files; a loader does not consult it (the model asks for what it
needs), the writer of random checkpoints, dummy weights and `inspect` do.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from scission.common.checkpoint.table import TensorSpec
from scission.common.errors import CheckpointError
from scission.kernels.quant import FP4_GROUP, FP8_BLOCK

MODEL_TYPE = "deepseek_v4"

MatrixFormat = Literal["fp8", "fp4", "bf16"]

_MATRICES = r"(wq_a|wq_b|wkv|wo_a|wo_b)\.(weight|scale)"
_KNOWN_MTP = "|".join(
    (
        rf"attn\.({_MATRICES}|q_norm\.weight|kv_norm\.weight|attn_sink)",
        r"ffn\.gate\.(weight|bias)",
        r"ffn\.(experts\.\d+|shared_experts)\.w[123]\.(weight|scale)",
        r"(attn_norm|ffn_norm|enorm|hnorm|norm)\.weight",
        r"(e_proj|h_proj)\.(weight|scale)",
        r"hc_(attn|ffn|head)_(fn|base|scale)",
    )
)
# what a loader may leave: further draft stages and tensors of other draft models, never a known one
IGNORED = (re.compile(rf"mtp\.0\.(?!({_KNOWN_MTP})$).+"), re.compile(r"mtp\.[1-9]\d*\..+"))


def tensor_table(
    config: Mapping[str, Any], *, experts: MatrixFormat | None = None, wo_a: MatrixFormat = "fp8"
) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint with this config.json, by name.

    Args:
        config: the fields of config.json.
        experts: format of the routed experts; None: what `expert_dtype` says, fp4 where it is
        missing. wo_a: fp8, or bf16 as in some re-releases.

    Raises:
        CheckpointError: a field that is missing.
    """
    try:
        return dict(_tensors(config, experts or config.get("expert_dtype", "fp4"), wo_a))
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error.args[0]}") from None


def random_values(
    name: str, shape: tuple[int, ...], config: Mapping[str, Any], generator: torch.Generator
) -> Tensor:
    """Well-conditioned random values for one tensor, before any quantisation.

    Norms lie near one, layers keep the size of what they are given, logits spread over several
    units, and nothing that is zero by default (sinks, ape, router bias) is zero.

    Args:
        name: of the table, with `.weight` where it has one.
        shape: in values: [out, in] for packed FP4 too.
        config: the fields of config.json.
        generator: decides the values and their device.

    Returns:
        float32, or int64 expert ids for `tid2eid`.
    """
    device = generator.device
    *_, owner, parameter = ("", *name.split("."))
    if parameter == "tid2eid":
        # K different experts for each token id
        shuffled = (shape[0], config["n_routed_experts"])
        draws = torch.rand(shuffled, generator=generator, device=device)
        return draws.topk(shape[1]).indices
    values = torch.randn(shape, generator=generator, device=device)
    if name == "embed.weight":
        return values
    if parameter == "weight" and len(shape) == 1:
        return values.mul_(0.1).add_(1)
    if parameter == "weight":
        values.mul_({"head": 3.0, "gate": 1.5}.get(owner, 1.0) * shape[1] ** -0.5)
        if owner in ("head", "gate"):
            return values
        # so that neighbouring scale blocks differ
        blocks = torch.randn((-(-shape[0] // FP8_BLOCK), 1), generator=generator, device=device)
        sizes = torch.exp2(blocks.mul_(0.5)).repeat_interleave(FP8_BLOCK, 0)
        return values.mul_(sizes[: shape[0]])
    if parameter.endswith("_fn"):
        return values.mul_(shape[1] ** -0.5)
    if parameter.endswith("_scale"):
        return values.mul_(0.2).add_(1)
    spreads = {"attn_sink": 1.0, "bias": 0.1, "ape": 0.5}
    return values.mul_(spreads.get(parameter, 0.5))


def _tensors(
    config: Mapping[str, Any], experts: MatrixFormat, wo_a: MatrixFormat
) -> Iterator[tuple[str, TensorSpec]]:
    d, vocab = config["hidden_size"], config["vocab_size"]
    yield "embed.weight", TensorSpec("BF16", (vocab, d))
    yield "head.weight", TensorSpec("BF16", (vocab, d))
    yield "norm.weight", TensorSpec("BF16", (d,))
    yield from _hyper_connection(config, "hc_head", is_head=True)
    ratios = config["compress_ratios"]
    num_layers, num_mtp = config["num_hidden_layers"], config["num_nextn_predict_layers"]
    if len(ratios) < num_layers + num_mtp:
        raise CheckpointError(
            f"config.json has {len(ratios)} compress_ratios for {num_layers} layers and "
            f"{num_mtp} MTP layers"
        )
    for layer in range(num_layers):
        is_hash = layer < config["num_hash_layers"]
        yield from _layer(config, f"layers.{layer}.", ratios[layer], is_hash, experts, wo_a)
    for stage in range(num_mtp):
        prefix = f"mtp.{stage}."
        yield from _layer(config, prefix, ratios[num_layers + stage], False, experts, wo_a)
        for name in ("e_proj", "h_proj"):
            yield from _matrix(prefix + name, d, d, "fp8")
        for name in ("enorm", "hnorm", "norm"):
            yield f"{prefix}{name}.weight", TensorSpec("BF16", (d,))
        yield from _hyper_connection(config, prefix + "hc_head", is_head=True)


def _layer(
    config: Mapping[str, Any],
    prefix: str,
    ratio: int,
    is_hash: bool,
    experts: MatrixFormat,
    wo_a: MatrixFormat,
) -> Iterator[tuple[str, TensorSpec]]:
    d = config["hidden_size"]
    for name in ("attn_norm", "ffn_norm"):
        yield f"{prefix}{name}.weight", TensorSpec("BF16", (d,))
    for name in ("hc_attn", "hc_ffn"):
        yield from _hyper_connection(config, prefix + name, is_head=False)
    yield from _attention(config, prefix + "attn.", ratio, wo_a)
    yield from _moe(config, prefix + "ffn.", is_hash, experts)


def _attention(
    config: Mapping[str, Any], prefix: str, ratio: int, wo_a: MatrixFormat
) -> Iterator[tuple[str, TensorSpec]]:
    d, head_dim = config["hidden_size"], config["head_dim"]
    q_lora, q_size = config["q_lora_rank"], config["num_attention_heads"] * head_dim
    groups, o_rank = config["o_groups"], config["o_groups"] * config["o_lora_rank"]
    yield from _matrix(prefix + "wq_a", q_lora, d, "fp8")
    yield prefix + "q_norm.weight", TensorSpec("BF16", (q_lora,))
    yield from _matrix(prefix + "wq_b", q_size, q_lora, "fp8")
    yield from _matrix(prefix + "wkv", head_dim, d, "fp8")
    yield prefix + "kv_norm.weight", TensorSpec("BF16", (head_dim,))
    yield from _matrix(prefix + "wo_a", o_rank, q_size // groups, wo_a)
    yield from _matrix(prefix + "wo_b", d, o_rank, "fp8")
    yield prefix + "attn_sink", TensorSpec("F32", (config["num_attention_heads"],))
    if ratio:
        yield from _compressor(prefix + "compressor.", d, ratio, head_dim)
    if ratio == 4:
        width, heads = config["index_head_dim"], config["index_n_heads"]
        yield from _matrix(prefix + "indexer.wq_b", heads * width, q_lora, "fp8")
        yield prefix + "indexer.weights_proj.weight", TensorSpec("BF16", (heads, d))
        yield from _compressor(prefix + "indexer.compressor.", d, ratio, width)


def _compressor(prefix: str, d: int, ratio: int, width: int) -> Iterator[tuple[str, TensorSpec]]:
    projected = 2 * width if ratio == 4 else width
    yield prefix + "ape", TensorSpec("F32", (ratio, projected))
    yield prefix + "wkv.weight", TensorSpec("BF16", (projected, d))
    yield prefix + "wgate.weight", TensorSpec("BF16", (projected, d))
    yield prefix + "norm.weight", TensorSpec("BF16", (width,))


def _moe(
    config: Mapping[str, Any], prefix: str, is_hash: bool, experts: MatrixFormat
) -> Iterator[tuple[str, TensorSpec]]:
    d, inner = config["hidden_size"], config["moe_intermediate_size"]
    num_experts = config["n_routed_experts"]
    yield prefix + "gate.weight", TensorSpec("BF16", (num_experts, d))
    if is_hash:
        shape = (config["vocab_size"], config["num_experts_per_tok"])
        yield prefix + "gate.tid2eid", TensorSpec("I64", shape)
    else:
        yield prefix + "gate.bias", TensorSpec("F32", (num_experts,))
    for expert in range(num_experts):
        yield from _expert(f"{prefix}experts.{expert}.", d, inner, experts)
    shared_inner = inner * config["n_shared_experts"]
    yield from _expert(prefix + "shared_experts.", d, shared_inner, "fp8")


def _expert(prefix: str, d: int, inner: int, fmt: MatrixFormat) -> Iterator[tuple[str, TensorSpec]]:
    yield from _matrix(prefix + "w1", inner, d, fmt)
    yield from _matrix(prefix + "w2", d, inner, fmt)
    yield from _matrix(prefix + "w3", inner, d, fmt)


def _hyper_connection(
    config: Mapping[str, Any], prefix: str, *, is_head: bool
) -> Iterator[tuple[str, TensorSpec]]:
    streams = config["hc_mult"]
    rows, num_scales = (streams, 1) if is_head else ((2 + streams) * streams, 3)
    yield prefix + "_fn", TensorSpec("F32", (rows, streams * config["hidden_size"]))
    yield prefix + "_base", TensorSpec("F32", (rows,))
    yield prefix + "_scale", TensorSpec("F32", (num_scales,))


def _matrix(
    name: str, out_features: int, in_features: int, fmt: MatrixFormat
) -> Iterator[tuple[str, TensorSpec]]:
    match fmt:
        case "bf16":
            yield name + ".weight", TensorSpec("BF16", (out_features, in_features))
        case "fp8":
            yield name + ".weight", TensorSpec("F8_E4M3", (out_features, in_features))
            blocks = (-(-out_features // FP8_BLOCK), -(-in_features // FP8_BLOCK))
            yield name + ".scale", TensorSpec("F8_E8M0", blocks)
        case "fp4":
            if in_features % FP4_GROUP:
                raise CheckpointError(
                    f"{name}: FP4 needs inputs in multiples of {FP4_GROUP}, got {in_features}"
                )
            yield name + ".weight", TensorSpec("I8", (out_features, in_features // 2))
            yield name + ".scale", TensorSpec("F8_E8M0", (out_features, in_features // FP4_GROUP))
        case _:
            raise CheckpointError(f"expert_dtype is {fmt!r}; known are fp4, fp8 and bf16")
