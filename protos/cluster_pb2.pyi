from scission.protos import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerDescription(_message.Message):
    __slots__ = ("worker_id", "role", "epoch", "grpc_address", "transfer_address", "metrics_address", "version", "served_model_name", "max_model_len", "block_size", "num_blocks", "max_num_seqs", "layout_digest", "prefixes")
    class LayoutDigestEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVED_MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: str
    epoch: int
    grpc_address: str
    transfer_address: str
    metrics_address: str
    version: str
    served_model_name: str
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    layout_digest: _containers.ScalarMap[str, str]
    prefixes: PrefixUpdate
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[str] = ..., epoch: _Optional[int] = ..., grpc_address: _Optional[str] = ..., transfer_address: _Optional[str] = ..., metrics_address: _Optional[str] = ..., version: _Optional[str] = ..., served_model_name: _Optional[str] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., layout_digest: _Optional[_Mapping[str, str]] = ..., prefixes: _Optional[_Union[PrefixUpdate, _Mapping]] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("gateway_epoch",)
    GATEWAY_EPOCH_FIELD_NUMBER: _ClassVar[int]
    gateway_epoch: int
    def __init__(self, gateway_epoch: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("worker_id", "load", "prefixes")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    load: _inference_pb2.Load
    prefixes: PrefixUpdate
    def __init__(self, worker_id: _Optional[str] = ..., load: _Optional[_Union[_inference_pb2.Load, _Mapping]] = ..., prefixes: _Optional[_Union[PrefixUpdate, _Mapping]] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("is_known", "gateway_epoch")
    IS_KNOWN_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_EPOCH_FIELD_NUMBER: _ClassVar[int]
    is_known: bool
    gateway_epoch: int
    def __init__(self, is_known: bool = ..., gateway_epoch: _Optional[int] = ...) -> None: ...

class PrefixUpdate(_message.Message):
    __slots__ = ("added", "evicted")
    ADDED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    added: _containers.RepeatedScalarFieldContainer[bytes]
    evicted: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, added: _Optional[_Iterable[bytes]] = ..., evicted: _Optional[_Iterable[bytes]] = ...) -> None: ...

class DeregisterRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class DeregisterReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
