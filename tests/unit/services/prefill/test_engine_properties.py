"""Whatever happens in whatever order: right tokens, nothing read that was freed, nothing lost."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scission.common.errors import ScissionError
from scission.common.transfer.events import TransferHandle
from tests.unit.services.prefill.chain_model import chain, next_token
from tests.unit.services.prefill.harness import DECODE, GATEWAY, Prefill

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=22)
LAST = ("ended", "retry", "failed")


class PrefillMachine(RuleBasedStateMachine):
    """Gateways, decodes and the clock do what they like; the engine must stay right."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: dict[str, list[int]] = {}
        self.attempts: dict[str, int] = {}
        self.granted: set[TransferHandle] = set()
        self.num_failures = 0

    @initialize(
        budget=st.integers(1, 24),
        num_blocks=st.integers(6, 20),
        num_slots=st.integers(1, 4),
        max_snapshots=st.integers(0, 3),
        has_prefix_cache=st.booleans(),
        max_queued=st.integers(1, 4),
    )
    def start(self, **options: int) -> None:
        self.prefill = Prefill(retain_lease_s=5.0, commit_lease_s=1.0, **options)

    @rule(
        prompt=PROMPTS,
        n=st.integers(1, 2),
        forced=st.lists(st.integers(0, 1), max_size=3),
        ends_here=st.booleans(),
        wants_logprobs=st.sampled_from([None, None, 0]),
        timeout_s=st.sampled_from([2.0, 60.0]),
        waited_s=st.sampled_from([0.0, 3.0]),
        gateway=st.sampled_from([GATEWAY, GATEWAY + 1]),
    )
    def submit(
        self,
        prompt: list[int],
        n: int,
        forced: list[int],
        ends_here: bool,
        wants_logprobs: int | None,
        timeout_s: float,
        waited_s: float,
        gateway: int,
    ) -> None:
        name = f"r{len(self.prompts)}"
        self.prompts[name] = [*prompt, *(forced if n == 1 else ())]
        self.attempts[name] = 0
        self.prefill.submit(
            name,
            prompt,
            n=n,
            forced=[forced] if n == 1 else (),
            max_tokens=1 + len(forced) if ends_here else 8,
            destination=None if ends_here else DECODE,
            timeout_s=timeout_s,
            waited_s=waited_s,
            gateway=gateway,
            prompt_logprobs=wants_logprobs,
        )

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), behind=st.integers(0, 1))
    def cancel(self, data: st.DataObject, behind: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.prompts)))
        self.prefill.cancel(name, self.attempts[name] - behind)

    @precondition(lambda self: self.prompts)
    @rule(data=st.data(), is_redirect=st.booleans())
    def try_again(self, data: st.DataObject, is_redirect: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.prompts)))
        self.attempts[name] += 1
        if is_redirect:
            self.prefill.redirect(name, self.attempts[name])
        else:
            self.prefill.submit(name, self.prompts[name], attempt=self.attempts[name])

    @rule(gateway=st.sampled_from([GATEWAY, GATEWAY + 1]))
    def lose_gateway(self, gateway: int) -> None:
        self.prefill.lose_gateway(gateway)

    @precondition(lambda self: self.num_failures < 2)  # three in a row end the process
    @rule()
    def fail_the_next_pass(self) -> None:
        self.num_failures += 1
        self.prefill.model.failures = 1

    @rule(times=st.integers(1, 4))
    def turn(self, times: int) -> None:
        self.prefill.turn(times)

    @rule(seconds=st.sampled_from([0.3, 1.1, 5.5]))
    def wait(self, seconds: float) -> None:
        self.prefill.advance(seconds)

    @precondition(lambda self: self.open_transfers())
    @rule(data=st.data(), answer=st.sampled_from(["grant", "refuse", "fail", "commit"]))
    def answer(self, data: st.DataObject, answer: str) -> None:
        """The decode's, which may cross an abort on its way."""
        handle = data.draw(st.sampled_from(self.open_transfers()))
        sender = self.prefill.sender
        match answer:
            case "grant":
                self.granted.add(handle)
                sender.grant(handle)
            case "refuse":
                sender.refuse(handle)
            case "fail":
                sender.fail(handle)
            case _:
                if handle in self.granted and sender.sent[handle].sequences is not None:
                    sender.commit(handle)

    @precondition(lambda self: self.closable())
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        self.prefill.sender.end(data.draw(st.sampled_from(self.closable())))

    @invariant()
    def every_token_is_right_and_every_attempt_ends_once(self) -> None:
        if not hasattr(self, "prefill"):
            return
        for name, token_ids in self.prompts.items():
            assert set(self.prefill.first_tokens(name)) <= {next_token(token_ids)}
            for attempt in range(self.attempts[name] + 1):
                kinds = self.prefill.kinds(name, attempt)
                assert sum(kind in LAST for kind in kinds) <= 1, kinds

    def teardown(self) -> None:
        if not hasattr(self, "prefill"):
            return
        prefill = self.prefill
        prefill.model.failures = 0
        prefill.turn(80)
        for handle in self.open_transfers():
            prefill.sender.grant(handle)
            prefill.turn()
            if prefill.sender.sent[handle].sequences is not None:
                prefill.sender.commit(handle)
            elif prefill.sender.sent[handle].abort_reason is None:
                prefill.sender.fail(handle)
            prefill.sender.end(handle)
            prefill.turn(80)
        prefill.advance(100)
        for handle in list(prefill.sender.sent):
            prefill.sender.end(handle)
        prefill.turn(2)
        prefill.assert_drained()
        for name in self.prompts:
            answer = prefill.replies.get((name, 0))
            assert answer is not None
            if isinstance(answer, ScissionError):
                assert not prefill.kinds(name, 0)

    def open_transfers(self) -> list[TransferHandle]:
        sent = self.prefill.sender.sent if hasattr(self, "prefill") else {}
        return [h for h, s in sent.items() if not s.is_over and s.abort_reason is None]

    def closable(self) -> list[TransferHandle]:
        sent = self.prefill.sender.sent if hasattr(self, "prefill") else {}
        return [h for h, s in sent.items() if s.is_over or s.abort_reason is not None]


TestAnyOrderOfEventsLeavesNothingBehind = PrefillMachine.TestCase
TestAnyOrderOfEventsLeavesNothingBehind.settings = settings(max_examples=60, stateful_step_count=40)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    budget=st.integers(1, 40),
    has_prefix_cache=st.booleans(),
)
def test_chunking_never_changes_the_state(
    lengths: list[int], budget: int, has_prefix_cache: bool
) -> None:
    """The fake transfer checks every row of every piece, and the ring, against the chain itself."""
    prefill = Prefill(budget=budget, has_prefix_cache=has_prefix_cache, max_snapshots=3)
    prompts = {f"r{i}": [1, 0] * 15 for i in range(len(lengths))}
    for (name, tokens), length in zip(prompts.items(), lengths, strict=True):
        prompts[name] = tokens[:length]
        prefill.submit(name, prompts[name])
    prefill.turn(sum(lengths) + 1)
    for name, tokens in prompts.items():
        assert prefill.first_tokens(name) == [next_token(tokens)]
        sent = prefill.sender.sent[prefill.handle(name)]
        assert sent.sequences is not None
        prefill.sender.check(sent)
        assert len(chain(tokens)) == sent.num_tokens
