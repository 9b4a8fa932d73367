"""Which prefill and which decode take a request.

Only workers with equal layout digests are paired. `cache_aware`, the default, weighs the prompt
tokens that a prefill would still have to compute against those that wait there already.
"""

import itertools
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from scission.common.config import RoutingOptions
from scission.common.errors import (
    CapacityError,
    ContextLengthError,
    RequestError,
    UnavailableError,
)
from scission.common.metrics import GatewayMetrics
from scission.common.prefix_hash import block_hashes
from scission.common.types import Role
from scission.services.gateway.registry import DigestKey, Registry, Worker

# A prompt's prefix is looked up to this length: routing stays well under a millisecond.
MAX_MATCHED_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request needs of its workers."""

    prompt_token_ids: Sequence[int]  # forced tokens included
    cache_salt: str
    max_tokens: int  # still to come, of one choice
    needs_decode: bool
    num_choices: int = 1  # not finished yet

    @property
    def num_prefill_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """The context that one choice may grow to."""
        return len(self.prompt_token_ids) + self.max_tokens


@dataclass(frozen=True, slots=True)
class Pair:
    prefill: Worker
    decode: Worker | None
    matched_tokens: int = 0  # of the prompt, known to be in the prefill's cache


class Router:
    def __init__(
        self,
        registry: Registry,
        options: RoutingOptions,
        metrics: GatewayMetrics,
        rng: random.Random,
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._rng = rng
        self._turns = {Role.PREFILL: itertools.count(), Role.DECODE: itertools.count()}
        self._policy = options.policy

    def pick(self, demand: Demand, avoid: Collection[str] = ()) -> Pair:
        """A pair for a request; workers in `avoid` (ids) are left out.

        Raises:
            UnavailableError: there is no pair, whoever is avoided.
            CapacityError: there are pairs, but every one has an avoided worker.
            RequestError: there are pairs, but the request can never fit any.
        """
        prefills = self._registry.available(Role.PREFILL)
        decodes = self._registry.available(Role.DECODE)
        groups = {w.digest_key for w in decodes}
        prefills = [w for w in prefills if not demand.needs_decode or w.digest_key in groups]
        if not prefills:
            raise self._unavailable(demand)
        prefills = _that_fit(prefills, demand)
        if demand.needs_decode:
            decodes = _that_fit(decodes, demand)
        free_decodes = [w for w in decodes if w.worker_id not in avoid]
        groups = {w.digest_key for w in free_decodes}
        free_prefills = [
            w
            for w in prefills
            if w.worker_id not in avoid and (not demand.needs_decode or w.digest_key in groups)
        ]
        if not free_prefills:
            raise CapacityError("No worker has room for the request. Please retry later.")
        prefill, matched_tokens = self._pick_prefill(free_prefills, demand)
        self._metrics.matched_prefix_tokens.inc(matched_tokens)
        if not demand.needs_decode:
            return Pair(prefill, None, matched_tokens)
        peers = [w for w in free_decodes if w.digest_key == prefill.digest_key]
        return Pair(prefill, self._pick_decode(peers, demand), matched_tokens)

    def pick_decode(
        self, demand: Demand, digest_key: DigestKey, avoid: Collection[str] = ()
    ) -> Worker:
        """Another decode for state that a prefill holds already; raises as `pick`."""
        decodes = [w for w in self._registry.available(Role.DECODE) if w.digest_key == digest_key]
        if not decodes:
            raise self._unavailable(demand)
        free = [w for w in _that_fit(decodes, demand) if w.worker_id not in avoid]
        if not free:
            raise CapacityError("No decode worker has room for the request.")
        return self._pick_decode(free, demand)

    def _unavailable(self, demand: Demand) -> UnavailableError:
        reason = self._registry.explain() or "no worker answers"
        if not demand.needs_decode and self._registry.available(Role.DECODE):
            reason = "no prefill worker answers"
        return UnavailableError(
            f"The model is not available: {reason}. Please retry later.", retry_after_s=1.0
        )

    def _pick_prefill(self, workers: Sequence[Worker], demand: Demand) -> tuple[Worker, int]:
        if self._policy == "cache_aware":
            matched = self._matched_tokens(workers, demand)
            best = self._least(
                workers,
                lambda w: (
                    _waiting_tokens(w) + demand.num_prefill_tokens - matched.get(w.worker_id, 0),
                ),
            )
            return best, matched.get(best.worker_id, 0)
        return self._by_policy(Role.PREFILL, workers, lambda w: (_waiting_tokens(w),)), 0

    def _pick_decode(self, workers: Sequence[Worker], demand: Demand) -> Worker:
        def load(worker: Worker) -> tuple[float, ...]:
            link, description = worker.link, worker.description
            needed = -(-demand.num_prefill_tokens // max(1, description.block_size))
            is_full = link.load.total_blocks > 0 and needed > link.load.free_blocks
            sequences = link.load.num_running + link.load.num_queued + link.unreported_requests
            return (is_full, sequences / max(1, description.max_num_seqs))

        return self._by_policy(Role.DECODE, workers, load)

    def _by_policy(
        self, role: Role, workers: Sequence[Worker], load: Callable[[Worker], tuple[float, ...]]
    ) -> Worker:
        match self._policy:
            case "random":
                return self._rng.choice(workers)
            case "round_robin":
                return workers[next(self._turns[role]) % len(workers)]
            case "power_of_two":
                return self._least(self._rng.sample(workers, min(2, len(workers))), load)
            case "cache_aware":
                return self._least(workers, load)

    def _least(
        self, workers: Sequence[Worker], load: Callable[[Worker], tuple[float, ...]]
    ) -> Worker:
        # Ties are broken at random, or several gateways would all pick the same worker.
        return min(workers, key=lambda worker: (load(worker), self._rng.random()))

    def _matched_tokens(self, workers: Sequence[Worker], demand: Demand) -> dict[str, int]:
        holders = [worker for worker in workers if worker.prefixes]
        if not holders:
            return {}
        # Workers of one model share a block size; one that differs matches nothing.
        block_size = holders[0].description.block_size
        if block_size == 0:
            return {}
        tokens = demand.prompt_token_ids[: MAX_MATCHED_BLOCKS * block_size]
        hashes = block_hashes(tokens, block_size, demand.cache_salt)
        ids = frozenset(w.worker_id for w in holders)
        matched = self._registry.prefix_index.match(hashes, ids)
        # One token is always left to compute.
        most = demand.num_prefill_tokens - 1
        return {worker_id: min(n * block_size, most) for worker_id, n in matched.items()}


def _waiting_tokens(worker: Worker) -> float:
    return worker.link.load.queued_tokens + worker.link.unreported_tokens


def _that_fit(workers: Sequence[Worker], demand: Demand) -> list[Worker]:
    """Those in whose cache the request could run if it were alone.

    Raises:
        ContextLengthError: there is none, not even for one choice.
        RequestError: one choice would fit, but not all of them beside each other.
    """
    able = [worker for worker in workers if _fits(worker, demand)]
    fitting = [w for w in able if w.role is Role.PREFILL or _fits_all_choices(w, demand)]
    if fitting:
        return fitting
    if able:
        raise RequestError(
            f"{demand.num_choices} choices of {demand.num_tokens} tokens "
            f"({demand.num_prefill_tokens} in the prompt) are more than the server's workers can "
            f"run at a time. Please reduce n or max_tokens.",
            param="n",
        )
    room = max(_capacity_tokens(worker) for worker in workers)
    raise ContextLengthError(
        f"The request needs room for {demand.num_tokens} tokens "
        f"({demand.num_prefill_tokens} in the prompt), but the server's workers hold at most "
        f"{room}. Please reduce the length of the prompt or max_tokens."
    )


def _capacity_tokens(worker: Worker) -> int:
    description = worker.description
    room = description.num_blocks * description.block_size or description.max_model_len
    return min(room, description.max_model_len or room)


def _fits(worker: Worker, demand: Demand) -> bool:
    capacity = _capacity_tokens(worker)
    if capacity == 0:
        return True
    if worker.role is Role.PREFILL:
        return demand.num_prefill_tokens <= capacity
    return demand.num_tokens <= capacity


def _fits_all_choices(decode: Worker, demand: Demand) -> bool:
    """The choices of a request run side by side: full blocks of the prompt are shared, all others
    are each choice's own.
    """
    description = decode.description
    if demand.num_choices == 1:
        return True
    if description.max_num_seqs and demand.num_choices > description.max_num_seqs:
        return False
    if not description.num_blocks or not description.block_size:
        return True
    num_shared = demand.num_prefill_tokens // description.block_size
    # The last token is drawn, but its state is never needed.
    num_blocks = -(-(demand.num_tokens - 1) // description.block_size)
    needed = num_shared + demand.num_choices * (num_blocks - num_shared)
    return needed <= description.num_blocks
