"""A model on its storage: how much state fits, and one forward pass over chunks of sequences.

Prefill and decode compute through the same `Runner`: a pass does not know which service asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scission.common.cache.layout import CacheLayout
from scission.common.cache.storage import SCRATCH, CacheStorage
from scission.common.config import CacheOptions
from scission.common.errors import ConfigError
from scission.common.model.architecture import Model, OnLayers
from scission.common.model.batch import ForwardBatch, SequenceChunk, build_batch

CPU_STATE_BYTES = 1 << 30
MOST_OF_FREE = 0.95  # of a GPU's memory: passes need some, too
NUM_SCRATCH = SCRATCH + 1
FEW_ROWS = (1, 2, 20, 80, 256)  # between any two of them other kernels, or other tiles, serve


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What a storage is made with: blocks and slots, the scratch ones included."""

    num_blocks: int
    num_slots: int
    num_snapshots: int = 0  # slots of those that the prefix cache may hold


def state_bytes(options: CacheOptions, device: torch.device) -> int:
    """Bytes that all blocks and slots may take, with the weights loaded already.

    A GPU may be shared with other processes: this one's share is `memory_utilization`, less what it
    has taken itself, and never more than is there.
    """
    if options.memory_bytes is not None:
        return options.memory_bytes
    if device.type != "cuda":
        return CPU_STATE_BYTES
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * options.memory_utilization) - torch.cuda.memory_reserved(device)
    return min(share, int(free * MOST_OF_FREE))


def plan_cache(
    layout: CacheLayout,
    options: CacheOptions,
    *,
    num_requests: int,
    has_prefix_cache: bool,
    device: torch.device,
) -> CacheSize:
    """Slots for `num_requests` requests and the prefix snapshots, and blocks from what they leave.

    Raises:
        ConfigError: the budget holds no block beside the slots.
    """
    num_snapshots = 0
    if has_prefix_cache and options.enable_prefix_caching and layout.slot_bytes:
        num_snapshots = options.snapshot_bytes // layout.slot_bytes
    if options.num_blocks is not None:
        # a snapshot stands at the end of a block: more snapshots than blocks would lie idle
        num_snapshots = min(num_snapshots, options.num_blocks)
        return CacheSize(
            NUM_SCRATCH + options.num_blocks,
            NUM_SCRATCH + num_requests + num_snapshots,
            num_snapshots,
        )
    budget = state_bytes(options, device)
    left = budget - (NUM_SCRATCH + num_requests) * layout.slot_bytes
    num_snapshots = max(0, min(num_snapshots, left // (layout.slot_bytes + layout.block_bytes)))
    num_blocks = (left - num_snapshots * layout.slot_bytes) // layout.block_bytes
    if num_blocks <= NUM_SCRATCH:
        raise ConfigError(
            f"{budget} bytes of state hold no block of {layout.block_bytes} bytes beside the slots "
            f"of {num_requests} requests, {layout.slot_bytes} bytes each: raise memory_bytes or "
            f"lower max_num_seqs"
        )
    return CacheSize(num_blocks, NUM_SCRATCH + num_requests + num_snapshots, num_snapshots)


def warm_up_sizes(max_tokens: int, device: torch.device) -> tuple[int, ...]:
    """Tokens of the passes before any request, the last of `max_tokens`.

    A GPU's kernels are compiled by numbers of rows: while one is, the engine gives no sign of life.
    """
    few = () if device.type == "cpu" else FEW_ROWS
    return (*(size for size in few if size < max_tokens), max_tokens)


class Runner:
    """One rank's model and the storage it computes on; belongs to the engine thread."""

    def __init__(self, model: Model, storage: CacheStorage) -> None:
        self._model = model
        self.storage = storage

    @torch.inference_mode()
    def forward(self, chunks: Sequence[SequenceChunk], on_layers: OnLayers | None = None) -> Tensor:
        """One pass. A snapshot's slot is made a copy of its sequence's before it.

        Returns:
            [num_logits, vocab] float32, in the order of the chunks; a chunk's `logits` says which.
        """
        for chunk in chunks:
            for snapshot in chunk.snapshots:
                self.storage.copy_slot(chunk.slot, snapshot.slot)
        batch = build_batch(chunks, self.storage.device, self.storage.layout.block_size)
        return self.compute(batch, on_layers)

    @torch.inference_mode()
    def compute(self, batch: ForwardBatch, on_layers: OnLayers | None = None) -> Tensor:
        """One pass over a batch that is on the device already; no slot is copied."""
        return self._model.forward(batch, self.storage, on_layers)

    def warm_up(self, max_tokens: int) -> None:
        """First passes over up to `max_tokens` tokens, before any request: block and slot 1 on.

        What they leave in blocks is never read; the slot is made clean again.
        """
        room = (self.storage.num_blocks - NUM_SCRATCH) * self.storage.layout.block_size
        for num_tokens in warm_up_sizes(max(1, min(max_tokens, room)), self.storage.device):
            last_block = NUM_SCRATCH + self.storage.layout.num_blocks(num_tokens)
            chunk = SequenceChunk(
                token_ids=[0] * num_tokens,
                start=0,
                block_ids=list(range(NUM_SCRATCH, last_block)),
                slot=NUM_SCRATCH,
            )
            self.forward([chunk])
            self.storage.reset_slot(NUM_SCRATCH)
        self.synchronize()

    def mark(self) -> torch.cuda.Event | None:
        """The work given to the device so far; None where it is done already."""
        if self.storage.device.type != "cuda":
            return None
        mark: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self.storage.device))
        return mark

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it, where that is another device."""
        if self.storage.device.type == "cuda":
            torch.cuda.current_stream(self.storage.device).synchronize()
