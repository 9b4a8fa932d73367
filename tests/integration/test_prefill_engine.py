"""The prefill engine on a DeepSeek-V4 checkpoint, shipping over real sockets: what arrives equals,
bit for bit, the state of one runner that computed the same chunks in the same batches.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import zmq
from torch import Tensor

from scission.common.cache.block_pool import State
from scission.common.cache.layout import Kind
from scission.common.cache.storage import CacheStorage
from scission.common.checkpoint.write_deepseek_v4 import write_random_deepseek_v4
from scission.common.config import SchedulerOptions
from scission.common.engine_inbox import Cancel, Inbox, InboxItem, Redirect, Submit
from scission.common.inference_messages import logprobs_from_proto, sampling_to_proto
from scission.common.metrics import Metrics
from scission.common.model.batch import SequenceChunk
from scission.common.model.load import LoadedModel
from scission.common.runner import Runner
from scission.common.sampling import SequenceSampling, sample
from scission.common.transfer.events import Aborted, Ready, ReserveRequested
from scission.common.transfer.options import TransferOptions
from scission.common.transfer.receiver import Receiver
from scission.common.transfer.sender import Sender
from scission.common.types import Role, SamplingParams, TokenLogprobs
from scission.protos import inference_pb2
from scission.services.prefill.engine import PrefillEngine
from scission.services.prefill.meters import PrefillMeters
from scission.services.prefill.request import ModelFacts
from scission.services.prefill.state import StateStore
from tests.one_process import CPU, OneProcess, OneSequence, load_deployed, load_exact
from tests.reference_checkpoint import tiny_config

PATIENCE_S = 30.0
NUM_BLOCKS = 40
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=20)
Drawn = tuple[int, TokenLogprobs | None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_random_deepseek_v4(folder, tiny_config(), seed=3)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_deployed(folder)


@pytest.fixture(scope="module")
def exact(folder: Path) -> LoadedModel:
    return load_exact(folder)


@dataclass
class Streams:
    """Every event, in order."""

    events: list[inference_pb2.RequestEvent] = field(default_factory=list)

    def emit(self, gateway_epoch: int, events: Sequence[inference_pb2.RequestEvent]) -> None:
        self.events += events

    def beat(self, load: inference_pb2.Load) -> None:
        pass


@dataclass
class Decode:
    """A receiver with a poisoned storage; it grants and commits all, or refuses all."""

    name: str
    epoch: int
    receiver: Receiver
    storage: CacheStorage
    refuses: bool = False
    holds_back: bool = False  # neither grants nor refuses
    num_granted: int = 0
    arrived: dict[str, OneSequence] = field(default_factory=dict)
    first_tokens: dict[str, list[int]] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)

    def turn(self) -> None:
        self.receiver.inject(1 << 24)
        for event in self.receiver.poll():
            match event:
                case ReserveRequested() if self.refuses:
                    self.receiver.refuse(event.handle, "full")
                case ReserveRequested() if self.holds_back:
                    self.receiver.wait(event.handle, 1)
                case ReserveRequested(handle=handle, num_tokens=num_tokens):
                    self.num_granted += 1
                    first = 1 + (self.num_granted - 1) * 4
                    count = self.storage.layout.num_blocks(num_tokens)
                    sequence = OneSequence(list(range(first, first + count)), self.num_granted)
                    self.arrived[handle.request_id] = sequence
                    self.receiver.grant(handle, sequence.block_ids, sequence.slot)
                case Ready(handle=handle, manifest=manifest):
                    self.first_tokens[handle.request_id] = [
                        token.token_id for s in manifest.sequences for token in s.tokens
                    ]
                    self.receiver.commit(handle)
                case Aborted(handle=handle):
                    self.aborted.append(handle.request_id)
                case _:
                    pass


class Cluster:
    """A prefill engine with its sender, and two decodes that take what it ships."""

    def __init__(
        self,
        loaded: LoadedModel,
        tier: str,
        directory: Path,
        *,
        budget: int = 128,
        max_snapshots: int = 0,
    ) -> None:
        self.loaded = loaded
        context = zmq.Context[Any]()  # inproc addresses are known within one context only
        options = {
            name: TransferOptions(
                bind="tcp://127.0.0.1:*"
                if tier != "inproc"
                else f"inproc://{directory.name}{name}",
                arena_dir=directory if tier == "shared" else None,
                slot_bytes=1 << 16,
                arena_bytes=1 << 20,
                # one thread turns both ends: while it computes, no byte moves
                stall_s=PATIENCE_S / 2,
                decide_s=PATIENCE_S,
            )
            for name in ("d0", "d1")
        }
        storage = CacheStorage(loaded.layout, NUM_BLOCKS + 1, 9 + max_snapshots, CPU)
        poison(storage)
        self.decodes = []
        for epoch, name in enumerate(options, start=70):
            target = CacheStorage(loaded.layout, NUM_BLOCKS + 1, 9, CPU)
            poison(target)
            receiver = Receiver(
                target, loaded.digest, name, epoch, options[name], lambda: None, context=context
            )
            self.decodes.append(Decode(name, epoch, receiver, target))
        self.batches: list[list[tuple[int, int]]] = []  # of (slot, number of tokens)
        self.streams = Streams()
        self.inbox: Inbox[InboxItem] = Inbox()
        self.store = StateStore(storage, max_snapshots, max_snapshots > 0)
        self.engine = PrefillEngine(
            Runner(loaded.model, storage),
            ModelFacts(
                loaded.vocab_size, loaded.max_model_len, loaded.eos_token_ids, loaded.digest
            ),
            self.store,
            Sender(storage, loaded.digest, "p", 5, options["d0"], self.inbox.wake, context=context),
            self.inbox,
            cast(Any, self.streams),
            SchedulerOptions(
                max_num_batched_tokens=budget, retain_lease_s=20.0, commit_lease_s=0.05
            ),
            PrefillMeters(Metrics(Role.PREFILL, "tiny", "0")),
            num_layers=loaded.model.layer_groups[-1][1],
            beat_s=0.5,
            on_batch=self._record,
        )

    def _record(self, chunks: Sequence[SequenceChunk]) -> None:
        self.batches.append([(chunk.slot, len(chunk.token_ids)) for chunk in chunks])

    def destination(self, decode: int) -> inference_pb2.Destination:
        target = self.decodes[decode]
        return inference_pb2.Destination(
            worker_id=target.name, epoch=target.epoch, transfer_address=target.receiver.address
        )

    def submit(self, request_id: str, prompt: list[int], params: SamplingParams = GREEDY) -> None:
        message = inference_pb2.PrefillRequest(
            gateway_epoch=1,
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=sampling_to_proto(params),
            num_choices=1,
            destination=self.destination(0),
        )
        now = time.monotonic()
        self.inbox.put(Submit(message, 1, now + 60, now, lambda reply: None))

    def run_until(self, done: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < give_up_at, self.streams.events
            self.engine.turn(0.002)
            self.store.check()
            for decode in self.decodes:
                decode.turn()

    def kinds(self, request_id: str, attempt: int = 0) -> list[str | None]:
        return [
            event.WhichOneof("event")
            for event in self.streams.events
            if (event.request_id, event.attempt) == (request_id, attempt)
        ]

    def drawn(self, request_id: str) -> list[Drawn]:
        return [
            (t.token_id, logprobs_from_proto(t.logprobs))
            for event in self.streams.events
            if event.request_id == request_id
            for t in event.tokens.tokens
        ]

    def close(self) -> None:
        self.run_until(lambda: self.engine.is_idle)
        self.engine.stop()
        self.engine.run()
        for decode in self.decodes:
            decode.receiver.close()


def poison(storage: CacheStorage) -> None:
    for tensor in (*storage.paged.values(), *storage.slots.values()):
        tensor.fill_(float("nan"))


@pytest.fixture(params=["inproc", "tcp", "shared"])
def cluster(
    request: pytest.FixtureRequest, loaded: LoadedModel, tmp_path: Path
) -> Iterator[Cluster]:
    cluster = Cluster(loaded, request.param, tmp_path)
    yield cluster
    cluster.close()
    for pool in (cluster.store.blocks, cluster.store.slots):
        pool.check()
        assert pool.num_free == pool.total


@pytest.fixture
def tcp_cluster(loaded: LoadedModel, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(loaded, "tcp", tmp_path)
    yield cluster
    cluster.close()
    for pool in (cluster.store.blocks, cluster.store.slots):
        assert pool.counts()[State.FREE] + pool.counts()[State.CACHED] == pool.total


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, 300, (length,), generator=generator).tolist()


def assert_same_state(
    ours: CacheStorage,
    our_place: OneSequence,
    theirs: CacheStorage,
    their_place: OneSequence,
    num_tokens: int,
) -> None:
    """Every live row of the request, in both storages, bit for bit."""
    for component in ours.layout.components:
        rows = component.shipped_rows(num_tokens)
        found = []
        for storage, place in ((ours, our_place), (theirs, their_place)):
            index = row_index(storage, component.name, rows, place)
            found.append(storage.rows(component)[:, index].view(torch.uint8))
        assert torch.equal(*found), component.name


def row_index(
    storage: CacheStorage, name: str, rows: tuple[int, int], place: OneSequence
) -> Tensor:
    component = storage.layout.component(name)
    numbers = torch.arange(*rows)
    if component.kind is Kind.RING:
        return place.slot * component.ring_size + numbers % component.ring_size
    per_block = storage.layout.rows_per_block(component)
    table = torch.tensor(place.block_ids)
    return table[numbers // per_block] * per_block + numbers % per_block


@pytest.mark.parametrize("length", [1, 15, 128, 300])
def test_what_arrives_equals_one_process_bit_for_bit(
    cluster: Cluster, loaded: LoadedModel, length: int
) -> None:
    prompt = prompt_of(length)
    cluster.submit("a", prompt)
    cluster.run_until(lambda: "ended" in cluster.kinds("a"))
    assert cluster.kinds("a") == ["prefilled", "tokens", "ended"]
    alone = OneProcess(loaded)
    sequence = alone.new_sequence()
    logits = alone.prefill(sequence, prompt, chunk_size=128)
    expected = sample(logits, [SequenceSampling(GREEDY, 0, prompt)])
    assert cluster.drawn("a") == expected
    decode = cluster.decodes[0]
    assert decode.first_tokens["a"] == [expected[0][0]]
    assert_same_state(alone.storage, sequence, decode.storage, decode.arrived["a"], length)


def test_a_schedule_of_several_replays_bit_for_bit(
    tcp_cluster: Cluster, loaded: LoadedModel
) -> None:
    cluster = tcp_cluster
    lengths = {"r0": 200, "r1": 31, "r2": 130, "r3": 5}
    for name, length in lengths.items():
        cluster.submit(name, prompt_of(length))
        cluster.engine.turn()
    cluster.run_until(lambda: all("ended" in cluster.kinds(name) for name in lengths))
    assert max(len(batch) for batch in cluster.batches) >= 2
    alone = OneProcess(loaded)
    sequences = {name: alone.new_sequence() for name in lengths}
    by_slot = dict(enumerate(lengths, start=1))
    logits: dict[str, Tensor] = {}
    for batch in cluster.batches:
        fed = []
        for slot, count in batch:
            name = by_slot[slot]
            done = len(sequences[name].token_ids)
            fed.append((sequences[name], prompt_of(lengths[name])[done : done + count]))
        for (slot, _), row in zip(batch, alone.step(fed), strict=True):
            logits[by_slot[slot]] = row[None]
    decode = cluster.decodes[0]
    for name, length in lengths.items():
        expected = sample(logits[name], [SequenceSampling(GREEDY, 0, prompt_of(length))])
        assert cluster.drawn(name) == expected
        assert_same_state(
            alone.storage, sequences[name], decode.storage, decode.arrived[name], length
        )


def test_a_redirect_ships_the_retained_state_bit_for_bit(
    cluster: Cluster, loaded: LoadedModel
) -> None:
    cluster.decodes[0].refuses = True
    prompt = prompt_of(200)
    cluster.submit("a", prompt)
    cluster.run_until(lambda: "retry" in cluster.kinds("a") and "tokens" in cluster.kinds("a"))
    now = time.monotonic()
    message = inference_pb2.RedirectRequest(
        request_id="a", attempt=1, destination=cluster.destination(1)
    )
    cluster.inbox.put(Redirect(message, 1, now + 60, now, lambda reply: None))
    cluster.run_until(lambda: "ended" in cluster.kinds("a", 1))
    assert cluster.kinds("a", 1) == ["prefilled", "tokens", "ended"]
    assert len(cluster.batches) == 2, "nothing is computed twice"
    alone = OneProcess(loaded)
    sequence = alone.new_sequence()
    alone.prefill(sequence, prompt, chunk_size=128)
    decode = cluster.decodes[1]
    assert_same_state(alone.storage, sequence, decode.storage, decode.arrived["a"], 200)


def test_a_prefix_hit_gives_the_same_tokens_and_logprobs(
    exact: LoadedModel, tmp_path: Path
) -> None:
    cluster = Cluster(exact, "tcp", tmp_path, budget=512, max_snapshots=4)
    prompts = {"first": prompt_of(300), "again": prompt_of(300), "longer": prompt_of(300)}
    prompts["longer"] = [*prompts["longer"], *prompt_of(40)]
    alone = OneProcess(exact)
    for name, prompt in prompts.items():
        cluster.submit(name, prompt)
        cluster.run_until(lambda name=name: "ended" in cluster.kinds(name))  # type: ignore[misc]
        logits = alone.prefill(alone.new_sequence(), prompt)
        (expected,) = sample(logits, [SequenceSampling(GREEDY, 0, prompt)])
        (drawn,) = cluster.drawn(name)
        assert drawn[0] == expected[0]
        assert drawn[1] is not None and expected[1] is not None
        assert drawn[1].top_ids == expected[1].top_ids
        assert drawn[1].top_logprobs == pytest.approx(expected[1].top_logprobs, abs=2e-4)
    cached = [e.prefilled.cached_tokens for e in cluster.streams.events if e.HasField("prefilled")]
    assert cached == [0, 256, 256]
    # what was shipped after a hit decodes on: the rings came from the snapshot
    decode = cluster.decodes[0]
    (drawn,) = cluster.drawn("longer")
    decoding = OneProcess(exact)
    decoding.storage = decode.storage
    sequence = decode.arrived["longer"]
    sequence.token_ids.extend(prompts["longer"])
    reference = alone.new_sequence()
    alone.prefill(reference, prompts["longer"])
    # the fourth block of its room: the prompt ends within the third
    sequence.block_ids = list(range(sequence.block_ids[0], sequence.block_ids[0] + 4))
    for _ in range(8):
        ours = decoding.step([(sequence, [drawn[0]])])
        theirs = alone.step([(reference, [drawn[0]])])
        torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=2e-4, rtol=0)
        drawn = (int(theirs.argmax()), None)
    cluster.close()


def test_a_cancel_while_waiting_for_a_grant_frees_both_ends(tcp_cluster: Cluster) -> None:
    cluster = tcp_cluster
    cluster.decodes[0].holds_back = True
    cluster.submit("a", prompt_of(200))
    cluster.run_until(lambda: "tokens" in cluster.kinds("a"))
    cluster.inbox.put(Cancel(1, "a", 0, "client_gone"))
    cluster.run_until(lambda: cluster.decodes[0].aborted == ["a"])
    cluster.run_until(lambda: cluster.engine.is_idle)
    assert cluster.store.blocks.num_free == NUM_BLOCKS
