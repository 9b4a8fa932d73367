import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scission.common import errors, inference_messages
from scission.common.types import Finish, FinishReason, SamplingParams, Token, TokenLogprobs
from scission.protos import inference_pb2

ids = st.integers(0, 2**31 - 1)
reals = st.floats(allow_nan=False, allow_infinity=False)
fp32 = st.floats(width=32, allow_nan=False)
logprobs = st.builds(
    TokenLogprobs,
    logprob=fp32,
    rank=ids,
    top_ids=st.lists(ids, max_size=4).map(tuple),
    top_logprobs=st.lists(fp32, max_size=4).map(tuple),
)
tokens = st.builds(
    Token, choice=ids, index=ids, token_id=ids, logprobs=st.one_of(st.none(), logprobs)
)
finishes = st.builds(
    Finish,
    choice=ids,
    reason=st.sampled_from(FinishReason),
    stop_token_id=st.one_of(st.none(), ids),
    num_tokens=ids,
)
samplings = st.builds(
    SamplingParams,
    max_tokens=ids,
    min_tokens=ids,
    temperature=reals,
    top_p=reals,
    top_k=ids,
    min_p=reals,
    presence_penalty=reals,
    frequency_penalty=reals,
    repetition_penalty=reals,
    logit_bias=st.dictionaries(ids, reals, max_size=3),
    allowed_token_ids=st.lists(ids, max_size=3).map(tuple),
    bad_token_ids=st.lists(ids, max_size=3).map(tuple),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.one_of(st.none(), st.integers(0, 20)),
    prompt_logprobs=st.one_of(st.none(), st.integers(-1, 20)),
)


@given(samplings)
def test_sampling_goes_there_and_back(sampling: SamplingParams) -> None:
    wire = inference_messages.sampling_to_proto(sampling).SerializeToString()
    message = inference_pb2.Sampling.FromString(wire)
    assert inference_messages.sampling_from_proto(message) == sampling


@given(st.lists(tokens, max_size=4).map(tuple), st.lists(finishes, max_size=3).map(tuple))
def test_tokens_and_finishes_go_there_and_back(
    some_tokens: tuple[Token, ...], some_finishes: tuple[Finish, ...]
) -> None:
    wire = inference_messages.tokens_to_proto(some_tokens, some_finishes).SerializeToString()
    message = inference_pb2.Tokens.FromString(wire)
    assert inference_messages.tokens_from_proto(message) == (some_tokens, some_finishes)


@given(st.integers(1, 1000), st.lists(logprobs, max_size=4).map(tuple))
def test_prompt_logprobs_go_there_and_back(start: int, entries: tuple[TokenLogprobs, ...]) -> None:
    message = inference_messages.prompt_logprobs_to_proto(start, entries)
    assert inference_messages.prompt_logprobs_from_proto(message) == (start, entries)


@given(st.lists(st.lists(ids, max_size=4).map(tuple), min_size=1, max_size=3).map(tuple))
def test_forced_tokens_go_there_and_back(forced: tuple[tuple[int, ...], ...]) -> None:
    message = inference_messages.forced_to_proto(forced)
    assert inference_messages.forced_from_proto(message, len(forced)) == forced


def test_fp32_logprobs_pass_unchanged() -> None:
    value = float(np.float32(-1.2345678))
    message = inference_messages.logprobs_to_proto(TokenLogprobs(value, 1))
    assert inference_messages.logprobs_from_proto(message).logprob == value


def test_an_error_keeps_its_http_status_over_the_wire() -> None:
    for error in (
        errors.RequestError("bad"),
        errors.ContextLengthError("long"),
        errors.CapacityError("full"),
        errors.UnavailableError("draining"),
        errors.DeadlineError("late"),
        errors.EngineError("broken"),
        errors.TransferError("lost"),
    ):
        back = inference_messages.failed_from_proto(inference_messages.failed_to_proto(error))
        assert type(back) is type(error)
        assert back.message == error.message
