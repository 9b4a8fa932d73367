"""Which tokens the next step computes: seniority first, under a token budget.

Requests that have begun go on before others begin; a request begins when its whole state has room.
Chunks depend on the budget and on the order of arrivals alone, so that a schedule can be replayed.
"""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scission.common.model.batch import Snapshot
from scission.services.prefill.request import Phase, Request
from scission.services.prefill.state import StateStore


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The tokens [start, end) of one request, to be computed in this step."""

    request: Request
    start: int
    end: int
    snapshots: tuple[Snapshot, ...]

    @property
    def is_last(self) -> bool:
        return self.end == self.request.num_tokens


class Scheduler:
    """The queue and the requests that are being computed; belongs to the engine thread."""

    def __init__(
        self,
        store: StateStore,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_queued: int,
        max_logits: int,
        make_room: Callable[[], bool],
    ) -> None:
        """
        Args:
            max_logits: rows of logits that the prompt logprobs of one step may take.
            make_room: frees retained state that can be spared; False when there is none.
        """
        self._store = store
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._max_queued = max_queued
        self._max_logits = max_logits
        self._make_room = make_room
        self._queued: list[Request] = []  # by order, then arrival
        self._num_queued_tokens = 0
        self._short_of_room_since: float | None = None
        self._computing: list[Request] = []  # likewise

    @property
    def num_queued(self) -> int:
        return len(self._queued)

    @property
    def num_computing(self) -> int:
        return len(self._computing)

    @property
    def is_full(self) -> bool:
        return len(self._queued) >= self._max_queued

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens accepted and not computed."""
        return self._num_queued_tokens + sum(r.num_tokens - r.num_computed for r in self._computing)

    def short_of_room_s(self, now: float) -> float:
        """How long the eldest of the queue has waited for room alone."""
        if not self._queued or self._short_of_room_since is None:
            return 0.0
        return now - self._short_of_room_since

    def add(self, request: Request) -> None:
        assert request.phase is Phase.QUEUED and not self.is_full
        self._num_queued_tokens += request.num_tokens
        bisect.insort(self._queued, request, key=lambda r: r.order)

    def remove(self, request: Request) -> None:
        """Forget a request that was cancelled or is computed; its state is the caller's."""
        match request.phase:
            case Phase.QUEUED:
                self._queued.remove(request)
                self._num_queued_tokens -= request.num_tokens
            case Phase.COMPUTING:
                self._computing.remove(request)
            case Phase.RETAINED:
                pass

    def schedule(self, now: float) -> list[ScheduledChunk]:
        """The next step's chunks, none when there is nothing to compute or no room to begin.

        A request that begins becomes COMPUTING and gets its state; what is cached of it counts as
        computed.
        """
        chunks: list[ScheduledChunk] = []
        num_tokens = self._max_num_batched_tokens
        num_logits = self._max_logits
        for request in self._next_requests(now):
            limit = min(num_tokens, num_logits) if request.wants_prompt_logprobs else num_tokens
            if limit > 0:
                start = request.num_computed
                end = self._chunk_end(start, request.num_tokens, limit)
                snapshots = self._store.snapshots(request.hashes, start, end, request.num_tokens)
                chunks.append(ScheduledChunk(request, start, end, snapshots))
                num_tokens -= end - start
                if request.wants_prompt_logprobs:
                    num_logits -= end - start
            if num_tokens == 0:
                break
        return chunks

    def _next_requests(self, now: float) -> Iterator[Request]:
        yield from list(self._computing)
        short_since, self._short_of_room_since = self._short_of_room_since, None
        while self._queued and len(self._computing) < self._max_num_seqs:
            request = self._queued[0]
            # the eldest waits for its room: nobody overtakes it
            if not self._begin(request):
                self._short_of_room_since = now if short_since is None else short_since
                return
            yield request

    def _begin(self, request: Request) -> bool:
        while True:
            room = self._store.acquire(
                request.num_tokens,
                request.hashes,
                reads_cache=not request.wants_prompt_logprobs,
            )
            if room is not None:
                break
            if not self._make_room():
                return False
        self._queued.pop(0)
        self._num_queued_tokens -= request.num_tokens
        request.state = room.state
        request.num_computed = request.num_cached = room.num_cached
        request.phase = Phase.COMPUTING
        bisect.insort(self._computing, request, key=lambda r: r.order)
        return True

    def _chunk_end(self, start: int, num_tokens: int, limit: int) -> int:
        """What is left, or what the limit allows: to the end of a block where that is possible."""
        end = min(num_tokens, start + limit)
        if end < num_tokens:
            aligned = end // self._store.block_size * self._store.block_size
            if aligned > start:
                return aligned
        return end
