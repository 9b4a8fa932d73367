"""The decode engine on a DeepSeek-V4 checkpoint, fed over real sockets: what it decodes from
shipped state equals, bit for bit, one runner that goes on decoding on its own cache.
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
from scission.common.engine_inbox import Cancel, Inbox, InboxItem, Submit
from scission.common.inference_messages import (
    logprobs_from_proto,
    sampling_to_proto,
    token_to_proto,
)
from scission.common.metrics import Metrics
from scission.common.model.batch import SequenceChunk
from scission.common.model.load import LoadedModel
from scission.common.runner import Runner
from scission.common.sampling import SequenceSampling, sample
from scission.common.transfer.events import Closed, Destination, StateSource
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.receiver import Receiver
from scission.common.transfer.sender import Sender
from scission.common.types import Role, SamplingParams, Token, TokenLogprobs
from scission.protos import inference_pb2, transfer_pb2
from scission.services.decode.engine import DecodeEngine
from scission.services.decode.meters import DecodeMeters
from scission.services.decode.request import ModelFacts
from tests.one_process import CPU, OneProcess, OneSequence, load_deployed
from tests.reference_checkpoint import tiny_config

EPOCH = 77
PATIENCE_S = 30.0
Drawn = tuple[int, TokenLogprobs | None]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_random_deepseek_v4(folder, tiny_config(), seed=3)
    return load_deployed(folder)


@dataclass
class Streams:
    """Every event, in order."""

    events: list[inference_pb2.RequestEvent] = field(default_factory=list)

    def emit(self, gateway_epoch: int, events: Sequence[inference_pb2.RequestEvent]) -> None:
        self.events += events

    def beat(self, load: inference_pb2.Load) -> None:
        pass

    def tokens(self, request_id: str, choice: int = 0) -> list[Drawn]:
        return [
            (t.token_id, logprobs_from_proto(t.logprobs) if t.HasField("logprobs") else None)
            for event in self.events
            if event.request_id == request_id
            for t in event.tokens.tokens
            if t.choice == choice
        ]

    def kinds(self, request_id: str) -> list[str | None]:
        return [e.WhichOneof("event") for e in self.events if e.request_id == request_id]


class Cluster:
    """A decode engine with its receiver, and a sender whose storage the test computes prompts
    on.
    """

    def __init__(self, loaded: LoadedModel, tier: str, directory: Path) -> None:
        self.loaded = loaded
        options = TransferOptions(
            bind="tcp://127.0.0.1:*" if tier != "inproc" else f"inproc://{directory.name}",
            arena_dir=directory if tier == "shared" else None,
            slot_bytes=1 << 16,
            arena_bytes=1 << 20,
            # one thread turns both ends: while it computes, no byte moves
            stall_s=PATIENCE_S / 2,
            decide_s=PATIENCE_S,
        )
        storage = CacheStorage(loaded.layout, 24, 9, CPU)
        for tensor in storage.paged.values():
            tensor.fill_(float("nan"))
        self.batches: list[list[tuple[int, int]]] = []  # of (slot, number of tokens)
        self.streams = Streams()
        self.inbox: Inbox[InboxItem] = Inbox()
        self._prefill = OneProcess(loaded)
        # inproc addresses are known within one context only
        context = zmq.Context[Any]()
        self.sender = Sender(
            self._prefill.storage,
            loaded.digest,
            "p",
            5,
            options,
            lambda: None,
            context=context,
        )
        self.receiver = Receiver(
            storage,
            loaded.digest,
            "d",
            EPOCH,
            options,
            self.inbox.wake,
            context=context,
        )
        self.engine = DecodeEngine(
            Runner(loaded.model, storage),
            ModelFacts(
                loaded.vocab_size, loaded.max_model_len, loaded.eos_token_ids, loaded.digest
            ),
            self.receiver,
            self.inbox,
            cast(Any, self.streams),
            SchedulerOptions(growth_tokens=64),
            DecodeMeters(Metrics(Role.DECODE, "tiny", "0")),
            beat_s=0.5,
            on_batch=self._record,
        )

    def _record(self, chunks: Sequence[SequenceChunk]) -> None:
        self.batches.append([(chunk.slot, len(chunk.token_ids)) for chunk in chunks])

    def submit(
        self, request_id: str, prompt: list[int], params: SamplingParams, num_choices: int = 1
    ) -> None:
        message = inference_pb2.DecodeRequest(
            gateway_epoch=1,
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=sampling_to_proto(params),
            num_choices=num_choices,
        )
        now = time.monotonic()
        self.inbox.put(Submit(message, 1, now + 60, now, lambda reply: None))

    def ship(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        chunk_size: int,
        num_choices: int = 1,
    ) -> list[Drawn]:
        """Prefill in chunks, each shipped as it is done; the first tokens."""
        sequence = self._prefill.new_sequence()
        handle = self.sender.reserve(
            request_id,
            0,
            Destination("d", EPOCH, self.receiver.address),
            len(prompt),
            num_choices,
            time.monotonic() + 60,
            StateSource(sequence.block_ids, sequence.slot),
        )
        logits = torch.empty(0)
        for start in range(0, len(prompt), chunk_size):
            part = prompt[start : start + chunk_size]
            logits = self._prefill.step([(sequence, part)])
            for layers in self.loaded.model.layer_groups:
                self.sender.piece_ready(handle, layers, (start, start + len(part)))
        choices = [SequenceSampling(params, c, prompt) for c in range(num_choices)]
        first = sample(logits.expand(num_choices, -1).contiguous(), choices)
        sequences = [
            transfer_pb2.Sequence(choice=c, tokens=[token_to_proto(Token(c, 0, token_id))])
            for c, (token_id, _) in enumerate(first)
        ]
        self.sender.finish(handle, sequences, time.monotonic())
        return first

    def run_until(self, done: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < give_up_at, self.streams.events
            self.engine.turn(0.01)
            self.sender.poll()

    def has_ended(self, request_id: str) -> bool:
        return any(k in ("ended", "retry", "failed") for k in self.streams.kinds(request_id))

    def close(self) -> None:
        self.sender.close()
        self.engine.stop()
        self.engine.run()


@pytest.fixture(params=["inproc", "tcp", "shared"])
def cluster(
    request: pytest.FixtureRequest, loaded: LoadedModel, tmp_path: Path
) -> Iterator[Cluster]:
    cluster = Cluster(loaded, request.param, tmp_path)
    yield cluster
    cluster.close()
    for pool in (cluster.engine.blocks, cluster.engine.slots):
        pool.check()
        assert pool.num_free == pool.total


@pytest.fixture
def tcp_cluster(loaded: LoadedModel, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(loaded, "tcp", tmp_path)
    yield cluster
    cluster.close()


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, 300, (length,), generator=generator).tolist()


class Alone:
    """The same requests in one process; `step` computes a batch and draws."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._runner = OneProcess(loaded)

    def start(
        self, prompt: list[int], params: SamplingParams, chunk_size: int, choice: int = 0
    ) -> tuple[OneSequence, SequenceSampling, list[Drawn]]:
        sequence = self._runner.new_sequence()
        sampling = SequenceSampling(params, choice, prompt)
        logits = self._runner.prefill(sequence, prompt, chunk_size)
        drawn = sample(logits, [sampling])
        sampling.append(drawn[0][0])
        return sequence, sampling, drawn

    def step(self, batch: Sequence[tuple[OneSequence, SequenceSampling, list[Drawn]]]) -> None:
        logits = self._runner.step([(sequence, [drawn[-1][0]]) for sequence, _, drawn in batch])
        for (_, sampling, drawn), result in zip(
            batch, sample(logits, [sampling for _, sampling, _ in batch]), strict=True
        ):
            sampling.append(result[0])
            drawn.append(result)


GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=5)
RANDOM = SamplingParams(
    max_tokens=16,
    temperature=0.9,
    top_p=0.9,
    seed=5,
    repetition_penalty=1.1,
    ignore_eos=True,
    logprobs=2,
)


@pytest.mark.parametrize("length", [1, 15, 128, 300])
def test_one_request_decodes_bit_for_bit_as_one_process(
    cluster: Cluster, loaded: LoadedModel, length: int
) -> None:
    prompt = prompt_of(length)
    cluster.submit("a", prompt, GREEDY)
    cluster.ship("a", prompt, GREEDY, chunk_size=96)
    cluster.run_until(lambda: cluster.has_ended("a"))
    alone = Alone(loaded)
    expected = alone.start(prompt, GREEDY, chunk_size=96)
    for _ in range(GREEDY.max_tokens - 1):
        alone.step([expected])
    assert cluster.streams.tokens("a") == expected[2][1:]
    assert cluster.streams.kinds("a")[0] == "committed"
    assert cluster.streams.kinds("a")[-1] == "ended"


def test_a_schedule_of_several_replays_bit_for_bit(
    tcp_cluster: Cluster, loaded: LoadedModel
) -> None:
    cluster = tcp_cluster
    asked = [(prompt_of(200), GREEDY), (prompt_of(31), RANDOM), (prompt_of(130), RANDOM)]
    for number, (prompt, params) in enumerate(asked):
        name = f"r{number}"
        cluster.submit(name, prompt, params)
        cluster.ship(name, prompt, params, chunk_size=64)
        cluster.run_until(lambda name=name: len(cluster.streams.tokens(name)) >= 3)  # type: ignore[misc]
    cluster.run_until(lambda: all(cluster.has_ended(f"r{n}") for n in range(3)))
    alone = Alone(loaded)
    by_slot = {
        slot: alone.start(prompt, params, chunk_size=64)
        for slot, (prompt, params) in enumerate(asked, start=1)
    }
    assert max(len(batch) for batch in cluster.batches) == 3
    for batch in cluster.batches:
        assert all(count == 1 for _, count in batch)
        alone.step([by_slot[slot] for slot, _ in batch])
    for slot, (_, _, drawn) in by_slot.items():
        assert cluster.streams.tokens(f"r{slot - 1}") == drawn[1:]


@pytest.mark.parametrize("length", [100, 128])
def test_choices_forked_from_shipped_state_equal_separate_prefills(
    tcp_cluster: Cluster, loaded: LoadedModel, length: int
) -> None:
    prompt = prompt_of(length)
    tcp_cluster.submit("a", prompt, RANDOM, num_choices=3)
    tcp_cluster.ship("a", prompt, RANDOM, chunk_size=512, num_choices=3)
    tcp_cluster.run_until(lambda: tcp_cluster.has_ended("a"))
    alone = Alone(loaded)
    choices = [alone.start(prompt, RANDOM, 512, choice) for choice in range(3)]
    for _ in range(RANDOM.max_tokens - 1):
        alone.step(choices)
    for choice, (_, _, drawn) in enumerate(choices):
        assert tcp_cluster.streams.tokens("a", choice) == drawn[1:]


def test_a_cancel_while_state_arrives_frees_both_ends(tcp_cluster: Cluster) -> None:
    prompt = prompt_of(64)
    tcp_cluster.submit("a", prompt, GREEDY)
    closed: list[object] = []
    sender = tcp_cluster.sender
    sequence = tcp_cluster._prefill.new_sequence()
    sender.reserve(
        "a",
        0,
        Destination("d", EPOCH, tcp_cluster.receiver.address),
        len(prompt),
        1,
        time.monotonic() + 60,
        StateSource(sequence.block_ids, sequence.slot),
    )
    engine = tcp_cluster.engine
    tcp_cluster.run_until(lambda: engine.blocks.num_free < engine.blocks.total)
    tcp_cluster.inbox.put(Cancel(1, "a", 0, "client_gone"))
    give_up_at = time.monotonic() + PATIENCE_S
    while not closed and time.monotonic() < give_up_at:
        engine.turn(0.01)
        closed += [event for event in sender.poll() if isinstance(event, Closed)]
    assert closed
    assert engine.is_idle
    assert engine.blocks.num_free == engine.blocks.total
