"""The running batch's rows on the device, as the model and the draw of a step take them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from scission.common.model.batch import ForwardBatch, send
from scission.common.sampling import SequenceSampling
from scission.kernels.decode_rows import new_rows, write_rows_
from scission.kernels.places import Places
from scission.kernels.sampling import OF_PROMPT, NextTokens


@dataclass(frozen=True, slots=True)
class RowChange:
    """What a row becomes. `token` -1 - r: the one that row r holds on the device."""

    row: int
    token: int = 0
    position: int = -1
    slot: int = 0
    block_ids: Sequence[int] = ()
    sampling: SequenceSampling | None = None  # None: padding
    count: int = 0  # tokens of the output so far, those under way included


class RunningRows:
    """Memory of a fixed place for all batches: one of n rows is the first n of it."""

    def __init__(
        self,
        sizes: Sequence[int],
        max_context: int,
        block_size: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        """`sizes`: how many rows a batch may have, ascending."""
        self._device = device
        self._rows = new_rows(sizes[-1], -(-max_context // block_size), vocab_size, device)
        self.next_tokens = {size: self._next_tokens(size) for size in sizes}
        # each a token a row; without lengths on the host, as those change
        self.batches = {size: self._batch(size, max_context, block_size) for size in sizes}

    @property
    def token_ids(self) -> Tensor:
        """[rows] int64: what each row is fed next."""
        return self._rows.next_tokens.token_ids

    def clear(self) -> None:
        """Make all rows padding."""
        tokens = self._rows.next_tokens
        tokens.positions.fill_(-1)
        tokens.context_lens.zero_()
        tokens.writer_ends.zero_()
        self._rows.slots.zero_()
        self._rows.block_tables.zero_()

    def _next_tokens(self, size: int) -> NextTokens:
        tokens = self._rows.next_tokens
        return NextTokens(**{f.name: getattr(tokens, f.name)[:size] for f in fields(tokens)})

    def _batch(self, size: int, max_context: int, block_size: int) -> ForwardBatch:
        tokens, slots = self.next_tokens[size], self._rows.slots[:size]
        numbers = torch.arange(size + 1, device=self._device)
        places = Places(
            positions=tokens.positions,
            sequences=numbers[:size],
            cu_seqlens=numbers.int(),
            context_lens=tokens.context_lens,
            block_tables=self._rows.block_tables[:size],
            slots=slots,
            writer_sequences=numbers[:size],
            writer_slots=slots,
            writer_ends=tokens.writer_ends,
            block_size=block_size,
            is_single=True,
            max_tokens=1,
            max_context=max_context,
        )
        return ForwardBatch(tokens.token_ids, places, numbers[:size], (), (), ())

    def write(self, changes: Sequence[RowChange]) -> None:
        """Change rows between two steps, by one copy and one launch."""
        lines: list[list[int]] = []
        block_ids: list[int] = []
        for change in changes:
            lines.append(_line(change, len(block_ids)))
            block_ids += change.block_ids
        write_rows_(
            self._rows,
            *send((np.array(lines, np.int64), np.array(block_ids, np.int64)), self._device),
        )

    def write_seen(self, row: int, sampling: SequenceSampling) -> None:
        """Tell a row with penalties which tokens it has seen, as the host knows them."""
        token_ids, counts = sampling.seen
        seen = self._rows.next_tokens.seen[row]
        seen.zero_()
        if len(token_ids):
            ids, times = send((token_ids, counts.astype(np.int32) + OF_PROMPT), self._device)
            seen.index_copy_(0, ids, times)

    def move_seen(self, source: int, row: int) -> None:
        """Give a row what another one has seen."""
        seen = self._rows.next_tokens.seen
        seen[row].copy_(seen[source])


def _line(change: RowChange, first_block: int) -> list[int]:
    """In the order of CHANGE_FIELDS."""
    sampling = change.sampling
    place = [change.row, change.token, change.position, change.slot, first_block]
    if sampling is None:
        return [*place, 0, 0, 0, 0, 0, *_bits(0, 1, 0, 0, 0, 1)]
    params = sampling.params
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    if not sampling.has_device_penalties:
        penalties = (0.0, 0.0, 1.0)
    return [
        *place,
        len(change.block_ids),
        params.seed,
        sampling.choice,
        change.count,
        params.top_k,
        *_bits(params.temperature, params.top_p, params.min_p, *penalties),
    ]


def _bits(*values: float) -> list[int]:
    bits: list[int] = np.array(values, np.float32).view(np.int32).tolist()
    return bits
