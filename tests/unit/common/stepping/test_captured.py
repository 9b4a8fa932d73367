"""Captured steps draw what chunked ones draw, whoever comes and leaves; on a GPU as graphs."""

import gc
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from scission.common.cache.storage import CacheStorage
from scission.common.runner import Runner
from scission.common.sampling import SequenceSampling
from scission.common.stepping.captured import CapturedSteps
from scission.common.stepping.chunked import ChunkedSteps
from scission.common.stepping.seats import bucket_sizes
from scission.common.stepping.sequences import (
    DecodeSequence,
    Planned,
    Steps,
    Submitted,
    append,
)
from scission.common.types import SamplingParams, TokenLogprobs
from tests.unit.common.stepping.placed_model import BLOCK, LAYOUT, VOCAB, WINDOW, PlacedModel

MAX_ROWS = 9
MAX_CONTEXT = 64
BLOCKS_EACH = MAX_CONTEXT // BLOCK

Token = tuple[int, TokenLogprobs | None]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


class Script:
    """Sequences that come and leave at given steps, each in blocks and a slot of its own."""

    def __init__(self, device: torch.device, is_captured: bool, depth: int = 1) -> None:
        num_blocks = 1 + MAX_ROWS * BLOCKS_EACH
        self.storage = CacheStorage(LAYOUT, num_blocks, 1 + MAX_ROWS, device)
        self.storage.paged["tokens"].fill_(7)
        self.storage.slots["window"].fill_(9)
        runner = Runner(PlacedModel(device), self.storage)
        self.steps: Steps[DecodeSequence] = ChunkedSteps(runner)
        if is_captured:
            captured: CapturedSteps[DecodeSequence] = CapturedSteps(
                runner, bucket_sizes(MAX_ROWS), MAX_CONTEXT, VOCAB, depth=depth
            )
            captured.capture()
            self.steps = captured
        self.under_way: deque[Submitted[DecodeSequence]] = deque()
        self.running: list[DecodeSequence] = []
        self.tokens: dict[DecodeSequence, list[Token]] = {}

    def join(self, place: int, pending: list[int], **params: Any) -> DecodeSequence:
        """A sequence whose first WINDOW tokens are in place; `pending` follow."""
        given = SamplingParams(
            **{"max_tokens": 99, "temperature": 0.0, "ignore_eos": True} | params
        )
        first = 1 + place * BLOCKS_EACH
        slot = 1 + place
        for position in range(WINDOW):
            self.storage.paged["tokens"][0, first, position] = position + 3 * place
            self.storage.slots["window"][0, slot, position % WINDOW] = position + 3 * place
        sampling = SequenceSampling(given, place, range(WINDOW))
        sequence = DecodeSequence(sampling, [first], slot, WINDOW, list(pending))
        self.running.append(sequence)
        self.tokens[sequence] = []
        return sequence

    def leave(self, sequence: DecodeSequence) -> None:
        self.running.remove(sequence)

    def step(self, budget: int = 5) -> None:
        planned = []
        for sequence in self.running:
            count = max(1, min(len(sequence.pending), budget))
            needed = -(-(sequence.num_computed + count) // BLOCK)
            while len(sequence.block_ids) < needed:
                sequence.block_ids.append(sequence.block_ids[-1] + 1)
            planned.append(Planned(sequence, count))
        depth = 0
        if planned:
            self.under_way.append(self.steps.submit(planned))
            depth = 0 if self.under_way[-1].is_awaited else self.steps.depth
        while len(self.under_way) > depth:
            for drawn in self.under_way.popleft().collect():
                if drawn.sequence in self.running:
                    append(drawn)
                    self.tokens[drawn.sequence].append((drawn.token_id, drawn.logprobs))

    def settle(self) -> None:
        while self.under_way:
            for drawn in self.under_way.popleft().collect():
                if drawn.sequence in self.running:
                    append(drawn)
                    self.tokens[drawn.sequence].append((drawn.token_id, drawn.logprobs))


def play(script: Script) -> list[list[Token]]:
    """Greedy and random sequences, chunks, logprobs, and draws that need the host."""
    greedy = script.join(0, [5])
    for _ in range(2):
        script.step()
    script.join(1, [6], temperature=1.0, seed=3)
    script.step()
    script.join(2, [8, 9, 10, 11, 12, 13, 14], temperature=0.7, top_k=9, top_p=0.9, seed=-4)
    for _ in range(3):
        script.step()
    script.join(3, [1], logprobs=4)
    penalised = script.join(4, [2], temperature=1.0, repetition_penalty=1.3)
    moving = script.join(8, [4], temperature=1.0, frequency_penalty=0.6, min_tokens=3)
    for _ in range(3):
        script.step()
    script.leave(greedy)
    script.step()
    script.leave(penalised)
    script.join(4, [3], temperature=0.8, frequency_penalty=0.4, presence_penalty=0.2, logprobs=1)
    script.join(0, [3], logit_bias={4: 9.0})
    crowd = [script.join(5 + i, [20 + i], temperature=0.5 * i, min_p=0.02) for i in range(3)]
    for _ in range(12):
        script.step()
    for sequence in crowd:
        script.leave(sequence)
    for _ in range(4):
        script.step()
    for sequence in list(script.running):
        if sequence is not moving:
            script.leave(sequence)
            script.step()
    for _ in range(4):
        script.step()
    script.settle()
    return list(script.tokens.values())


@pytest.mark.parametrize("depth", [0, 1])
def test_captured_steps_draw_what_chunks_draw(device: torch.device, depth: int) -> None:
    expected = play(Script(device, is_captured=False))
    actual = play(Script(device, is_captured=True, depth=depth))
    for ours, theirs in zip(actual, expected, strict=True):
        # one that leaves may have had a token under way
        assert len(theirs) - 1 <= len(ours) <= len(theirs)
        for (token, logprobs), (wanted, wanted_logprobs) in zip(ours, theirs, strict=False):
            assert token == wanted
            assert (logprobs is None) == (wanted_logprobs is None)
            if logprobs is not None and wanted_logprobs is not None:
                assert logprobs.rank == wanted_logprobs.rank
                assert logprobs.logprob == pytest.approx(wanted_logprobs.logprob, abs=1e-5)


def test_a_step_that_breaks_off_leaves_no_row_behind(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(device, is_captured=True)
    script.join(0, [5])
    lost = script.join(1, [6])
    script.step()
    assert isinstance(script.steps, CapturedSteps)
    with monkeypatch.context() as patched:
        patched.setattr(script.steps, "_replay", lambda is_plain: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script.step()
    script.under_way.clear()
    script.running.clear()
    before = script.storage.paged["tokens"].clone()
    script.join(2, [7])
    script.step()
    script.settle()
    # of the sequences that were lost nothing is written any more
    for place in (0, 1):
        ours = slice(1 + place * BLOCKS_EACH, 1 + (place + 1) * BLOCKS_EACH)
        assert torch.equal(script.storage.paged["tokens"][0, ours], before[0, ours])
    assert lost not in script.running


def test_who_has_left_is_forgotten_though_another_takes_the_row(device: torch.device) -> None:
    script = Script(device, is_captured=True)
    sequence = script.join(0, [5], seed=4321)
    for place in range(1, MAX_ROWS):
        script.step()
        script.leave(sequence)
        sequence = script.join(place, [5], seed=4321)
    script.step()
    script.settle()
    script.tokens.clear()
    gc.collect()
    known = [s for s in gc.get_objects() if isinstance(s, DecodeSequence)]
    assert [s for s in known if s.sampling.params.seed == 4321] == [sequence]


@pytest.fixture
def no_syncs() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("no_syncs")
def test_steps_neither_sync_nor_allocate() -> None:
    script = Script(torch.device("cuda"), is_captured=True)
    for place in range(5):
        script.join(
            place, [place], temperature=0.25 * place, top_p=0.9, frequency_penalty=0.1 * place
        )
    for _ in range(4):
        script.step()
    torch.cuda.set_sync_debug_mode("error")
    before = torch.cuda.memory_stats()
    for _ in range(24):  # some give sequences new blocks
        script.step()
    after = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("default")
    for name in ("segment.all.allocated", "num_alloc_retries", "allocated_bytes.all.current"):
        assert after[name] == before[name], name


def logits_of_play(monkeypatch: pytest.MonkeyPatch, has_graphs: bool) -> list[torch.Tensor]:
    """Every step's, by graphs or by the same passes without them."""
    seen = []
    with monkeypatch.context() as patched:
        if not has_graphs:
            patched.setattr(CapturedSteps, "capture", lambda self: None)
        script = Script(torch.device("cuda"), is_captured=True)
        steps: Any = script.steps
        assert bool(steps._replays) == has_graphs
        replay = steps._replay

        def watched(is_plain: bool) -> None:
            # a plain step keeps no logits: its graph is held to its tokens
            replay(is_plain=is_plain)
            if not is_plain:
                seen.append(steps._logits[: len(steps._seats.rows)].clone())

        patched.setattr(steps, "_replay", watched)
        play(script)
    return seen


@pytest.mark.gpu
def test_a_replay_is_its_eager_step_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = logits_of_play(monkeypatch, has_graphs=False)
    replayed = logits_of_play(monkeypatch, has_graphs=True)
    for ours, theirs in zip(replayed, eager, strict=True):
        assert torch.equal(ours, theirs)
