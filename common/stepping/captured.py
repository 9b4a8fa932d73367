"""Steps as captured graphs: model, draw and feedback on the device, the host one step behind.

Some batch sizes have graphs (`bucket_sizes`), one for plain batches, which only take the most
likely tokens, and one for all others; a batch is padded to the next size. All graphs read and write
the same rows, so that a step follows another of any size without a copy. What the host changes
between two steps (who came, who left, new blocks) is one copy and one launch.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from scission.common.model.batch import send
from scission.common.runner import Runner
from scission.common.sampling import SequenceSampling, describe, most_alternatives, sample
from scission.common.stepping.chunked import chunk_of
from scission.common.stepping.rows import RowChange, RunningRows
from scission.common.stepping.seats import Seats
from scission.common.stepping.sequences import Drawn, Planned, S, advance
from scission.kernels import sampling as kernels

logger = logging.getLogger(__name__)

WARM_UPS = 2
# left free on the device: what eager passes beside the graphs need
SPARE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class _Logprobs(Generic[S]):
    """Logprobs of a step's tokens under way to the host."""

    sequences: list[S]
    columns: list[Tensor]

    def by_sequence(self) -> dict[S, Any]:
        num_tops = [sequence.sampling.params.logprobs or 0 for sequence in self.sequences]
        logprobs, ranks, top_ids, top_logprobs = self.columns
        described = describe(logprobs, ranks, top_ids, top_logprobs, num_tops)
        return dict(zip(self.sequences, described, strict=True))


@dataclass(frozen=True, slots=True)
class ReplayedStep(Generic[S]):
    """A step under way. Where the host draws, it is collected before another one is submitted."""

    sequences: Sequence[S]
    num_tokens: int
    context_lens: dict[S, int]  # of all that draw, in the order of the plan
    by_device: dict[S, int]  # row
    by_host: dict[S, int]  # row
    token_ids: Tensor  # [rows] int64, on the host once `done` is passed
    logprobs: _Logprobs[S] | None
    logits: Tensor  # [rows, vocab] float32, until another step is submitted
    done: torch.cuda.Event | None

    @property
    def is_awaited(self) -> bool:
        return bool(self.by_host)

    def collect(self) -> list[Drawn[S]]:
        if self.done is not None:
            self.done.synchronize()
        token_ids = self.token_ids.tolist()
        logprobs = {} if self.logprobs is None else self.logprobs.by_sequence()
        drawn = {s: (token_ids[row], logprobs.get(s)) for s, row in self.by_device.items()}
        if self.by_host:
            logits = self.logits[list(self.by_host.values())]
            tokens = sample(logits, [sequence.sampling for sequence in self.by_host])
            drawn |= dict(zip(self.by_host, tokens, strict=True))
        return [Drawn(s, *drawn[s], context_len) for s, context_len in self.context_lens.items()]


class CapturedSteps(Generic[S]):
    """See the module. On a CPU the same steps run without graphs: for tests."""

    def __init__(
        self,
        runner: Runner,
        sizes: Sequence[int],
        max_context: int,
        vocab_size: int,
        *,
        depth: int = 1,
    ) -> None:
        """Batches are padded to one of `sizes`, ascending; their sequences have up to
        `max_context` tokens. `capture` makes the graphs.
        """
        self.depth = depth
        self._runner = runner
        self._device = runner.storage.device
        block_size = runner.storage.layout.block_size
        self._rows = RunningRows(sizes, max_context, block_size, vocab_size, self._device)
        self._replays: dict[tuple[int, bool], Callable[[], None]] = {}  # by size, and if plain
        # of the last step that was not plain, as the model gave them
        self._logits = torch.empty(sizes[-1], vocab_size, device=self._device)
        self._seats: Seats[S] = Seats(sizes)
        self._num_blocks: dict[S, int] = {}  # that the device knows
        self._fed_by_host: set[S] = set()  # the device holds another next token
        self._num_steps = 0
        self._is_torn = False  # a step broke off: what the rows hold is not known
        is_gpu = self._device.type == "cuda"
        # a step's tokens stay until it is collected
        self._token_ids = [
            torch.empty(sizes[-1], dtype=torch.int64, pin_memory=is_gpu) for _ in range(depth + 2)
        ]

    @torch.inference_mode()
    def capture(self, on_graph: Callable[[int, int], None] | None = None) -> None:
        """Make the graphs, the largest first: the others fit into its memory.

        Where memory runs short the small ones are left out, and larger ones serve their batches.

        Args:
            on_graph: called after each batch size with how many there are and will be.
        """
        if self._device.type != "cuda":
            return
        # the first request waits for no compiler
        self._rows.write([RowChange(0, -1)])
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        sizes = self._seats.sizes[::-1]
        for number, size in enumerate(sizes):
            free, _ = torch.cuda.mem_get_info(self._device)
            if number and free < SPARE_BYTES:
                logger.warning(
                    "%d bytes are free: no graphs below %d rows", free, sizes[number - 1]
                )
                self._seats = Seats(self._seats.sizes[-number:])
                break
            for is_plain in (False, True):
                self._replays[size, is_plain] = self._capture(size, is_plain, pool, stream)
            if on_graph is not None:
                on_graph(number + 1, len(sizes))

    def submit(self, planned: Sequence[Planned[S]]) -> ReplayedStep[S]:
        """Several pending tokens of a sequence run as a chunk before the others' step."""
        behind = [p for p in planned if p.count > 1 or not p.draws]
        drawing = [p for p in planned if p.draws]
        waiting = [p for p in planned if not p.draws]
        num_tokens = sum(p.count for p in planned)
        if behind:
            self._runner.forward([chunk_of(p, p.count - p.draws, "none") for p in behind])
        if self._is_torn:
            self._rows.clear()
            self._seats = Seats(self._seats.sizes)
        self._is_torn = True
        self._place(drawing)
        rows = {p.sequence: self._seats.rows[p.sequence] for p in drawing}
        by_host = {s: row for s, row in rows.items() if s.sampling.needs_host}
        by_device = {s: row for s, row in rows.items() if s not in by_host}
        if drawing:
            self._replay(is_plain=all(_is_plain(s.sampling) for s in rows))
        step = ReplayedStep(
            [p.sequence for p in planned],
            num_tokens,
            {p.sequence: advance(p) for p in drawing},
            by_device,
            by_host,
            self._fetch_tokens(),
            self._start_logprobs(by_device),
            self._logits,
            self._runner.mark(),
        )
        for p in waiting:
            advance(p)
        self._fed_by_host = set(by_host)
        self._num_steps += 1
        self._is_torn = False
        return step

    def _place(self, drawing: Sequence[Planned[S]]) -> None:
        """Bring the rows on the device to what the step needs; mostly they are there already."""
        seating = self._seats.arrange([p.sequence for p in drawing])
        # the token of a row that is left may be read in the same launch: it stays
        changes = [RowChange(row, -1 - row) for row in seating.emptied]
        if changes or seating.joined:
            rows = self._seats.rows
            self._num_blocks = {s: n for s, n in self._num_blocks.items() if s in rows}
        for p in drawing:
            s = p.sequence
            row = self._seats.rows[s]
            if s in seating.joined or s in self._fed_by_host:
                token = s.pending[-1]
                if s.sampling.has_device_penalties:
                    self._rows.write_seen(row, s.sampling)
            elif s in seating.moved:
                token = -1 - seating.moved[s]
                if s.sampling.has_device_penalties:
                    self._rows.move_seen(seating.moved[s], row)
            elif self._num_blocks[s] != len(s.block_ids):
                token = -1 - row
            else:
                continue
            self._num_blocks[s] = len(s.block_ids)
            position = s.num_computed + p.count - 1
            num_drawn = s.sampling.num_output + s.num_under_way
            changes.append(
                RowChange(row, token, position, s.slot, s.block_ids, s.sampling, num_drawn)
            )
        if changes:
            self._rows.write(changes)

    def _replay(self, *, is_plain: bool) -> None:
        size = self._seats.size
        replay = self._replays.get((size, is_plain))
        if replay is None:
            self._compute(size, is_plain)
        else:
            replay()

    @torch.inference_mode()
    def _compute(self, size: int, is_plain: bool) -> None:
        logits = self._runner.compute(self._rows.batches[size])
        if not is_plain:
            self._logits[:size].copy_(logits)
        kernels.draw_next_(logits, self._rows.next_tokens[size], is_greedy=is_plain)

    def _capture(
        self, size: int, is_plain: bool, pool: Any, stream: torch.cuda.Stream
    ) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._compute(size, is_plain)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            self._compute(size, is_plain)
        # the first replay also brings the graph to the device
        graph.replay()
        replay: Callable[[], None] = graph.replay
        return replay

    def _fetch_tokens(self) -> Tensor:
        tokens = self._token_ids[self._num_steps % len(self._token_ids)]
        return tokens.copy_(self._rows.token_ids, non_blocking=True)

    @torch.inference_mode()
    def _start_logprobs(self, rows: dict[S, int]) -> _Logprobs[S] | None:
        wanted = [s for s in rows if s.sampling.params.logprobs is not None]
        if not wanted:
            return None
        (at,) = send([np.array([rows[s] for s in wanted])], self._device)
        columns = kernels.token_logprobs(
            self._logits.index_select(0, at),
            self._rows.token_ids.index_select(0, at),
            most_alternatives([s.sampling for s in wanted], self._logits.shape[1]),
        )
        return _Logprobs(wanted, [self._to_host(column) for column in columns])

    def _to_host(self, column: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return column
        host = torch.empty(column.shape, dtype=column.dtype, pin_memory=True)
        return host.copy_(column, non_blocking=True)


def _is_plain(sampling: SequenceSampling) -> bool:
    """Nothing is asked of a step but the most likely token of the logits as they are."""
    wants_logits = sampling.needs_host or sampling.params.logprobs is not None
    return sampling.is_greedy and not sampling.has_penalties and not wants_logits
