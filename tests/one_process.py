"""The runner without services: one model that prefills and goes on decoding on its own storage.

What the services must equal bit for bit, given the same chunks and the same batches in the same
order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scission.common.cache.storage import SCRATCH, CacheStorage
from scission.common.config import ModelOptions
from scission.common.model.batch import SequenceChunk, build_batch
from scission.common.model.load import LoadedModel, load_model

CPU = torch.device("cpu")


@dataclass
class OneSequence:
    """A sequence and where its state lies; `token_ids` holds what was fed so far."""

    block_ids: list[int]
    slot: int
    token_ids: list[int] = field(default_factory=list)


class OneProcess:
    """Feeds chunks of sequences to a model, in whatever batches the caller asks for."""

    def __init__(
        self,
        loaded: LoadedModel,
        max_seqs: int = 8,
        max_tokens: int = 1024,
        device: torch.device = CPU,
    ) -> None:
        """Room for `max_seqs` sequences of `max_tokens` tokens, on the device of the weights."""
        self.loaded = loaded
        self._device = device
        self._blocks_each = loaded.layout.num_blocks(max_tokens)
        num_blocks = SCRATCH + 1 + max_seqs * self._blocks_each
        self.storage = CacheStorage(loaded.layout, num_blocks, SCRATCH + 1 + max_seqs, device)
        self._num_seqs = 0

    def new_sequence(self) -> OneSequence:
        """A sequence in blocks and a slot that nothing else uses."""
        first = SCRATCH + 1 + self._num_seqs * self._blocks_each
        self._num_seqs += 1
        slot = SCRATCH + self._num_seqs
        assert slot < self.storage.num_slots, "raise max_seqs"
        return OneSequence(list(range(first, first + self._blocks_each)), slot)

    @torch.inference_mode()
    def step(
        self,
        fed: Sequence[tuple[OneSequence, Sequence[int]]],
        logits: str | Sequence[str] = "last",
    ) -> Tensor:
        """One forward pass over the next tokens of some sequences, in this order.

        Args:
            logits: "last" of every chunk, "all", or "none"; or one of these for each chunk.

        Returns:
            [num_logits, vocab_size] float32.
        """
        each = [logits] * len(fed) if isinstance(logits, str) else logits
        chunks = [
            SequenceChunk(
                token_ids=token_ids,
                start=len(sequence.token_ids),
                block_ids=sequence.block_ids,
                slot=sequence.slot,
                logits=wanted,
            )
            for (sequence, token_ids), wanted in zip(fed, each, strict=True)
        ]
        result = self.loaded.model.forward(build_batch(chunks, self._device), self.storage)
        for sequence, token_ids in fed:
            sequence.token_ids.extend(token_ids)
        return result

    def prefill(
        self, sequence: OneSequence, token_ids: Sequence[int], chunk_size: int | None = None
    ) -> Tensor:
        """A prompt alone, in chunks of `chunk_size`: the last token's logits, [1, vocab_size]."""
        size = chunk_size or len(token_ids)
        parts = [token_ids[i : i + size] for i in range(0, len(token_ids), size)]
        results = [self.step([(sequence, part)]) for part in parts]
        return results[-1]

    def greedy(self, sequences: Sequence[OneSequence], logits: Tensor, num_tokens: int) -> Tensor:
        """Decode the sequences as one batch, each step feeding every sequence's likeliest token.

        Args:
            logits: [num_seqs, vocab_size], of every sequence's last token.

        Returns:
            [num_tokens + 1, num_seqs, vocab_size]: the given logits and those after each token.
        """
        results = [logits]
        for _ in range(num_tokens):
            token_ids = results[-1].argmax(-1).tolist()
            fed = [(s, [t]) for s, t in zip(sequences, token_ids, strict=True)]
            results.append(self.step(fed))
        return torch.stack(results)


def load_exact(directory: Path) -> LoadedModel:
    """A checkpoint in fp32 without any rounding, on the CPU."""
    return load_model(ModelOptions(directory, device="cpu", numerics="exact"), CPU)


def load_deployed(directory: Path) -> LoadedModel:
    """A checkpoint in fp32 with the roundings of the deployed numerics, on the CPU."""
    return load_model(ModelOptions(directory, device="cpu", numerics="deployed"), CPU)
