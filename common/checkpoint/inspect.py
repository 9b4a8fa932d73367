"""What a checkpoint is and what it needs, from config.json and the shards' headers alone."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scission.common.cache.layout import CacheLayout
from scission.common.checkpoint.headers import TensorHeader, read_headers, read_json
from scission.common.checkpoint.source import natural_key
from scission.common.checkpoint.table import TensorSpec
from scission.common.errors import CheckpointError
from scission.common.layers.numerics import Numerics
from scission.common.model.architecture import BLOCK_SIZE, Architecture, Facts
from scission.common.model.registry import find_architecture

# memory of one device, as its maker states it; what a process can use of it is less
_DEVICES = (
    ("NVIDIA H100 80GB", 80e9),
    ("NVIDIA H200", 141e9),
    ("NVIDIA B200", 180e9),
    ("AMD MI300X (gfx942)", 192e9),
    ("AMD MI325X (gfx942)", 256e9),
    ("AMD MI355X (gfx950)", 288e9),
    ("AMD R9700 (gfx1201)", 32e9),
)
_USABLE = 0.9
_MAX_DEVICES = 64
_LENGTHS = (1024, 8192, 131072, 1048576)

# what a tensor belongs to, by its name; the first that matches
_GROUPS = tuple(
    (group, re.compile(pattern))
    for group, pattern in (
        ("embedding and head", r"(.*\.)?(embed|head|embed_tokens|lm_head)\.[a-z_]+"),
        ("routed experts", r".*\.(experts\..*|moe\.(gate|up|down)_proj\.weight)"),
        ("shared experts", r".*\.(shared_experts?|share_expert)\..*"),
        ("router", r".*\.(gate\..*|router_bias)"),
        ("indexer", r".*\.indexer\..*"),
        ("compressor", r".*\.compressor\..*"),
        ("hyper-connections", r"(.*\.)?hc_[a-z_]+"),
        ("norms", r"(.*[._])?[a-z]*norm\.weight"),
        ("attention", r".*\.(attn|self_attn)\..*"),
        ("projections", r".*\.[eh]_proj\..*"),
        ("feed-forward", r".*\.mlp\..*"),
        ("vision", r"(.*\.)?(vision_tower|multi_modal_projector)\..*"),
        ("other", r".*"),
    )
)
_SCALES = ("scale", "weight_scale_inv", "weight_scale", "activation_scale", "input_scale")
_FORMATS = {"F8_E4M3": "FP8 e4m3", "F8_E5M2": "FP8 e5m2", "I8": "INT8"}


@dataclass(frozen=True, slots=True)
class FormatRow:
    """The tensors of one group that are stored alike; scales count as bytes of their matrix."""

    group: str
    format: str
    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StateNeeds:
    """The state of requests, with activations of `dtype`."""

    dtype: str
    bytes_per_token: float
    bytes_per_request: int  # besides its tokens: windows and compressor states
    handoff_bytes: Mapping[int, int]  # prompt tokens -> bytes that prefill ships


@dataclass(frozen=True, slots=True)
class Fit:
    """How many of a device hold the weights and the state of one request of the full context."""

    device: str
    memory_bytes: int
    num_devices: int | None  # None: more than could be


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint folder in numbers. `problems` is empty where it can be served."""

    directory: str
    model_type: str
    num_shards: int
    num_tensors: int
    num_parameters: int
    num_bytes: int
    formats: tuple[FormatRow, ...]
    layers: Mapping[str, int]
    vocab_size: int | None
    max_model_len: int | None
    states: tuple[StateNeeds, ...]
    fits: tuple[Fit, ...]
    problems: tuple[str, ...]


def inspect_checkpoint(directory: Path) -> Inspection:
    """Describe a checkpoint folder of any model.

    Raises:
        CheckpointError: no config.json, no shards, or files that cannot be read.
    """
    config = read_json(directory / "config.json")
    return inspect_headers(directory, config, read_headers(directory))


def inspect_headers(
    directory: Path, config: Mapping[str, Any], headers: Mapping[str, TensorHeader]
) -> Inspection:
    """`inspect_checkpoint` of what was read already; errors in a config of ours are `problems`."""
    formats = _format_rows(headers)
    model_type = str(config.get("model_type"))
    facts: Facts | None = None
    layouts: Sequence[CacheLayout] = ()
    try:
        architecture = find_architecture(config)
        parsed = architecture.parse(config)
        facts, layouts = architecture.facts(parsed), _layouts(architecture, parsed)
        ignored = architecture.ignored(parsed)
        problems = tuple(_differences(architecture.table(config, headers), headers, ignored))
    except CheckpointError as error:
        problems = (str(error),)
    max_model_len = facts.max_position_embeddings if facts is not None else None
    num_bytes = sum(header.num_bytes for header in headers.values())
    num_parameters = sum(row.num_parameters for row in formats)
    return Inspection(
        directory=str(directory),
        model_type=model_type,
        num_shards=len({header.file for header in headers.values()}),
        num_tensors=len(headers),
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        formats=formats,
        layers=facts.layers if facts is not None else {},
        vocab_size=facts.vocab_size if facts is not None else None,
        max_model_len=max_model_len,
        states=tuple(_state_needs(layout, max_model_len or 0) for layout in layouts),
        fits=tuple(_fits(num_bytes, num_parameters, layouts, max_model_len or 0)),
        problems=problems,
    )


def _format_rows(headers: Mapping[str, TensorHeader]) -> tuple[FormatRow, ...]:
    counts: Counter[tuple[str, str]] = Counter()
    parameters: Counter[tuple[str, str]] = Counter()
    num_bytes: Counter[tuple[str, str]] = Counter()
    matrix_of = {
        scale: name
        for name in headers
        if name.endswith(".weight")
        for scale in _scale_names(name)
        if scale in headers
    }
    for name, header in headers.items():
        owner = matrix_of.get(name, name)
        key = (_group(owner), _format(owner, headers))
        num_bytes[key] += header.num_bytes
        if owner == name:
            counts[key] += 1
            packed = 2 if key[1].startswith("FP4") else 1
            parameters[key] += math.prod(header.shape) * packed
    order = [group for group, _ in _GROUPS] + ["MTP " + group for group, _ in _GROUPS]
    rows = [FormatRow(*key, counts[key], parameters[key], num_bytes[key]) for key in counts]
    return tuple(sorted(rows, key=lambda row: (order.index(row.group), row.format)))


def _group(name: str) -> str:
    group = next(group for group, pattern in _GROUPS if pattern.fullmatch(name))
    return f"MTP {group}" if name.startswith("mtp.") else group


def _format(name: str, headers: Mapping[str, TensorHeader]) -> str:
    """A tensor's format in words, from its dtype and the shape of its scale."""
    weight = headers[name]
    word = _FORMATS.get(weight.dtype, weight.dtype)
    scale = next((headers[s] for s in _scale_names(name) if s in headers), None)
    if scale is None or len(weight.shape) < 2:
        return word
    rows, columns = weight.shape[-2:]
    kind = "ue8m0" if scale.dtype == "F8_E8M0" else scale.dtype
    if weight.dtype == "I8" and scale.shape[-2:] == (rows, columns * 2 // 32):
        return f"FP4 e2m1, {kind} scale per 1x32"
    if scale.shape[-2:] == (-(-rows // 128), -(-columns // 128)):
        return f"{word}, {kind} scale per 128x128"
    if math.prod(scale.shape) == 1:
        return f"{word}, {kind} scale per tensor"
    return f"{word}, {kind} scale {list(scale.shape)}"


def _scale_names(name: str) -> tuple[str, ...]:
    stem = name.removesuffix(".weight")
    return tuple(f"{stem}.{suffix}" for suffix in _SCALES) if stem != name else ()


def _layouts(architecture: Architecture[Any], config: Any) -> tuple[CacheLayout, ...]:
    """With bf16 activations (GPUs) and with fp32 (the CPU)."""
    return tuple(
        architecture.layout(config, Numerics(dtype, rounds=True), BLOCK_SIZE)
        for dtype in (torch.bfloat16, torch.float32)
    )


def _state_needs(layout: CacheLayout, max_model_len: int) -> StateNeeds:
    lengths = [length for length in _LENGTHS if length < max_model_len] + [max_model_len]
    return StateNeeds(
        dtype=layout.components[0].dtype,
        bytes_per_token=layout.block_bytes / layout.block_size,
        bytes_per_request=layout.slot_bytes,
        handoff_bytes={length: layout.shipped_bytes(length) for length in lengths},
    )


def _differences(
    table: Mapping[str, TensorSpec],
    headers: Mapping[str, TensorHeader],
    ignored: Sequence[re.Pattern[str]],
) -> Iterator[str]:
    """How a checkpoint differs from the published table in the formats it has itself."""
    missing = sorted(table.keys() - headers.keys(), key=natural_key)
    if missing:
        yield f"{len(missing)} tensors are missing: {_listed(missing)}"
    unknown = [
        name
        for name in sorted(headers.keys() - table.keys(), key=natural_key)
        if not any(rule.fullmatch(name) for rule in ignored)
    ]
    if unknown:
        yield f"{len(unknown)} tensors are unknown: {_listed(unknown)}"
    unlike = [
        f"{name} is {headers[name].dtype} {list(headers[name].shape)}, "
        f"wanted {spec.dtype} {list(spec.shape)}"
        for name, spec in table.items()
        if name in headers
        and (headers[name].dtype, headers[name].shape) != (spec.dtype, spec.shape)
    ]
    if unlike:
        yield f"{len(unlike)} tensors are not as the config says: {_listed(unlike)}"


def _fits(
    num_bytes: int, num_parameters: int, layouts: Sequence[CacheLayout], max_model_len: int
) -> Iterator[Fit]:
    """Weights as stored and bf16 state on GPUs; weights and state in fp32 on the CPU."""
    if not layouts:
        return
    on_gpu, on_cpu = (_request_bytes(layout, max_model_len) for layout in layouts)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Fit("this machine's CPU (fp32)", memory, _devices(4 * num_parameters + on_cpu, memory, 1))
    known = list(_DEVICES)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        known.insert(0, (f"this machine's {properties.name}", float(properties.total_memory)))
    for device, device_bytes in known:
        count = _devices(num_bytes + on_gpu, device_bytes, _MAX_DEVICES)
        yield Fit(device, int(device_bytes), count)


def _request_bytes(layout: CacheLayout, num_tokens: int) -> int:
    return layout.slot_bytes + layout.num_blocks(num_tokens) * layout.block_bytes


def _devices(needed_bytes: float, device_bytes: float, most: int) -> int | None:
    """The smallest power of two of devices that hold it."""
    count = 1
    while count <= most:
        if needed_bytes <= count * device_bytes * _USABLE:
            return count
        count *= 2
    return None


def _listed(items: Sequence[str], limit: int = 5) -> str:
    return ", ".join(items[:limit]) + (", ..." if len(items) > limit else "")
