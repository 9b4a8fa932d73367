"""Fake workers that speak the real protos over real sockets, with an engine that a test scripts.

`FakePrefill` and `FakeDecode` run the project's own gRPC front; their engine is a few lines on the
test's event loop. The tokens of a request follow from its prompt alone (`right_tokens`), so a test
knows what any pair of workers must give, through any number of attempts.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence

from scission.common.engine_inbox import Cancel, GatewayGone, Inbox, InboxItem, Redirect, Submit
from scission.common.errors import ScissionError, TransferError
from scission.common.event_stream import EventStreams
from scission.common.inference_messages import sampling_from_proto, tokens_to_proto
from scission.common.types import Finish, FinishReason, Role, Token
from scission.common.worker_service import InferenceServicer, WorkerServer
from scission.protos import cluster_pb2, inference_pb2

DIGEST = {"model": "m", "weights": "w"}
BEAT_S = 0.02
BLOCK_SIZE = 4
Key = tuple[int, str]  # gateway epoch, request id

_epochs = itertools.count(1)


def right_token(prompt: Sequence[int], choice: int, index: int) -> int:
    return (sum(prompt) * 31 + choice * 1009 + index * 7 + 11) % 50021


def right_tokens(prompt: Sequence[int], count: int, choice: int = 0) -> list[int]:
    return [right_token(prompt, choice, index) for index in range(count)]


class _ScriptedInbox(Inbox[InboxItem]):
    def __init__(self, handle: Callable[[InboxItem], None]) -> None:
        super().__init__()
        self._handle = handle

    def put(self, item: InboxItem) -> None:
        self._handle(item)


class FakeWorker:
    """What both roles share. `frozen` is SIGSTOP: nothing is read, said or computed."""

    role: Role

    def __init__(self, digest: dict[str, str] | None = None, num_blocks: int = 1000) -> None:
        self.epoch = next(_epochs)
        self.worker_id = f"{self.role}-{self.epoch:x}"
        self.streams = EventStreams()
        self.load = inference_pb2.Load(free_blocks=num_blocks, total_blocks=num_blocks)
        self.submits: list[Submit] = []
        self.redirects: list[Redirect] = []
        self.cancels: list[Cancel] = []
        self.gone: list[GatewayGone] = []
        self.refuse: ScissionError | None = None  # the answer to every Submit
        self.is_mute = False  # answers no Submit
        self._digest = digest or DIGEST
        self._num_blocks = num_blocks
        self._is_frozen = False
        self._backlog: list[InboxItem] = []
        self._changed = asyncio.Event()
        servicer = InferenceServicer(
            self.epoch,
            _ScriptedInbox(self._take),
            self.streams,
            num_queued=lambda: 0,
            max_queued=1000,
        )
        self._server = WorkerServer(self.role, servicer, "127.0.0.1", 0)

    @property
    def description(self) -> cluster_pb2.WorkerDescription:
        return cluster_pb2.WorkerDescription(
            worker_id=self.worker_id,
            role=self.role,
            epoch=self.epoch,
            grpc_address=f"127.0.0.1:{self._server.port}",
            transfer_address=f"inproc://{self.worker_id}",
            metrics_address=f"127.0.0.1:{self._server.port + 1}",
            version="0",
            served_model_name="tiny",
            max_model_len=self._num_blocks * BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            num_blocks=self._num_blocks,
            max_num_seqs=8,
            layout_digest=self._digest,
        )

    async def start(self) -> None:
        await self._server.start()
        await self._server.set_serving(True)
        self._beating = asyncio.create_task(self._beat())

    async def kill(self) -> None:
        """As kill -9 does: every connection breaks, nothing is said."""
        self._is_frozen = True
        self._beating.cancel()
        await self._server.stop(0)

    def freeze(self) -> None:
        self._is_frozen = True

    def thaw(self) -> None:
        self._is_frozen = False
        backlog, self._backlog = self._backlog, []
        for item in backlog:
            self._take(item)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 30) -> None:
        """Wait until something that this worker was sent or did makes the condition true."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def emit(
        self,
        item: Submit | Redirect,
        tokens: Sequence[Token] = (),
        finishes: Sequence[Finish] = (),
        **event: object,
    ) -> None:
        """One event of the item's request and attempt, on its gateway's stream."""
        if tokens or finishes:
            event["tokens"] = tokens_to_proto(tokens, finishes)
        message = inference_pb2.RequestEvent(
            request_id=item.request.request_id,
            attempt=item.request.attempt,
            **event,  # type: ignore[arg-type]
        )
        if not self._is_frozen:
            self.streams.emit(item.gateway_epoch, [message])

    def on_submit(self, item: Submit) -> None:
        raise NotImplementedError

    def on_redirect(self, item: Redirect) -> None:
        raise NotImplementedError

    def forget(self, key: Key, attempt: int) -> None:
        """Drop this attempt of a request and every lower one."""
        raise NotImplementedError

    def forget_gateway(self, gateway_epoch: int) -> None:
        for submit in self.submits:
            if submit.gateway_epoch == gateway_epoch:
                self.forget((gateway_epoch, submit.request.request_id), submit.request.attempt)

    async def _beat(self) -> None:
        while True:
            if not self._is_frozen:
                self.streams.beat(self.load)
            await asyncio.sleep(BEAT_S)

    def _take(self, item: InboxItem) -> None:
        if self._is_frozen:
            self._backlog.append(item)
            return
        match item:
            case Submit():
                self.submits.append(item)
                if self.refuse is not None:
                    item.reply(self.refuse)
                elif not self.is_mute:
                    item.reply(0.0)
                    self.on_submit(item)
            case Redirect():
                self.redirects.append(item)
                self.on_redirect(item)
            case Cancel():
                self.cancels.append(item)
                # One attempt and those before it: the next may already be here.
                if item.choice is None:
                    self.forget((item.gateway_epoch, item.request_id), item.attempt)
            case GatewayGone():
                self.gone.append(item)
                self.forget_gateway(item.gateway_epoch)
        self._changed.set()


class FakePrefill(FakeWorker):
    """Computes at once, streams the first tokens, hands over to the decode it was told.

    `stop_at` holds every request back: "queued" before anything is computed, "computed" before the
    state is shipped. `release` lets them go on.
    """

    role = Role.PREFILL

    def __init__(
        self,
        decodes: "Sequence[FakeDecode]",
        digest: dict[str, str] | None = None,
        num_blocks: int = 1000,
    ) -> None:
        super().__init__(digest, num_blocks)
        self._decodes = {f"inproc://{decode.worker_id}": decode for decode in decodes}
        self.stop_at = ""
        self.cached_tokens = 0
        self.keeps_state = True  # answers Redirect
        self.held: list[Submit] = []
        self.retained: dict[Key, Submit] = {}

    def release(self) -> None:
        stage, self.stop_at = self.stop_at, ""
        held, self.held = self.held, []
        for item in held:
            if stage == "queued":
                self.on_submit(item)
            else:
                assert isinstance(item.request, inference_pb2.PrefillRequest)
                self._ship(item, item.request.destination)

    def on_submit(self, item: Submit) -> None:
        if self.stop_at == "queued":
            self.held.append(item)
            return
        request = item.request
        assert isinstance(request, inference_pb2.PrefillRequest)
        self.compute(item)
        if not request.HasField("destination"):
            self.emit(item, ended=inference_pb2.Ended())
            return
        self.retained[item.gateway_epoch, request.request_id] = item
        if self.stop_at == "computed":
            self.held.append(item)
        else:
            self._ship(item, request.destination)

    def compute(self, item: Submit) -> None:
        """Say that the prompt is computed, and its first tokens."""
        request = item.request
        assert isinstance(request, inference_pb2.PrefillRequest)
        sampling = sampling_from_proto(request.sampling)
        num_prompt = len(request.prompt_token_ids)
        if sampling.prompt_logprobs is not None:
            entries = [
                inference_pb2.Logprobs(logprob=-position, rank=1)
                for position in range(1, num_prompt)
            ]
            self.emit(item, prompt_logprobs=inference_pb2.PromptLogprobs(start=1, entries=entries))
        self.emit(
            item,
            prefilled=inference_pb2.Prefilled(
                cached_tokens=self.cached_tokens, queue_s=0.001, compute_s=0.002, sample_s=0.0005
            ),
        )
        if sampling.max_tokens == 0:
            return
        tokens, finishes = [], []
        for choice in range(request.num_choices):
            forced = list(request.forced[choice].token_ids) if request.forced else []
            if forced and request.num_choices > 1:
                continue
            index = len(forced)
            tokens.append(
                Token(choice, index, right_token(request.prompt_token_ids, choice, index))
            )
            if index + 1 == sampling.max_tokens:
                finishes.append(Finish(choice, FinishReason.LENGTH, num_tokens=index + 1))
        self.emit(item, tokens, finishes)

    def on_redirect(self, item: Redirect) -> None:
        kept = self.retained.get((item.gateway_epoch, item.request.request_id))
        if kept is None or not self.keeps_state:
            item.reply(TransferError("nothing is retained"))
            return
        item.reply(0.0)
        self.held = [held for held in self.held if held is not kept]
        self._ship(item, item.request.destination)

    def forget(self, key: Key, attempt: int) -> None:
        kept = self.retained.get(key)
        if kept is not None and kept.request.attempt <= attempt:
            del self.retained[key]
        self.held = [
            held
            for held in self.held
            if (held.gateway_epoch, held.request.request_id) != key
            or held.request.attempt > attempt
        ]

    def _ship(self, item: Submit | Redirect, destination: inference_pb2.Destination) -> None:
        decode = self._decodes[destination.transfer_address]
        key = (item.gateway_epoch, item.request.request_id)

        def on_commit() -> None:
            self.emit(item, ended=inference_pb2.Ended())

        decode.take_state(key, item.request.attempt, on_commit)


class FakeDecode(FakeWorker):
    """Decodes what was submitted to it once the state has come.

    With `limit` it falls silent after so many tokens of a request, until `release`.
    """

    role = Role.DECODE

    def __init__(self, digest: dict[str, str] | None = None, num_blocks: int = 1000) -> None:
        super().__init__(digest, num_blocks)
        self.limit: int | None = None
        self.commits = True  # else shipped state is never taken in
        self.tokens_sent = 0
        self._announced: dict[Key, Submit] = {}
        self._state: dict[Key, tuple[int, Callable[[], None]]] = {}
        self._running: dict[Key, tuple[int, asyncio.Task[None]]] = {}
        self._released = asyncio.Event()

    @property
    def num_running(self) -> int:
        return len(self._running) + len(self._announced)

    def release(self) -> None:
        self.limit = None
        self._released.set()

    async def kill(self) -> None:
        await super().kill()
        for _, task in self._running.values():
            task.cancel()

    def on_submit(self, item: Submit) -> None:
        key = (item.gateway_epoch, item.request.request_id)
        self.forget(key, item.request.attempt - 1)
        self._announced[key] = item
        self._begin(key)

    def take_state(self, key: Key, attempt: int, on_commit: Callable[[], None]) -> None:
        self._state[key] = (attempt, on_commit)
        self._begin(key)

    def forget(self, key: Key, attempt: int) -> None:
        announced, state, running = (
            self._announced.get(key),
            self._state.get(key),
            self._running.get(key),
        )
        if announced is not None and announced.request.attempt <= attempt:
            del self._announced[key]
        if state is not None and state[0] <= attempt:
            del self._state[key]
        if running is not None and running[0] <= attempt:
            running[1].cancel()
            del self._running[key]

    def _begin(self, key: Key) -> None:
        item, state = self._announced.get(key), self._state.get(key)
        if item is None or state is None or not self.commits or self._is_frozen:
            return
        if state[0] != item.request.attempt:
            return
        del self._announced[key], self._state[key]
        task = asyncio.create_task(self._decode(key, item, state[1]))
        self._running[key] = (item.request.attempt, task)

    async def _decode(self, key: Key, item: Submit, on_commit: Callable[[], None]) -> None:
        request = item.request
        on_commit()
        self.emit(item, committed=inference_pb2.Committed())
        num_choices = request.num_choices
        most = request.sampling.max_tokens
        forced = [len(f.token_ids) for f in request.forced] or [0] * num_choices
        # Without forced tokens the prefill has sampled, and streamed, the first one.
        redirected = request.attempt > 0 and any(forced)
        start = [max(count, 0 if redirected else 1) for count in forced]
        if request.num_choices == 1 and any(forced):
            start = [forced[0]]
        for index in range(min(start), most):
            if self.limit is not None and index >= self.limit:
                await self._released.wait()
            choices = [choice for choice in range(num_choices) if index >= start[choice]]
            tokens = [
                Token(choice, index, right_token(request.prompt_token_ids, choice, index))
                for choice in choices
            ]
            is_last = index + 1 == most
            finishes = [
                Finish(choice, FinishReason.LENGTH, num_tokens=most)
                for choice in choices
                if is_last
            ]
            self.emit(item, tokens, finishes)
            self.tokens_sent += len(tokens)
            self._changed.set()
            await asyncio.sleep(0)
        self.emit(item, ended=inference_pb2.Ended())
        self._running.pop(key, None)
        self._changed.set()
