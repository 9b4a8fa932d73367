import random
from collections.abc import Iterable

import pytest

from scission.common.config import RoutingOptions, RoutingPolicy
from scission.common.errors import CapacityError, ContextLengthError, RequestError, UnavailableError
from scission.common.metrics import GatewayMetrics, Metrics
from scission.common.prefix_hash import block_hashes
from scission.common.types import Role
from scission.protos import cluster_pb2, inference_pb2
from scission.services.gateway.registry import PrefixIndex, Worker
from scission.services.gateway.router import Demand, Router

BLOCK_SIZE = 4


class FakeLink:
    def __init__(self) -> None:
        self.load = inference_pb2.Load(free_blocks=100, total_blocks=100)
        self.unreported_tokens = 0
        self.unreported_requests = 0


class FakeRegistry:
    def __init__(self, workers: Iterable[Worker]) -> None:
        self.workers = list(workers)
        self.prefix_index = PrefixIndex()

    def available(self, role: Role) -> list[Worker]:
        return [worker for worker in self.workers if worker.role is role]

    def explain(self) -> str:
        return "" if len(self.workers) > 1 else "no worker"

    def cache(self, worker: Worker, prompt: list[int], *blocks: int) -> None:
        """Let a prefill hold the prefixes of so many blocks of a prompt."""
        hashes = block_hashes(prompt, BLOCK_SIZE)
        worker.prefixes.update(hashes[n - 1] for n in blocks)
        self.prefix_index.add(worker.worker_id, worker.prefixes)


def worker(role: Role, name: str, model: str = "m", num_blocks: int = 100) -> Worker:
    description = cluster_pb2.WorkerDescription(
        worker_id=name,
        role=role,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_num_seqs=8,
        layout_digest={"model": model},
    )
    return Worker(description, FakeLink())  # type: ignore[arg-type]


def make(
    *workers: Worker, policy: RoutingPolicy = "cache_aware", seed: int = 0
) -> tuple[Router, FakeRegistry]:
    registry = FakeRegistry(workers)
    metrics = GatewayMetrics(Metrics(Role.GATEWAY, "tiny", "0"))
    router = Router(
        registry,  # type: ignore[arg-type]
        RoutingOptions(policy),
        metrics,
        random.Random(seed),
    )
    return router, registry


def demand(prompt: list[int], max_tokens: int = 8, needs_decode: bool = True) -> Demand:
    return Demand(prompt, "", max_tokens, needs_decode)


P, D = Role.PREFILL, Role.DECODE
PROMPT = list(range(40))


@pytest.mark.parametrize("policy", ["cache_aware", "power_of_two", "round_robin", "random"])
@pytest.mark.parametrize("seed", range(5))
def test_only_equal_layouts_are_paired(policy: RoutingPolicy, seed: int) -> None:
    workers = [
        worker(role, f"{role}-{model}", model) for role in (P, D) for model in ("x", "y", "z")
    ]
    del workers[-1]  # prefill z has no peer
    router, _ = make(*workers, policy=policy, seed=seed)
    for _ in range(12):
        pair = router.pick(demand(PROMPT))
        assert pair.decode is not None
        assert pair.prefill.digest == pair.decode.digest


def test_the_longest_cached_prefix_wins_although_a_shorter_one_is_missing() -> None:
    short, long = worker(P, "short"), worker(P, "long")
    router, registry = make(short, long, worker(D, "d"))
    registry.cache(short, PROMPT, 2)
    registry.cache(long, PROMPT, 5)
    pair = router.pick(demand(PROMPT))
    assert (pair.prefill, pair.matched_tokens) == (long, 20)


def test_a_busy_worker_loses_to_an_idle_one_with_less_cached() -> None:
    cached, idle = worker(P, "cached"), worker(P, "idle")
    router, registry = make(cached, idle, worker(D, "d"))
    registry.cache(cached, PROMPT, 5)
    cached.link.load.queued_tokens = 21
    assert router.pick(demand(PROMPT)).prefill is idle
    cached.link.load.queued_tokens = 19
    assert router.pick(demand(PROMPT)).prefill is cached


def test_what_a_worker_has_not_reported_yet_counts_as_waiting() -> None:
    first, second = worker(P, "first"), worker(P, "second")
    router, _ = make(first, second, worker(D, "d"))
    first.link.unreported_tokens = 5
    assert router.pick(demand(PROMPT)).prefill is second


def test_a_wholly_cached_prompt_leaves_one_token_to_compute() -> None:
    prefill = worker(P, "p")
    router, registry = make(prefill, worker(D, "d"))
    registry.cache(prefill, PROMPT, 10)
    assert router.pick(demand(PROMPT)).matched_tokens == 39


def test_another_salt_matches_nothing() -> None:
    prefill = worker(P, "p")
    router, registry = make(prefill, worker(D, "d"))
    registry.cache(prefill, PROMPT, 10)
    assert router.pick(Demand(PROMPT, "tenant", 8, True)).matched_tokens == 0


def test_the_decode_with_room_and_fewest_sequences_is_picked() -> None:
    full, busy, idle = (worker(D, name) for name in ("full", "busy", "idle"))
    full.link.load.free_blocks = 3
    busy.link.load.num_running = 2
    idle.link.load.num_running = 1
    router, _ = make(worker(P, "p"), full, busy, idle)
    assert router.pick(demand(PROMPT)).decode is idle


def test_round_robin_takes_turns() -> None:
    workers = [worker(D, f"d{i}") for i in range(3)]
    router, _ = make(worker(P, "p"), *workers, policy="round_robin")
    assert [router.pick(demand(PROMPT)).decode for _ in range(6)] == workers * 2


def test_avoided_workers_are_left_out_until_none_is_left() -> None:
    first, second, decode = worker(P, "first"), worker(P, "second"), worker(D, "d")
    router, _ = make(first, second, decode)
    assert router.pick(demand(PROMPT), {"first"}).prefill is second
    with pytest.raises(CapacityError):
        router.pick(demand(PROMPT), {"first", "second"})
    with pytest.raises(CapacityError):
        router.pick(demand(PROMPT), {"d"})
    with pytest.raises(CapacityError):
        router.pick_decode(demand(PROMPT), first.digest_key, {"d"})


def test_without_a_peer_there_is_no_pair() -> None:
    router, _ = make(worker(P, "p", "x"), worker(D, "d", "y"))
    with pytest.raises(UnavailableError):
        router.pick(demand(PROMPT))
    with pytest.raises(UnavailableError):
        router.pick_decode(demand(PROMPT), (("model", "x"),))


def test_a_request_without_decode_needs_a_prefill_only() -> None:
    prefill = worker(P, "p")
    router, _ = make(prefill)
    pair = router.pick(demand(PROMPT, max_tokens=1, needs_decode=False))
    assert (pair.prefill, pair.decode) == (prefill, None)


def test_workers_too_small_for_a_request_are_left_out() -> None:
    small, large = worker(D, "small", num_blocks=10), worker(D, "large", num_blocks=20)
    router, _ = make(worker(P, "p"), small, large)
    assert router.pick(demand(PROMPT, max_tokens=20)).decode is large
    with pytest.raises(ContextLengthError, match="80"):
        router.pick(demand(PROMPT, max_tokens=41))


def test_choices_that_could_never_run_side_by_side_are_refused_before_anything_runs() -> None:
    decode = worker(D, "d", num_blocks=25)
    router, _ = make(worker(P, "p"), decode)

    def choices(n: int, max_tokens: int) -> Demand:
        return Demand(PROMPT, "", max_tokens, needs_decode=True, num_choices=n)

    # 10 blocks of the prompt are shared, each choice has 5 of its own; the last token needs none
    assert router.pick(choices(3, max_tokens=21)).decode is decode
    with pytest.raises(RequestError, match="3 choices of 62 tokens") as refused:
        router.pick(choices(3, max_tokens=22))
    assert refused.value.param == "n"
    with pytest.raises(RequestError, match="Please reduce n"):
        router.pick(choices(9, max_tokens=2))  # it runs 8 sequences
    assert router.pick(choices(8, max_tokens=2)).decode is decode


def test_removed_prefixes_match_no_more() -> None:
    prefill = worker(P, "p")
    router, registry = make(prefill, worker(D, "d"))
    registry.cache(prefill, PROMPT, 3, 5)
    hashes = block_hashes(PROMPT, BLOCK_SIZE)
    registry.prefix_index.remove("p", [hashes[4]])
    assert router.pick(demand(PROMPT)).matched_tokens == 12
