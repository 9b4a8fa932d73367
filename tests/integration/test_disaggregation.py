"""Both engines, joined by real sockets, against one runner on one cache.

The batches that the engines computed are recorded and computed again, in the same order, by one
runner that prefills and goes on decoding: tokens and logprobs are equal bit for bit. Both engines'
storages are poisoned before.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import zmq

from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.config import SchedulerOptions
from scission.common.engine_inbox import Inbox, InboxItem, Submit
from scission.common.inference_messages import logprobs_from_proto, sampling_to_proto
from scission.common.metrics import Metrics
from scission.common.model.batch import SequenceChunk
from scission.common.model.load import LoadedModel
from scission.common.runner import Runner
from scission.common.sampling import SequenceSampling, sample
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.receiver import Receiver
from scission.common.transfer.sender import Sender
from scission.common.types import Role, SamplingParams, TokenLogprobs
from scission.protos import inference_pb2
from scission.services.decode.engine import DecodeEngine
from scission.services.decode.meters import DecodeMeters
from scission.services.decode.request import ModelFacts as DecodeFacts
from scission.services.prefill.engine import PrefillEngine
from scission.services.prefill.meters import PrefillMeters
from scission.services.prefill.request import ModelFacts as PrefillFacts
from scission.services.prefill.state import StateStore
from tests.one_process import CPU, OneProcess, OneSequence, load_deployed, load_exact
from tests.reference_checkpoint import tiny_config

PATIENCE_S = 30.0
EPOCH = 77
CHUNK_BUDGET = 96  # prompts are cut, and share chunks' batches
Drawn = tuple[int, TokenLogprobs | None]

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=20)
RANDOM = SamplingParams(
    max_tokens=28, temperature=0.9, top_p=0.95, seed=9, ignore_eos=True, logprobs=3
)
# prompt lengths all differ: a chunk's start then says whose it is
SCHEDULES: dict[str, list[tuple[int, SamplingParams]]] = {
    "one-short": [(5, GREEDY)],
    "one-of-blocks": [(256, GREEDY)],
    "one-long": [(389, RANDOM)],
    "several": [(200, GREEDY), (31, RANDOM), (130, RANDOM), (1, GREEDY), (301, RANDOM)],
}


@dataclass
class Streams:
    """Every event, in order."""

    events: list[inference_pb2.RequestEvent] = field(default_factory=list)

    def emit(self, gateway_epoch: int, events: Sequence[inference_pb2.RequestEvent]) -> None:
        self.events += events

    def beat(self, load: inference_pb2.Load) -> None:
        pass

    def drawn(self, request_id: str) -> dict[int, Drawn]:
        """Output index -> token, of both engines."""
        return {
            token.index: (token.token_id, logprobs_from_proto(token.logprobs))
            for event in self.events
            if event.request_id == request_id
            for token in event.tokens.tokens
        }


def poisoned_storage(loaded: LoadedModel) -> CacheStorage:
    storage = CacheStorage(loaded.layout, 41, 9, CPU)
    for tensor in (*storage.paged.values(), *storage.slots.values()):
        tensor.fill_(float("nan"))
    return storage


class Pair:
    """A prefill engine and a decode engine in one thread, turn by turn."""

    def __init__(self, loaded: LoadedModel, tier: str, directory: Path) -> None:
        context = zmq.Context[Any]()  # inproc addresses are known within one context only
        options = TransferOptions(
            bind=f"inproc://{directory.name}" if tier == "inproc" else "tcp://127.0.0.1:*",
            arena_dir=directory if tier == "shared" else None,
            slot_bytes=1 << 16,
            arena_bytes=1 << 20,
            # both engines share a thread: while one computes, the other cannot move bytes
            stall_s=PATIENCE_S / 2,
            decide_s=PATIENCE_S,
        )
        self.streams = Streams()
        self.prefill_batches: list[Sequence[SequenceChunk]] = []
        self.decode_batches: list[Sequence[SequenceChunk]] = []
        self._inboxes: list[Inbox[InboxItem]] = [Inbox(), Inbox()]
        facts = (loaded.vocab_size, loaded.max_model_len, loaded.eos_token_ids, loaded.digest)
        storage = poisoned_storage(loaded)
        self.prefill = PrefillEngine(
            Runner(loaded.model, storage),
            PrefillFacts(*facts),
            StateStore(storage, 0, False),
            Sender(storage, loaded.digest, "p", 5, options, lambda: None, context=context),
            self._inboxes[0],
            cast(Any, self.streams),
            SchedulerOptions(max_num_batched_tokens=CHUNK_BUDGET),
            PrefillMeters(Metrics(Role.PREFILL, "tiny", "0")),
            num_layers=loaded.model.layer_groups[-1][1],
            beat_s=0.5,
            on_batch=self.prefill_batches.append,
        )
        target = poisoned_storage(loaded)
        self._receiver = Receiver(
            target, loaded.digest, "d", EPOCH, options, lambda: None, context=context
        )
        self.decode = DecodeEngine(
            Runner(loaded.model, target),
            DecodeFacts(*facts),
            self._receiver,
            self._inboxes[1],
            cast(Any, self.streams),
            SchedulerOptions(),
            DecodeMeters(Metrics(Role.DECODE, "tiny", "0")),
            beat_s=0.5,
            on_batch=self.decode_batches.append,
        )

    def submit(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        shared: dict[str, Any] = {
            "gateway_epoch": 1,
            "request_id": request_id,
            "prompt_token_ids": prompt,
            "sampling": sampling_to_proto(params),
            "num_choices": 1,
        }
        destination = inference_pb2.Destination(
            worker_id="d", epoch=EPOCH, transfer_address=self._receiver.address
        )
        prefill = inference_pb2.PrefillRequest(**shared, destination=destination)
        decode = inference_pb2.DecodeRequest(**shared)
        now = time.monotonic()
        self._inboxes[0].put(Submit(prefill, 1, now + 60, now, lambda reply: None))
        self._inboxes[1].put(Submit(decode, 1, now + 60, now, lambda reply: None))

    def run_until(self, done: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < give_up_at, self.streams.events
            self.prefill.turn(0.001)
            self.decode.turn(0.001)

    def close(self) -> None:
        for engine in (self.prefill, self.decode):
            engine.stop()
            engine.run()


class Replay:
    """One runner that computes the recorded batches again and draws with the same samplers."""

    def __init__(
        self, loaded: LoadedModel, asked: Sequence[tuple[list[int], SamplingParams]]
    ) -> None:
        self._runner = OneProcess(loaded)
        self._asked = asked
        self._sequences = [self._runner.new_sequence() for _ in asked]
        self._samplings = [SequenceSampling(params, 0, prompt) for prompt, params in asked]
        self.drawn: list[list[Drawn]] = [[] for _ in asked]

    def compute(self, batches: Sequence[Sequence[SequenceChunk]]) -> None:
        """Compute batches of one engine; its slots say which chunks belong together."""
        by_slot: dict[int, int] = {}
        for batch in batches:
            numbers = []
            for chunk in batch:
                number = by_slot.get(chunk.slot)
                if number is None or self._fed(number) != chunk.start:
                    number = next(
                        n
                        for n in range(len(self._asked))
                        if self._fed(n) == chunk.start and self._next_tokens(n, chunk)
                    )
                    by_slot[chunk.slot] = number
                numbers.append(number)
            self._step(batch, numbers)

    def _fed(self, number: int) -> int:
        return len(self._sequences[number].token_ids)

    def _next_tokens(self, number: int, chunk: SequenceChunk) -> bool:
        known = [*self._asked[number][0], *(token_id for token_id, _ in self.drawn[number])]
        return known[chunk.start : chunk.end] == list(chunk.token_ids)

    def _step(self, batch: Sequence[SequenceChunk], numbers: Sequence[int]) -> None:
        assert all(self._next_tokens(n, c) for n, c in zip(numbers, batch, strict=True))
        fed: list[tuple[OneSequence, Sequence[int]]] = [
            (self._sequences[n], c.token_ids) for n, c in zip(numbers, batch, strict=True)
        ]
        logits = self._runner.step(fed, [chunk.logits for chunk in batch])
        drawing = [n for n, chunk in zip(numbers, batch, strict=True) if chunk.logits == "last"]
        if not drawing:
            return
        results = sample(logits, [self._samplings[n] for n in drawing])
        for n, result in zip(drawing, results, strict=True):
            self.drawn[n].append(result)
            self._samplings[n].append(result[0])


@pytest.fixture(scope="module", params=["deployed", "exact"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_random_deepseek_v4(folder, tiny_config(), seed=3)
    return load_deployed(folder) if request.param == "deployed" else load_exact(folder)


@pytest.fixture(params=["inproc", "tcp", "shared"])
def pair(request: pytest.FixtureRequest, loaded: LoadedModel, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(loaded, request.param, tmp_path)
    yield pair
    pair.close()


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, 300, (length,), generator=generator).tolist()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_disaggregation_changes_no_bit(pair: Pair, loaded: LoadedModel, schedule: str) -> None:
    asked = [(prompt_of(length), params) for length, params in SCHEDULES[schedule]]
    for number, (prompt, params) in enumerate(asked):
        pair.submit(f"r{number}", prompt, params)
    totals = {f"r{number}": params.max_tokens for number, (_, params) in enumerate(asked)}
    pair.run_until(
        lambda: all(len(pair.streams.drawn(name)) == total for name, total in totals.items())
    )
    if len(asked) > 1:
        assert max(len(batch) for batch in pair.prefill_batches) > 1
        assert max(len(batch) for batch in pair.decode_batches) > 1
    replay = Replay(loaded, asked)
    replay.compute(pair.prefill_batches)
    replay.compute(pair.decode_batches)
    for number, (_, params) in enumerate(asked):
        drawn = pair.streams.drawn(f"r{number}")
        assert [drawn[index] for index in range(params.max_tokens)] == replay.drawn[number]
