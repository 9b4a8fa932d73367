"""A decode engine on a small deterministic model, driven turn by turn by a test.

The model draws its logits from a hash of the tokens that it finds in the cache, by block table and
ring, so that a wrong block, slot or position changes every later token. `expected_tokens` computes
the same without a cache.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage
from scission.common.config import SchedulerOptions
from scission.common.engine_inbox import Cancel, GatewayGone, Inbox, InboxItem, Submit
from scission.common.errors import ScissionError
from scission.common.inference_messages import sampling_to_proto
from scission.common.metrics import Metrics
from scission.common.model.architecture import OnLayers
from scission.common.model.batch import ForwardBatch, SequenceChunk
from scission.common.runner import Runner
from scission.common.sampling import SequenceSampling, finish_reason, sample
from scission.common.stepping.captured import CapturedSteps
from scission.common.stepping.seats import bucket_sizes
from scission.common.transfer.events import (
    Aborted,
    Failed,
    Ready,
    ReceiverEvent,
    ReserveRequested,
    TransferHandle,
)
from scission.common.types import Role, SamplingParams
from scission.protos import inference_pb2, transfer_pb2
from scission.services.decode.engine import DecodeEngine
from scission.services.decode.meters import DecodeMeters
from scission.services.decode.request import ModelFacts, RunningSequence

VOCAB = 37
EOS = 0
BLOCK = 4
RING = 4
LAYOUT = CacheLayout(
    (
        Component("tokens", Kind.PAGED, (0,), (1,), "float32"),
        Component(
            "window", Kind.RING, (0,), (1,), "float32", ring_size=RING, live_lookback=RING - 1
        ),
    ),
    block_size=BLOCK,
)


def logits_of(context: Sequence[int], window: Sequence[int]) -> Tensor:
    """[vocab] float32 for the token after `context`; `window` are its last tokens once more."""
    seed = zlib.crc32(repr((list(context), list(window))).encode())
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


class HashModel:
    """Writes tokens into the cache, reads them back and hashes them."""

    layout = LAYOUT
    layer_groups = ((0, 1),)
    captures = True

    def __init__(self) -> None:
        self.fails = 0  # so many next passes raise

    def forward(
        self, batch: ForwardBatch, storage: CacheStorage, on_layers: OnLayers | None = None
    ) -> Tensor:
        if self.fails:
            self.fails -= 1
            raise RuntimeError("the model failed")
        rows = []
        wanted = set(batch.logits_at.tolist())
        tables, slots = batch.block_tables.tolist(), batch.slots.tolist()
        for i, (token, position, sequence) in enumerate(
            zip(
                batch.token_ids.tolist(),
                batch.positions.tolist(),
                batch.sequences.tolist(),
                strict=True,
            )
        ):
            write_token(storage, tables[sequence], slots[sequence], position, token)
            if i in wanted:
                at = range(position + 1)
                pages, ring = storage.paged["tokens"][0], storage.slots["window"][0]
                context = [int(pages[tables[sequence][p // BLOCK], p % BLOCK]) for p in at]
                window = [int(ring[slots[sequence], p % RING]) for p in at[-RING:]]
                rows.append(logits_of(context, window))
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)


def write_token(
    storage: CacheStorage, block_ids: Sequence[int], slot: int, position: int, token: int
) -> None:
    storage.paged["tokens"][0, block_ids[position // BLOCK], position % BLOCK] = token
    storage.slots["window"][0, slot, position % RING] = token


def first_token(
    prompt: Sequence[int], params: SamplingParams, choice: int, forced: Sequence[int] = ()
) -> int:
    """What a prefill samples after the prompt and forced tokens."""
    sampling = SequenceSampling(params, choice, prompt, {EOS})
    for token_id in forced:
        sampling.append(token_id)
    context = [*prompt, *forced]
    return sample(logits_of(context, context[-RING:])[None], [sampling])[0][0]


def expected_tokens(
    prompt: Sequence[int], params: SamplingParams, choice: int = 0, max_model_len: int = 10**9
) -> list[int]:
    """All output tokens of a choice, prefill's included."""
    sampling = SequenceSampling(params, choice, prompt, {EOS})
    tokens = list(prompt)
    while True:
        logits = logits_of(tokens, tokens[-RING:])[None]
        token_id = sample(logits, [sampling])[0][0]
        sampling.append(token_id)
        tokens.append(token_id)
        if finish_reason(sampling, token_id, {EOS}, len(tokens), max_model_len):
            return tokens[len(prompt) :]


@dataclass
class Delivery:
    handle: TransferHandle
    context: list[int]
    manifest: transfer_pb2.Manifest


class FakeReceiver:
    """The receiver's face towards the engine; a test plays the prefill."""

    address = "inproc://fake"

    def __init__(self, storage: CacheStorage) -> None:
        self._storage = storage
        self._numbers = iter(range(1, 10**9))
        self.events: list[ReceiverEvent] = []
        self.granted: dict[TransferHandle, tuple[list[int], int]] = {}
        self.waits: dict[TransferHandle, int] = {}
        self.refused: dict[TransferHandle, str] = {}
        self.aborted: dict[TransferHandle, str] = {}
        self.committed: list[TransferHandle] = []
        self.deliveries: list[Delivery] = []
        self.is_closed = False

    def poll(self) -> list[ReceiverEvent]:
        events, self.events = self.events, []
        return events

    def grant(self, handle: TransferHandle, block_ids: list[int], slot: int) -> None:
        assert handle not in self.granted
        self.granted[handle] = block_ids, slot
        # What the room held before must never be read.
        self._storage.paged["tokens"][:, block_ids] = -1
        assert not self._storage.slots["window"][:, slot].any(), "the slot was not reset"
        self._storage.slots["window"][:, slot] = -1

    def wait(self, handle: TransferHandle, position: int) -> None:
        self.waits[handle] = position

    def refuse(
        self, handle: TransferHandle, reason: str, field: str = "", detail: str = ""
    ) -> None:
        assert handle not in self.granted
        self.refused[handle] = reason

    def inject(self, budget_bytes: int) -> int:
        injected = 0
        for delivery in self.deliveries:
            if delivery.handle in self.aborted or delivery.handle not in self.granted:
                continue
            block_ids, slot = self.granted[delivery.handle]
            assert len(block_ids) == LAYOUT.num_blocks(len(delivery.context))
            for position, token in enumerate(delivery.context):
                write_token(self._storage, block_ids, slot, position, token)
            injected += 4 * len(delivery.context)
            self.events.append(Ready(delivery.handle, delivery.manifest, injected, 0.0))
        self.deliveries.clear()
        return injected

    def commit(self, handle: TransferHandle) -> None:
        assert handle in self.granted
        assert handle not in self.aborted
        self.committed.append(handle)

    def abort(self, handle: TransferHandle, reason: str) -> None:
        assert handle not in self.committed
        assert handle not in self.aborted
        self.aborted[handle] = reason

    def stats(self) -> dict[str, int]:
        return {}

    def counts(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self.is_closed = True

    def reserve(self, request_id: str, attempt: int, num_tokens: int) -> TransferHandle:
        handle = TransferHandle(next(self._numbers), request_id, attempt, "prefill-1")
        self.events.append(ReserveRequested(handle, num_tokens, 1, 10**9))
        return handle


class FakeStreams:
    def __init__(self) -> None:
        self.emitted: list[tuple[int, list[inference_pb2.RequestEvent]]] = []
        self.beats: list[inference_pb2.Load] = []

    def emit(self, gateway_epoch: int, events: Sequence[inference_pb2.RequestEvent]) -> None:
        self.emitted.append((gateway_epoch, list(events)))

    def beat(self, load: inference_pb2.Load) -> None:
        self.beats.append(load)


@dataclass
class Asked:
    """A request as the test knows it."""

    request_id: str
    attempt: int
    prompt: list[int]
    params: SamplingParams
    num_choices: int
    forced: list[list[int]]
    replies: list[ScissionError | float] = field(default_factory=list)


class Bed:
    def __init__(
        self,
        *,
        num_blocks: int = 64,
        num_slots: int = 16,
        max_model_len: int = 200,
        on_batch: Callable[[Sequence[SequenceChunk]], None] | None = None,
        is_captured: bool = False,
        **options: Any,
    ) -> None:
        """Blocks and slots without the scratch ones. `is_captured`: the steps are those of a GPU,
        one behind, without graphs.
        """
        self.model = HashModel()
        self.storage = CacheStorage(LAYOUT, num_blocks + 1, num_slots + 1, torch.device("cpu"))
        self.storage.paged["tokens"].fill_(-7)
        self.receiver = FakeReceiver(self.storage)
        self.streams = FakeStreams()
        self.inbox: Inbox[InboxItem] = Inbox()
        self.now = 100.0
        metrics = Metrics(Role.DECODE, "fake", "0")
        self.metrics = metrics
        runner = Runner(self.model, self.storage)
        steps: CapturedSteps[RunningSequence] | None = None
        if is_captured:
            steps = CapturedSteps(runner, bucket_sizes(num_slots), max_model_len, VOCAB)
        self.engine = DecodeEngine(
            runner,
            ModelFacts(VOCAB, max_model_len, frozenset({EOS}), {}),
            cast(Any, self.receiver),
            self.inbox,
            cast(Any, self.streams),
            SchedulerOptions(**options),
            DecodeMeters(metrics),
            beat_s=0.5,
            clock=lambda: self.now,
            steps=steps,
            on_batch=on_batch,
        )
        self.asked: dict[tuple[str, int], Asked] = {}

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int] = (5, 6, 7),
        *,
        attempt: int = 0,
        num_choices: int = 1,
        forced: Sequence[Sequence[int]] = (),
        timeout_s: float = 1000.0,
        gateway: int = 1,
        waited_s: float = 0.0,
        **params: Any,
    ) -> Asked:
        sampling = SamplingParams(
            **{"max_tokens": 6, "temperature": 0.0, "ignore_eos": True} | params
        )
        asked = Asked(
            request_id,
            attempt,
            list(prompt),
            sampling,
            num_choices,
            [list(f) for f in forced] or [[] for _ in range(num_choices)],
        )
        self.asked[request_id, attempt] = asked
        message = inference_pb2.DecodeRequest(
            gateway_epoch=gateway,
            request_id=request_id,
            attempt=attempt,
            prompt_token_ids=prompt,
            sampling=sampling_to_proto(sampling),
            num_choices=num_choices,
            forced=[inference_pb2.ForcedTokens(token_ids=f) for f in forced],
            waited_s=waited_s,
        )
        self.inbox.put(
            Submit(message, gateway, self.now + timeout_s, self.now, asked.replies.append)
        )
        return asked

    def cancel(
        self, request_id: str, *, attempt: int = 0, choice: int | None = None, gateway: int = 1
    ) -> None:
        self.inbox.put(Cancel(gateway, request_id, attempt, "client_gone", choice))

    def gateway_gone(self, gateway: int) -> None:
        self.inbox.put(GatewayGone(gateway))

    def reserve(
        self, request_id: str, *, attempt: int = 0, num_tokens: int | None = None
    ) -> TransferHandle:
        """The prefill asks for room for the prompt and, of a single choice, its forced tokens."""
        if num_tokens is None:
            num_tokens = len(self._shipped(self.asked[request_id, attempt]))
        return self.receiver.reserve(request_id, attempt, num_tokens)

    def ship(self, handle: TransferHandle) -> None:
        """All state arrives with the next injection."""
        asked = self.asked[handle.request_id, handle.attempt]
        context = self._shipped(asked)
        manifest = transfer_pb2.Manifest(num_tokens=len(context))
        for choice, forced in enumerate(asked.forced):
            sequence = manifest.sequences.add(choice=choice)
            if context == asked.prompt + forced:
                token_id = first_token(asked.prompt, asked.params, choice, forced)
                sequence.tokens.add(choice=choice, index=len(forced), token_id=token_id)
        self.receiver.deliveries.append(Delivery(handle, context, manifest))

    @staticmethod
    def _shipped(asked: Asked) -> list[int]:
        return asked.prompt + (asked.forced[0] if asked.num_choices == 1 else [])

    def start(self, request_id: str, *args: Any, **kwargs: Any) -> Asked:
        """Submit and hand over, up to the first step."""
        asked = self.submit(request_id, *args, **kwargs)
        self.engine.turn()
        assert not isinstance(asked.replies[0], ScissionError), asked.replies
        handle = self.reserve(request_id, attempt=asked.attempt)
        self.engine.turn()
        assert handle in self.receiver.granted
        self.ship(handle)
        self.engine.turn()
        return asked

    def fail(self, handle: TransferHandle, reason: str) -> None:
        self.receiver.events.append(Failed(handle, reason))

    def abort(self, handle: TransferHandle, reason: str) -> None:
        self.receiver.events.append(Aborted(handle, reason))

    def turns(self, count: int, step_s: float = 0.0) -> None:
        for _ in range(count):
            self.now += step_s
            self.engine.turn()

    def finish_all(self, max_turns: int = 500) -> None:
        for _ in range(max_turns):
            if self.engine.is_idle:
                return
            self.engine.turn()
        raise AssertionError("requests are left")

    def events(self, request_id: str, attempt: int = 0) -> list[inference_pb2.RequestEvent]:
        return [
            event
            for _, events in self.streams.emitted
            for event in events
            if (event.request_id, event.attempt) == (request_id, attempt)
        ]

    def kinds(self, request_id: str, attempt: int = 0) -> list[str]:
        """The kinds of a request's events, repetitions left out."""
        kinds: list[str] = []
        for event in self.events(request_id, attempt):
            kind = event.WhichOneof("event")
            assert kind is not None
            if not kinds or kinds[-1] != kind:
                kinds.append(kind)
        return kinds

    def tokens(self, request_id: str, attempt: int = 0) -> dict[int, list[int]]:
        """Tokens that decode emitted, by choice; indexes must run on without a gap."""
        tokens: dict[int, list[int]] = defaultdict(list)
        last: dict[int, int] = {}
        for event in self.events(request_id, attempt):
            for token in event.tokens.tokens:
                assert token.index == last.get(token.choice, token.index - 1) + 1
                last[token.choice] = token.index
                tokens[token.choice].append(token.token_id)
        return tokens

    def retry(self, request_id: str, attempt: int = 0) -> inference_pb2.Retry | None:
        for event in self.events(request_id, attempt):
            if event.HasField("retry"):
                return event.retry
        return None

    def check_all_free(self) -> None:
        for pool in (self.engine.blocks, self.engine.slots):
            pool.check()
            assert pool.num_free == pool.total
