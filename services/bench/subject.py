"""What a benchmark measures: a model on its device, opened as the workers open theirs."""

import json
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint.headers import read_json
from scission.common.checkpoint.open import open_source
from scission.common.checkpoint.source import TensorDescription
from scission.common.config import ModelOptions, SchedulerOptions
from scission.common.device import open_device
from scission.common.errors import ConfigError
from scission.common.model.batch import SequenceChunk
from scission.common.model.load import LoadedModel, load_model
from scission.common.runner import NUM_SCRATCH, Runner
from scission.common.sampling import SequenceSampling, sample
from scission.common.stepping.captured import CapturedSteps
from scission.common.stepping.chunked import ChunkedSteps
from scission.common.stepping.sequences import (
    DecodeSequence,
    Planned,
    Steps,
    Submitted,
    append,
)
from scission.common.types import SamplingParams
from scission.services.bench.shape import Shape, shape_of


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model and what its floors follow from."""

    loaded: LoadedModel
    shape: Shape
    tensors: Mapping[str, TensorDescription]  # as stored
    device: torch.device
    load_s: float

    @property
    def captures(self) -> bool:
        """Its steps can be captured graphs."""
        return self.device.type == "cuda" and self.loaded.model.captures

    def describe(self) -> dict[str, Any]:
        layers = {layer for c in self.loaded.layout.components for layer in c.layers}
        return {
            "name": self.loaded.name,
            "layers": len(layers),
            "stored_bytes": sum(tensor.num_bytes for tensor in self.tensors.values()),
            "load_s": self.load_s,
        }


@contextmanager
def open_subject(options: ModelOptions, num_layers: int | None) -> Iterator[Subject]:
    """Load the model, cut to its first `num_layers` layers where that is given.

    Raises:
        ConfigError: the cut is none, or of a checkpoint that is read whole.
        CheckpointError: the folder is not what it should be.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if num_layers is not None:
            if options.load_format != "dummy":
                raise ConfigError("--layers needs --load-format dummy: a checkpoint is read whole")
            options = _cut(options, num_layers, Path(scratch))
        device = open_device(options)
        started_at = time.monotonic()
        loaded = load_model(options, device)
        load_s = time.monotonic() - started_at
        tensors = open_source(options.model, options.load_format, options.seed).tensors
        shape = shape_of(read_json(options.model / "config.json"))
        yield Subject(loaded, shape, tensors, device, load_s)


def cut_layers(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """A config.json of the first layers, without draft layers.

    Raises:
        ConfigError: the model has fewer layers.
    """
    if "text_config" in config:
        return {**config, "text_config": cut_layers(config["text_config"], num_layers)}
    whole = config["num_hidden_layers"]
    if not 0 < num_layers <= whole:
        raise ConfigError(f"--layers is {num_layers}; the model has {whole}")
    cut = {**config, "num_hidden_layers": num_layers}
    if "num_nextn_predict_layers" in config:
        cut["num_nextn_predict_layers"] = 0
    # other models' lists may go on behind their last layer
    if "compress_ratios" in config:
        cut["compress_ratios"] = config["compress_ratios"][:num_layers]
        cut["num_hash_layers"] = min(config["num_hash_layers"], num_layers)
    return cut


class Sequences:
    """Sequences of random tokens on a storage of their own, computed as the engines do."""

    def __init__(
        self,
        subject: Subject,
        count: int,
        max_tokens: int,
        seed: int = 0,
        *,
        is_captured: bool = False,
    ) -> None:
        """Room for `count` sequences of `max_tokens` tokens.

        Args:
            is_captured: decode by a graph; the model must allow it (`Subject.captures`).
        """
        layout = subject.loaded.layout
        blocks_each = layout.num_blocks(max_tokens)
        num_blocks = NUM_SCRATCH + count * blocks_each
        storage = CacheStorage(layout, num_blocks, NUM_SCRATCH + count, subject.device)
        self._runner = Runner(subject.loaded.model, storage)
        self._vocab_size = subject.loaded.vocab_size
        self._generator = torch.Generator().manual_seed(seed)
        self._steps: Steps[DecodeSequence] = ChunkedSteps(self._runner)
        if is_captured:
            captured = CapturedSteps[DecodeSequence](
                self._runner, (count,), subject.loaded.max_model_len, self._vocab_size
            )
            captured.capture()
            self._steps = captured
        self._under_way: deque[Submitted[DecodeSequence]] = deque()
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._sequences = [
            DecodeSequence(
                SequenceSampling(params, 0, ()),
                list(range(NUM_SCRATCH + i * blocks_each, NUM_SCRATCH + (i + 1) * blocks_each)),
                slot=NUM_SCRATCH + i,
                num_computed=0,
                pending=[],
            )
            for i in range(count)
        ]

    def prefill(self, num_tokens: int, chunk_tokens: int | None = None) -> None:
        """Start every sequence anew with a random prompt, one after another, and draw its next.

        Nothing waits for the device before a prompt's last chunk.

        Args:
            chunk_tokens: of a prompt in one pass; None: as the workers have it.
        """
        chunk_tokens = chunk_tokens or default_chunk_tokens(self._runner.storage.device)
        for sequence in self._sequences:
            prompt = torch.randint(self._vocab_size, (num_tokens,), generator=self._generator)
            token_ids: list[int] = prompt.tolist()
            self._runner.storage.reset_slot(sequence.slot)
            for start in range(0, num_tokens, chunk_tokens):
                chunk = SequenceChunk(
                    token_ids[start : start + chunk_tokens],
                    start,
                    sequence.block_ids,
                    sequence.slot,
                    logits="last" if start + chunk_tokens >= num_tokens else "none",
                )
                logits = self._runner.forward([chunk])
            [(token_id, _)] = sample(logits, [sequence.sampling])
            sequence.num_computed = num_tokens
            sequence.sampling.append(token_id)
            sequence.pending = [token_id]

    def step(self) -> None:
        """Feed every sequence its next token and draw another; returns when the tokens of the
        steps are known but for those that the engine leaves under way.
        """
        self._under_way.append(self._steps.submit([Planned(s, 1) for s in self._sequences]))
        self.settle(self._steps.depth)

    def settle(self, depth: int = 0) -> None:
        """Wait until no more than `depth` steps are under way."""
        while len(self._under_way) > depth:
            for drawn in self._under_way.popleft().collect():
                append(drawn)


def default_chunk_tokens(device: torch.device) -> int:
    """Of a prompt in one pass, as the workers have it."""
    return SchedulerOptions().batched_tokens_on(device.type)


def timed(action: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each call; the action itself waits for the device."""
    seconds = []
    for _ in range(repeats):
        started_at = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started_at)
    return seconds


def _cut(options: ModelOptions, num_layers: int, scratch: Path) -> ModelOptions:
    folder = scratch / options.names[0]
    folder.mkdir()
    config = cut_layers(read_json(options.model / "config.json"), num_layers)
    (folder / "config.json").write_text(json.dumps(config))
    return ModelOptions(
        folder,
        device=options.device,
        dtype=options.dtype,
        numerics=options.numerics,
        load_format=options.load_format,
        seed=options.seed,
        threads=options.threads,
    )
