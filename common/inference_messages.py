"""Our values and their messages on the wire (protos/inference.proto), both directions side by
side.
"""

from collections.abc import Iterable, Sequence

from scission.common import errors
from scission.common.errors import EngineError, ScissionError
from scission.common.types import Finish, FinishReason, SamplingParams, Token, TokenLogprobs
from scission.protos import inference_pb2

_REASON_TO_PROTO = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
}
_REASON_FROM_PROTO = {value: reason for reason, value in _REASON_TO_PROTO.items()}

# The class that stands for each gRPC status on the receiving side.
_ERROR_BY_GRPC_CODE: dict[str, type[ScissionError]] = {
    "INVALID_ARGUMENT": errors.RequestError,
    "OUT_OF_RANGE": errors.ContextLengthError,
    "UNIMPLEMENTED": errors.UnsupportedError,
    "RESOURCE_EXHAUSTED": errors.CapacityError,
    "UNAVAILABLE": errors.UnavailableError,
    "DEADLINE_EXCEEDED": errors.DeadlineError,
    "CANCELLED": errors.CancelledError,
    "FAILED_PRECONDITION": errors.LayoutMismatchError,
    "ABORTED": errors.TransferError,
    "DATA_LOSS": errors.WireError,
}


def sampling_to_proto(sampling: SamplingParams) -> inference_pb2.Sampling:
    return inference_pb2.Sampling(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias,
        allowed_token_ids=sampling.allowed_token_ids,
        bad_token_ids=sampling.bad_token_ids,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def sampling_from_proto(message: inference_pb2.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=dict(message.logit_bias),
        allowed_token_ids=tuple(message.allowed_token_ids),
        bad_token_ids=tuple(message.bad_token_ids),
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def logprobs_to_proto(logprobs: TokenLogprobs) -> inference_pb2.Logprobs:
    """Logprobs travel as float32: what an fp32 log-softmax gives passes unchanged."""
    return inference_pb2.Logprobs(
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_ids=logprobs.top_ids,
        top_logprobs=logprobs.top_logprobs,
    )


def logprobs_from_proto(message: inference_pb2.Logprobs) -> TokenLogprobs:
    return TokenLogprobs(
        logprob=message.logprob,
        rank=message.rank,
        top_ids=tuple(message.top_ids),
        top_logprobs=tuple(message.top_logprobs),
    )


def token_to_proto(token: Token) -> inference_pb2.Token:
    return inference_pb2.Token(
        choice=token.choice,
        index=token.index,
        token_id=token.token_id,
        logprobs=None if token.logprobs is None else logprobs_to_proto(token.logprobs),
    )


def token_from_proto(message: inference_pb2.Token) -> Token:
    return Token(
        choice=message.choice,
        index=message.index,
        token_id=message.token_id,
        logprobs=logprobs_from_proto(message.logprobs) if message.HasField("logprobs") else None,
    )


def finish_to_proto(finish: Finish) -> inference_pb2.Finished:
    return inference_pb2.Finished(
        choice=finish.choice,
        reason=_REASON_TO_PROTO[finish.reason],
        stop_token_id=finish.stop_token_id,
        num_tokens=finish.num_tokens,
    )


def finish_from_proto(message: inference_pb2.Finished) -> Finish:
    """An unknown reason (a newer worker's) reads as abort."""
    return Finish(
        choice=message.choice,
        reason=_REASON_FROM_PROTO.get(message.reason, FinishReason.ABORT),
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        num_tokens=message.num_tokens,
    )


def tokens_to_proto(
    tokens: Iterable[Token], finishes: Iterable[Finish] = ()
) -> inference_pb2.Tokens:
    """One request's share of one step."""
    return inference_pb2.Tokens(
        tokens=[token_to_proto(token) for token in tokens],
        finished=[finish_to_proto(finish) for finish in finishes],
    )


def tokens_from_proto(
    message: inference_pb2.Tokens,
) -> tuple[tuple[Token, ...], tuple[Finish, ...]]:
    return (
        tuple(token_from_proto(token) for token in message.tokens),
        tuple(finish_from_proto(finish) for finish in message.finished),
    )


def prompt_logprobs_to_proto(
    start: int, entries: Sequence[TokenLogprobs]
) -> inference_pb2.PromptLogprobs:
    """Entries of the prompt positions from `start` (at least 1) on."""
    return inference_pb2.PromptLogprobs(
        start=start, entries=[logprobs_to_proto(entry) for entry in entries]
    )


def prompt_logprobs_from_proto(
    message: inference_pb2.PromptLogprobs,
) -> tuple[int, tuple[TokenLogprobs, ...]]:
    return message.start, tuple(logprobs_from_proto(entry) for entry in message.entries)


def forced_to_proto(forced: Sequence[Sequence[int]]) -> list[inference_pb2.ForcedTokens]:
    """`forced[choice]`: the output tokens already delivered; all lists empty means a first
    attempt.
    """
    if not any(forced):
        return []
    return [inference_pb2.ForcedTokens(token_ids=token_ids) for token_ids in forced]


def forced_from_proto(
    forced: Sequence[inference_pb2.ForcedTokens], num_choices: int
) -> tuple[tuple[int, ...], ...]:
    """Always `num_choices` tuples."""
    if not forced:
        return ((),) * num_choices
    return tuple(tuple(tokens.token_ids) for tokens in forced)


def failed_to_proto(error: ScissionError) -> inference_pb2.Failed:
    return inference_pb2.Failed(grpc_code=error.grpc_code, message=error.message)


def failed_from_proto(message: inference_pb2.Failed) -> ScissionError:
    return error_from_status(message.grpc_code, message.message)


def error_from_status(grpc_code: str, message: str) -> ScissionError:
    """The error of our tree that a gRPC status (by name) stands for."""
    return _ERROR_BY_GRPC_CODE.get(grpc_code, EngineError)(message)
