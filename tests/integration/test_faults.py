"""A worker is killed or frozen at every stage of a request.

The stream goes on with the right tokens or, when no other worker of the role lives, ends with a
well-formed error; afterwards everything is free again.
"""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from tests.integration.stack import Stack, token_ids_of, wait_until
from tests.reference_checkpoint import tiny_config

GOES_ON_WITHIN_S = 5.0
NUM_TOKENS = 160
PROMPT = [0, *((7 * i + i // 90) % 240 + 3 for i in range(3000))]
# the request's stage at which the fault strikes: tokens the client has seen
STAGES = {"computing": 0, "handing-over": 1, "decoding": 40}
FAULTS = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_random_deepseek_v4(folder, tiny_config(), seed=11, shards=1)
    return folder


@pytest.fixture(scope="module")
def pairs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two prefills and two decodes."""
    with Stack(
        model,
        tmp_path_factory.mktemp("logs"),
        prefills=2,
        decodes=2,
        flags=["--max-num-batched-tokens=96", "--no-enable-prefix-caching"],
    ) as running:
        yield running


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One prefill, one decode."""
    with Stack(model, tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="module")
def expected(pairs: Stack) -> list[int]:
    return token_ids_of(pairs.complete(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True))


class Strike:
    """Sends the signal to whichever worker of the role serves the request, and remembers which."""

    def __init__(self, stack: Stack, role: str, number: signal.Signals) -> None:
        self._stack = stack
        self._role = role
        self._number = number
        self.victim = ""
        self.at = 0.0

    def __call__(self) -> None:
        def find() -> bool:
            self.victim = self._stack.busy(self._role) or ""
            return bool(self.victim)

        wait_until(find, 5.0, f"a {self._role} serves the request")
        self._stack.signal(self.victim, self._number)
        self.at = time.monotonic()


def consume(
    stack: Stack, prompt: list[int], strike: Callable[[], None], after_tokens: int, **fields: Any
) -> tuple[list[int], list[float], dict[str, Any] | None]:
    """Stream a request, striking once; its tokens, when each event came, and the error event."""
    tokens: list[int] = []
    times: list[float] = []
    error = None
    pool = ThreadPoolExecutor(max_workers=1)
    striking: Future[None] | None = None
    if after_tokens == 0:
        striking = pool.submit(strike)
    with stack.stream(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, **fields) as events:
        for event in events:
            times.append(time.monotonic())
            if "error" in event:
                error = event["error"]
                continue
            tokens += token_ids_of(event)
            if striking is None and len(tokens) >= after_tokens:
                striking = pool.submit(strike)
    assert striking is not None
    striking.result()
    return tokens, times, error


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_stream_goes_on_when_another_worker_lives(
    pairs: Stack, expected: list[int], stage: str, role: str, fault: str
) -> None:
    strike = Strike(pairs, role, FAULTS[fault])
    if role == "decode" and STAGES[stage] == 0:
        # a decode holds nothing of the request yet: strike the one that is about to get it
        strike = StrikeIdle(pairs, FAULTS[fault])
    elif role == "prefill" and stage == "decoding":
        # the prefill has let go of the request: its death must not be felt
        strike = StrikeIdle(pairs, FAULTS[fault], role="prefill")
    tokens, times, error = consume(pairs, PROMPT, strike, STAGES[stage])
    assert error is None
    assert tokens == expected
    gaps = [later - earlier for earlier, later in zip([strike.at, *times], times, strict=False)]
    after = [gap for gap, moment in zip(gaps, times, strict=True) if moment > strike.at]
    assert max(after, default=0.0) < GOES_ON_WITHIN_S
    pairs.revive(strike.victim)
    pairs.wait_drained()


class StrikeIdle(Strike):
    """Strikes the first worker of the role, whatever it does."""

    def __init__(self, stack: Stack, number: signal.Signals, role: str = "decode") -> None:
        super().__init__(stack, role, number)

    def __call__(self) -> None:
        self.victim = f"{self._role}-0"
        self._stack.signal(self.victim, self._number)
        self.at = time.monotonic()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_without_another_worker_the_stream_ends_with_an_error_and_service_returns(
    single: Stack, role: str, fault: str
) -> None:
    number = FAULTS[fault]
    stage = "computing" if role == "prefill" else "decoding"
    strike = Strike(single, role, number)
    started = time.monotonic()
    try:
        _, times, error = consume(single, PROMPT, strike, STAGES[stage])
        assert error is not None and error["message"] and error["type"]
        assert times[-1] - strike.at < GOES_ON_WITHIN_S
    except AssertionError as refusal:
        # before the first event the answer is a status with the same JSON
        assert refusal.args and '{"error":{' in refusal.args[0].replace(" ", "")
        assert time.monotonic() - started < 2 * GOES_ON_WITHIN_S
    single.revive(strike.victim)
    for i in range(100):
        answer = single.complete([0, 5 + i, 9], max_tokens=3, ignore_eos=True)
        assert len(token_ids_of(answer)) == 3
    single.wait_drained()


def test_a_killed_gateways_requests_are_freed_and_another_gateway_serves(
    model: Path, tmp_path: Path
) -> None:
    with Stack(model, tmp_path, gateways=2) as stack:
        stack.wait_ready(gateway=1)
        with stack.stream(PROMPT, max_tokens=2000, ignore_eos=True) as events:
            for _ in range(5):
                next(events)
            stack.kill("gateway-0")
            answer = stack.complete([0, 4, 5], gateway=1, max_tokens=4, ignore_eos=True)
            assert len(token_ids_of(answer)) == 4

            def is_drained() -> bool:
                return all(
                    not {k for k, v in stack.blocks(worker["metrics_address"]).items() if v}
                    - {"free", "cached"}
                    for worker in stack.workers(gateway=1)
                )

            wait_until(is_drained, 10.0, "the dead gateway's requests are freed")
