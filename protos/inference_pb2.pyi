from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason

class EventsRequest(_message.Message):
    __slots__ = ("gateway_epoch", "worker_epoch")
    GATEWAY_EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    gateway_epoch: int
    worker_epoch: int
    def __init__(self, gateway_epoch: _Optional[int] = ..., worker_epoch: _Optional[int] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_token_ids", "seed", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_token_ids: _containers.RepeatedScalarFieldContainer[int]
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_token_ids: _Optional[_Iterable[int]] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: bool = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class ForcedTokens(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Destination(_message.Message):
    __slots__ = ("worker_id", "epoch", "transfer_address")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    epoch: int
    transfer_address: str
    def __init__(self, worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., transfer_address: _Optional[str] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("gateway_epoch", "request_id", "attempt", "remaining_ms", "prompt_token_ids", "sampling", "num_choices", "forced", "destination", "cache_salt", "waited_s", "priority", "external_id")
    GATEWAY_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    NUM_CHOICES_FIELD_NUMBER: _ClassVar[int]
    FORCED_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_epoch: int
    request_id: str
    attempt: int
    remaining_ms: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    num_choices: int
    forced: _containers.RepeatedCompositeFieldContainer[ForcedTokens]
    destination: Destination
    cache_salt: str
    waited_s: float
    priority: int
    external_id: str
    def __init__(self, gateway_epoch: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., remaining_ms: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., num_choices: _Optional[int] = ..., forced: _Optional[_Iterable[_Union[ForcedTokens, _Mapping]]] = ..., destination: _Optional[_Union[Destination, _Mapping]] = ..., cache_salt: _Optional[str] = ..., waited_s: _Optional[float] = ..., priority: _Optional[int] = ..., external_id: _Optional[str] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("gateway_epoch", "request_id", "attempt", "remaining_ms", "prompt_token_ids", "sampling", "num_choices", "forced", "waited_s", "priority", "external_id")
    GATEWAY_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    NUM_CHOICES_FIELD_NUMBER: _ClassVar[int]
    FORCED_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_epoch: int
    request_id: str
    attempt: int
    remaining_ms: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    num_choices: int
    forced: _containers.RepeatedCompositeFieldContainer[ForcedTokens]
    waited_s: float
    priority: int
    external_id: str
    def __init__(self, gateway_epoch: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., remaining_ms: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., num_choices: _Optional[int] = ..., forced: _Optional[_Iterable[_Union[ForcedTokens, _Mapping]]] = ..., waited_s: _Optional[float] = ..., priority: _Optional[int] = ..., external_id: _Optional[str] = ...) -> None: ...

class RedirectRequest(_message.Message):
    __slots__ = ("gateway_epoch", "request_id", "attempt", "remaining_ms", "destination")
    GATEWAY_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    gateway_epoch: int
    request_id: str
    attempt: int
    remaining_ms: int
    destination: Destination
    def __init__(self, gateway_epoch: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., remaining_ms: _Optional[int] = ..., destination: _Optional[_Union[Destination, _Mapping]] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("queue_wait_s", "received_at", "replied_at")
    QUEUE_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_AT_FIELD_NUMBER: _ClassVar[int]
    REPLIED_AT_FIELD_NUMBER: _ClassVar[int]
    queue_wait_s: float
    received_at: float
    replied_at: float
    def __init__(self, queue_wait_s: _Optional[float] = ..., received_at: _Optional[float] = ..., replied_at: _Optional[float] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("gateway_epoch", "request_id", "attempt", "reason", "choice")
    GATEWAY_EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    gateway_epoch: int
    request_id: str
    attempt: int
    reason: str
    choice: int
    def __init__(self, gateway_epoch: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ..., choice: _Optional[int] = ...) -> None: ...

class CancelReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StepEvents(_message.Message):
    __slots__ = ("events", "load", "sent_at")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SENT_AT_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[RequestEvent]
    load: Load
    sent_at: float
    def __init__(self, events: _Optional[_Iterable[_Union[RequestEvent, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., sent_at: _Optional[float] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_queued", "num_running", "queued_tokens", "free_blocks", "total_blocks", "is_draining", "expected_wait_s")
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINING_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    num_queued: int
    num_running: int
    queued_tokens: int
    free_blocks: int
    total_blocks: int
    is_draining: bool
    expected_wait_s: float
    def __init__(self, num_queued: _Optional[int] = ..., num_running: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., is_draining: bool = ..., expected_wait_s: _Optional[float] = ...) -> None: ...

class RequestEvent(_message.Message):
    __slots__ = ("request_id", "attempt", "tokens", "prompt_logprobs", "prefilled", "committed", "ended", "retry", "failed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    tokens: Tokens
    prompt_logprobs: PromptLogprobs
    prefilled: Prefilled
    committed: Committed
    ended: Ended
    retry: Retry
    failed: Failed
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[PromptLogprobs, _Mapping]] = ..., prefilled: _Optional[_Union[Prefilled, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ..., retry: _Optional[_Union[Retry, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("choice", "index", "token_id", "logprobs")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    choice: int
    index: int
    token_id: int
    logprobs: Logprobs
    def __init__(self, choice: _Optional[int] = ..., index: _Optional[int] = ..., token_id: _Optional[int] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("logprob", "rank", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    rank: int
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("tokens", "finished")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[Token]
    finished: _containers.RepeatedCompositeFieldContainer[Finished]
    def __init__(self, tokens: _Optional[_Iterable[_Union[Token, _Mapping]]] = ..., finished: _Optional[_Iterable[_Union[Finished, _Mapping]]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("choice", "reason", "stop_token_id", "num_tokens")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    choice: int
    reason: FinishReason
    stop_token_id: int
    num_tokens: int
    def __init__(self, choice: _Optional[int] = ..., reason: _Optional[_Union[FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class PromptLogprobs(_message.Message):
    __slots__ = ("start", "entries")
    START_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    start: int
    entries: _containers.RepeatedCompositeFieldContainer[Logprobs]
    def __init__(self, start: _Optional[int] = ..., entries: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ...) -> None: ...

class Prefilled(_message.Message):
    __slots__ = ("cached_tokens", "queue_s", "compute_s", "sample_s", "grant_wait_s")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_S_FIELD_NUMBER: _ClassVar[int]
    GRANT_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    queue_s: float
    compute_s: float
    sample_s: float
    grant_wait_s: float
    def __init__(self, cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., sample_s: _Optional[float] = ..., grant_wait_s: _Optional[float] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("transfer_s", "exposed_s", "inject_s", "bytes")
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    INJECT_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    transfer_s: float
    exposed_s: float
    inject_s: float
    bytes: int
    def __init__(self, transfer_s: _Optional[float] = ..., exposed_s: _Optional[float] = ..., inject_s: _Optional[float] = ..., bytes: _Optional[int] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Retry(_message.Message):
    __slots__ = ("reason", "is_state_retained", "detail")
    REASON_FIELD_NUMBER: _ClassVar[int]
    IS_STATE_RETAINED_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    is_state_retained: bool
    detail: str
    def __init__(self, reason: _Optional[str] = ..., is_state_retained: bool = ..., detail: _Optional[str] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("grpc_code", "message")
    GRPC_CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    grpc_code: str
    message: str
    def __init__(self, grpc_code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
