"""A prefill engine whose clock, transfers and gateways a test holds in its hands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scission.common.cache.block_pool import State
from scission.common.cache.storage import CacheStorage
from scission.common.config import SchedulerOptions
from scission.common.engine_inbox import Cancel, GatewayGone, Inbox, InboxItem, Redirect, Submit
from scission.common.errors import ScissionError
from scission.common.inference_messages import forced_to_proto, sampling_to_proto
from scission.common.metrics import Metrics
from scission.common.runner import Runner
from scission.common.transfer.events import (
    Closed,
    Committed,
    Destination,
    Failed,
    Granted,
    Refused,
    SenderEvent,
    StateSource,
    TransferHandle,
)
from scission.common.types import Role, SamplingParams
from scission.protos import inference_pb2, transfer_pb2
from scission.services.prefill.engine import PrefillEngine
from scission.services.prefill.meters import PrefillMeters
from scission.services.prefill.request import ModelFacts
from scission.services.prefill.state import StateStore
from tests.unit.services.prefill.chain_model import (
    NUM_LAYERS,
    VOCAB,
    ChainModel,
    check_paged,
    check_ring,
)

GATEWAY = 7
DECODE = inference_pb2.Destination(worker_id="decode-1", epoch=5, transfer_address="inproc://d")


@dataclass
class Sent:
    """One transfer, as the sender knows it."""

    destination: Destination
    num_tokens: int
    num_sequences: int
    source: StateSource
    token_ids: list[int]
    pieces: list[tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    sequences: list[transfer_pb2.Sequence] | None = None  # set: finished
    abort_reason: str | None = None
    is_over: bool = False  # its outcome was told


class FakeSender:
    """Speaks the Sender's API; the test decides what the decode answers, and when."""

    def __init__(self, storage: CacheStorage) -> None:
        self.storage = storage
        self.sent: dict[TransferHandle, Sent] = {}
        self.closed: dict[TransferHandle, Sent] = {}
        self.tokens_of: dict[str, list[int]] = {}  # what each request computes
        self._events: list[SenderEvent] = []

    def reserve(
        self,
        request_id: str,
        attempt: int,
        destination: Destination,
        num_tokens: int,
        num_sequences: int,
        deadline: float,
        source: StateSource,
    ) -> TransferHandle:
        number = len(self.sent) + len(self.closed) + 1
        handle = TransferHandle(number, request_id, attempt, destination.worker_id)
        token_ids = self.tokens_of[request_id]
        assert num_tokens == len(token_ids)
        self.sent[handle] = Sent(destination, num_tokens, num_sequences, source, token_ids)
        return handle

    def piece_ready(
        self, handle: TransferHandle, layers: tuple[int, int], tokens: tuple[int, int]
    ) -> None:
        sent = self._open(handle)
        if sent is None:
            return
        assert sent.abort_reason is None and sent.sequences is None
        check_paged(self.storage, sent.token_ids, sent.source.block_ids, layers, tokens)
        sent.pieces.append((layers, tokens))

    def finish(
        self,
        handle: TransferHandle,
        sequences: list[transfer_pb2.Sequence],
        first_token_at: float,
    ) -> None:
        sent = self._open(handle)
        if sent is None:
            return
        assert sent.abort_reason is None and sent.sequences is None
        offered = {
            (layer, token)
            for layers, tokens in sent.pieces
            for layer in range(*layers)
            for token in range(*tokens)
        }
        counted = sum((b - a) * (d - c) for (a, b), (c, d) in sent.pieces)
        assert len(offered) == counted == NUM_LAYERS * sent.num_tokens, "each row exactly once"
        sent.sequences = sequences

    def abort(self, handle: TransferHandle, reason: str) -> None:
        sent = self._open(handle)
        if sent is not None:
            sent.abort_reason = reason

    def poll(self) -> list[SenderEvent]:
        events, self._events = self._events, []
        return events

    def stats(self) -> dict[str, int]:
        return {"reships": 0, "stalls": 1, "dropped_messages": 0}

    def close(self) -> None:
        for handle in list(self.sent):
            self.end(handle)

    # --- the test's side

    def grant(self, handle: TransferHandle) -> None:
        self._events.append(Granted(handle, 0.25))

    def commit(self, handle: TransferHandle) -> None:
        sent = self.sent[handle]
        assert sent.sequences is not None
        self.check(sent)
        self._outcome(handle, Committed(handle, 0.5, 0.1, 1000))

    def refuse(self, handle: TransferHandle, reason: str = "full", field: str = "") -> None:
        self._outcome(handle, Refused(handle, reason, field))

    def fail(self, handle: TransferHandle, reason: str = "peer_lost") -> None:
        self._outcome(handle, Failed(handle, reason))

    def end(self, handle: TransferHandle) -> None:
        """The last read is done: of an ended or aborted transfer only."""
        sent = self.sent[handle]
        assert sent.is_over or sent.abort_reason is not None
        self.check(sent)
        self.closed[handle] = self.sent.pop(handle)
        self._events.append(Closed(handle))

    def check(self, sent: Sent) -> None:
        """Whatever was offered still holds what it held, until the transfer is closed."""
        for layers, tokens in sent.pieces:
            check_paged(self.storage, sent.token_ids, sent.source.block_ids, layers, tokens)
        if sent.sequences is not None:
            check_ring(self.storage, sent.token_ids, sent.source.slot)

    def _open(self, handle: TransferHandle) -> Sent | None:
        """None: its outcome is on the way to the engine, which cannot know it yet."""
        sent = self.sent.get(handle)
        return None if sent is None or sent.is_over else sent

    def _outcome(self, handle: TransferHandle, event: SenderEvent) -> None:
        self.sent[handle].is_over = True
        self._events.append(event)


class FakeStreams:
    """Keeps what each gateway was told."""

    def __init__(self) -> None:
        self.events: list[tuple[int, inference_pb2.RequestEvent]] = []
        self.num_messages = 0
        self.beats: list[inference_pb2.Load] = []

    def emit(self, gateway_epoch: int, events: Sequence[inference_pb2.RequestEvent]) -> None:
        self.num_messages += 1
        self.events += [(gateway_epoch, event) for event in events]

    def beat(self, load: inference_pb2.Load) -> None:
        self.beats.append(load)


class Prefill:
    """An engine on a ChainModel, with all ends in the test's hands."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        num_slots: int = 8,
        max_snapshots: int = 4,
        has_prefix_cache: bool = True,
        budget: int = 16,
        eos_token_ids: tuple[int, ...] = (),
        max_model_len: int = 200,
        make_storage: Callable[..., CacheStorage] = CacheStorage,
        **options: float,
    ) -> None:
        import torch

        self.now = 100.0
        self.model = ChainModel()
        storage = make_storage(
            self.model.layout, num_blocks + 1, num_slots + max_snapshots + 1, torch.device("cpu")
        )
        for tensor in (*storage.paged.values(), *storage.slots.values()):
            tensor.fill_(torch.nan)
        self.store = StateStore(storage, max_snapshots, has_prefix_cache)
        self.model.pool = self.store.blocks
        self.sender = FakeSender(storage)
        self.inbox: Inbox[InboxItem] = Inbox()
        self.streams = FakeStreams()
        self.metrics = Metrics(Role.PREFILL, "chain", "0")
        self.engine = PrefillEngine(
            Runner(self.model, storage),
            ModelFacts(VOCAB, max_model_len, eos_token_ids, {"model": "chain"}),
            self.store,
            self.sender,
            self.inbox,
            self.streams,  # type: ignore[arg-type]
            SchedulerOptions(max_num_batched_tokens=budget, **options),  # type: ignore[arg-type]
            PrefillMeters(self.metrics),
            num_layers=NUM_LAYERS,
            beat_s=0.5,
            clock=lambda: self.now,
        )
        self.replies: dict[tuple[str, int], ScissionError | float] = {}

    # --- calls

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        attempt: int = 0,
        max_tokens: int = 8,
        n: int = 1,
        forced: Sequence[Sequence[int]] = (),
        destination: inference_pb2.Destination | None = DECODE,
        timeout_s: float = 60.0,
        waited_s: float = 0.0,
        priority: int = 0,
        salt: str = "",
        gateway: int = GATEWAY,
        **sampling: object,
    ) -> None:
        params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, **sampling})  # type: ignore[arg-type]
        message = inference_pb2.PrefillRequest(
            gateway_epoch=gateway,
            request_id=request_id,
            attempt=attempt,
            prompt_token_ids=prompt,
            sampling=sampling_to_proto(params),
            num_choices=n,
            forced=forced_to_proto(forced),
            destination=destination,
            cache_salt=salt,
            waited_s=waited_s,
            priority=priority,
        )
        token_ids = [*prompt, *(forced[0] if forced and n == 1 else ())]
        self.sender.tokens_of[request_id] = token_ids
        key = (request_id, attempt)
        self.inbox.put(
            Submit(
                message,
                gateway,
                self.now + timeout_s,
                self.now,
                lambda answer: self.replies.__setitem__(key, answer),
            )
        )

    def redirect(
        self,
        request_id: str,
        attempt: int,
        destination: inference_pb2.Destination = DECODE,
        timeout_s: float = 60.0,
    ) -> None:
        message = inference_pb2.RedirectRequest(
            gateway_epoch=GATEWAY, request_id=request_id, attempt=attempt, destination=destination
        )
        key = (request_id, attempt)
        self.inbox.put(
            Redirect(
                message,
                GATEWAY,
                self.now + timeout_s,
                self.now,
                lambda answer: self.replies.__setitem__(key, answer),
            )
        )

    def cancel(
        self,
        request_id: str,
        attempt: int = 0,
        reason: str = "client_gone",
        choice: int | None = None,
    ) -> None:
        self.inbox.put(Cancel(GATEWAY, request_id, attempt, reason, choice))

    def lose_gateway(self, gateway: int = GATEWAY) -> None:
        self.inbox.put(GatewayGone(gateway))

    # --- time

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.turn()
            self.check()

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.turn()

    def check(self) -> None:
        """What holds after every turn."""
        self.store.check()
        for sent in self.sender.sent.values():
            self.sender.check(sent)

    # --- what was seen

    def events(self, request_id: str, kind: str, attempt: int | None = None) -> list:
        return [
            getattr(event, kind)
            for _, event in self.streams.events
            if event.request_id == request_id
            and event.WhichOneof("event") == kind
            and attempt in (None, event.attempt)
        ]

    def kinds(self, request_id: str, attempt: int = 0) -> list[str]:
        return [
            event.WhichOneof("event") or ""
            for _, event in self.streams.events
            if event.request_id == request_id and event.attempt == attempt
        ]

    def first_tokens(self, request_id: str, attempt: int | None = None) -> list[int]:
        return [
            token.token_id
            for tokens in self.events(request_id, "tokens", attempt)
            for token in tokens.tokens
        ]

    def handle(self, request_id: str, attempt: int = 0) -> TransferHandle:
        """The one transfer of the attempt that is not closed."""
        (found,) = [
            handle
            for handle in self.sender.sent
            if (handle.request_id, handle.attempt) == (request_id, attempt)
        ]
        return found

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(
            f"scission_{name}", {**self.metrics.labels, **labels}
        )
        assert value is not None, name
        return value

    def blocks(self, state: State) -> int:
        return self.store.blocks.counts()[state]

    def slots(self, state: State) -> int:
        return self.store.slots.counts()[state]

    def assert_drained(self) -> None:
        """Nothing is held but by the cache."""
        assert self.engine.is_idle
        for pool in (self.store.blocks, self.store.slots):
            counts = pool.counts()
            assert counts[State.FREE] + counts[State.CACHED] == pool.total, counts
        self.store.prefixes.clear()
        assert self.store.blocks.num_free == self.store.blocks.total
        assert self.store.slots.num_free == self.store.slots.total
