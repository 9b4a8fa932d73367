from scission.protos import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_MESSAGE: _ClassVar[Tier]
    TIER_SHARED: _ClassVar[Tier]
TIER_UNSPECIFIED: Tier
TIER_MESSAGE: Tier
TIER_SHARED: Tier

class Hello(_message.Message):
    __slots__ = ("epoch", "worker_id", "layout_digest", "protocol_version", "tiers")
    class LayoutDigestEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    worker_id: str
    layout_digest: _containers.ScalarMap[str, str]
    protocol_version: int
    tiers: _containers.RepeatedScalarFieldContainer[Tier]
    def __init__(self, epoch: _Optional[int] = ..., worker_id: _Optional[str] = ..., layout_digest: _Optional[_Mapping[str, str]] = ..., protocol_version: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[Tier, str]]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("epoch", "worker_id", "slot_bytes", "num_slots", "arena_name", "ipc_name", "bulk_addresses", "lease_name")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SLOTS_FIELD_NUMBER: _ClassVar[int]
    ARENA_NAME_FIELD_NUMBER: _ClassVar[int]
    IPC_NAME_FIELD_NUMBER: _ClassVar[int]
    BULK_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    LEASE_NAME_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    worker_id: str
    slot_bytes: int
    num_slots: int
    arena_name: str
    ipc_name: str
    bulk_addresses: _containers.RepeatedScalarFieldContainer[str]
    lease_name: str
    def __init__(self, epoch: _Optional[int] = ..., worker_id: _Optional[str] = ..., slot_bytes: _Optional[int] = ..., num_slots: _Optional[int] = ..., arena_name: _Optional[str] = ..., ipc_name: _Optional[str] = ..., bulk_addresses: _Optional[_Iterable[str]] = ..., lease_name: _Optional[str] = ...) -> None: ...

class ArenaProof(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class TierDecision(_message.Message):
    __slots__ = ("tier",)
    TIER_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("reason", "field", "detail")
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    field: str
    detail: str
    def __init__(self, reason: _Optional[str] = ..., field: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("request_id", "attempt", "remaining_ms", "num_tokens", "num_sequences")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    remaining_ms: int
    num_tokens: int
    num_sequences: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., remaining_ms: _Optional[int] = ..., num_tokens: _Optional[int] = ..., num_sequences: _Optional[int] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("slots", "num_ranks")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_RANKS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    num_ranks: int
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., num_ranks: _Optional[int] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("slots", "injected")
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    INJECTED_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    injected: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slots: _Optional[_Iterable[int]] = ..., injected: _Optional[_Iterable[int]] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("choice", "tokens")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    choice: int
    tokens: _containers.RepeatedCompositeFieldContainer[_inference_pb2.Token]
    def __init__(self, choice: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_inference_pb2.Token, _Mapping]]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("num_chunks", "num_bytes", "chunk_hashes", "sequences", "num_tokens", "first_token_age_s")
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_HASHES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_AGE_S_FIELD_NUMBER: _ClassVar[int]
    num_chunks: int
    num_bytes: int
    chunk_hashes: _containers.RepeatedScalarFieldContainer[int]
    sequences: _containers.RepeatedCompositeFieldContainer[Sequence]
    num_tokens: int
    first_token_age_s: float
    def __init__(self, num_chunks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., chunk_hashes: _Optional[_Iterable[int]] = ..., sequences: _Optional[_Iterable[_Union[Sequence, _Mapping]]] = ..., num_tokens: _Optional[int] = ..., first_token_age_s: _Optional[float] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Reship(_message.Message):
    __slots__ = ("sequence_numbers",)
    SEQUENCE_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    sequence_numbers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence_numbers: _Optional[_Iterable[int]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...
