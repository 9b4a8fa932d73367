"""Everything that a user, a peer, a file or the network can break, as one tree.

ScissionError
├── ConfigError              a flag, variable or file of ours is wrong                 400
├── CheckpointError          a model folder is not what it should be                   500
├── RequestError             the caller's request is wrong                             400
│   ├── ContextLengthError   prompt (+ max_tokens) longer than the model's context     400
│   ├── UnsupportedError     a known field or value that is not served                 400
│   ├── ModelNotFoundError   another model's name                                      404
│   ├── PayloadTooLargeError the body is over the limit                                413
│   └── MediaTypeError       not application/json                                      415
├── CapacityError            no room now; trying later helps                           429
├── UnavailableError         loading, draining, or no worker of a role                 503
├── DeadlineError            the request's deadline has passed                         504
├── CancelledError           the caller has gone                                       499
├── EngineError              an engine failed this request                             500
├── LayoutMismatchError      two workers' state layouts differ; names the field        409
└── TransferError            the hand-off between prefill and decode failed            502
    ├── WireError            bytes that are no valid message
    └── PeerLostError        the other process is gone or silent

Each class is mapped once to HTTP (`http_status`, `error_type`, `code`) and once to gRPC
(`grpc_code`, by name, so that this file needs no grpc). An `assert` states what only our own bug
can break.
"""

from typing import ClassVar


class ScissionError(Exception):
    """Root of the tree; the message says what was found and what is accepted."""

    http_status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal_error"
    code: ClassVar[str | None] = None
    grpc_code: ClassVar[str] = "INTERNAL"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        """`param` names the request field at fault; `retry_after_s` goes out as Retry-After."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class ConfigError(ScissionError):
    http_status = 400
    error_type = "invalid_request_error"
    grpc_code = "INVALID_ARGUMENT"


class CheckpointError(ScissionError):
    grpc_code = "FAILED_PRECONDITION"


class RequestError(ScissionError):
    http_status = 400
    error_type = "invalid_request_error"
    grpc_code = "INVALID_ARGUMENT"


class ContextLengthError(RequestError):
    code = "context_length_exceeded"
    grpc_code = "OUT_OF_RANGE"


class UnsupportedError(RequestError):
    code = "unsupported_parameter"
    grpc_code = "UNIMPLEMENTED"


class ModelNotFoundError(RequestError):
    http_status = 404
    error_type = "not_found_error"
    code = "model_not_found"
    grpc_code = "NOT_FOUND"


class PayloadTooLargeError(RequestError):
    http_status = 413
    code = "payload_too_large"


class MediaTypeError(RequestError):
    http_status = 415
    code = "unsupported_media_type"


class CapacityError(ScissionError):
    http_status = 429
    error_type = "rate_limit_error"
    code = "no_capacity"
    grpc_code = "RESOURCE_EXHAUSTED"


class UnavailableError(ScissionError):
    http_status = 503
    error_type = "service_unavailable"
    code = "service_unavailable"
    grpc_code = "UNAVAILABLE"


class DeadlineError(ScissionError):
    http_status = 504
    error_type = "timeout"
    code = "timeout"
    grpc_code = "DEADLINE_EXCEEDED"


class CancelledError(ScissionError):
    http_status = 499
    error_type = "cancelled"
    grpc_code = "CANCELLED"


class EngineError(ScissionError):
    error_type = "engine_error"


class LayoutMismatchError(ScissionError):
    http_status = 409
    error_type = "layout_mismatch"
    grpc_code = "FAILED_PRECONDITION"


class TransferError(ScissionError):
    http_status = 502
    error_type = "transfer_error"
    grpc_code = "ABORTED"


class WireError(TransferError):
    grpc_code = "DATA_LOSS"


class PeerLostError(TransferError):
    grpc_code = "UNAVAILABLE"
