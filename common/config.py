"""The typed config of every process: frozen, checked whole when made, passed down in pieces.

One dataclass serves one concern; `GatewayConfig`, `PrefillConfig` and `DecodeConfig` are what the
mains are given. Values come from flags, environment and file (settings.py). Imports no torch.

    PrefillConfig, DecodeConfig  model cache scheduler transfer discovery endpoint log
    GatewayConfig                model chat http admission routing discovery registry log
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scission.common.errors import ConfigError
from scission.common.transfer.options import TransferOptions

__all__ = [
    "AdmissionOptions",
    "CacheOptions",
    "ChatOptions",
    "DecodeConfig",
    "DiscoveryOptions",
    "EndpointOptions",
    "GatewayConfig",
    "HttpOptions",
    "LogOptions",
    "ModelOptions",
    "PrefillConfig",
    "RegistryOptions",
    "RoutingOptions",
    "SchedulerOptions",
    "TransferOptions",
]

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
ResolvedDtype = Literal["float32", "bfloat16"]
Numerics = Literal["exact", "deployed"]
LoadFormat = Literal["auto", "dummy"]
RoutingPolicy = Literal["cache_aware", "power_of_two", "round_robin", "random"]
ToolCallParser = Literal[
    "auto", "none", "deepseek_v4", "hermes", "mistral", "qwen3_coder", "step3p5"
]
ReasoningParser = Literal["auto", "none", "deepseek_v4", "mistral", "qwen3", "step3p5"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how it computes. `model` is a folder: names are resolved before."""

    model: Path
    served_model_name: tuple[
        str, ...
    ] = ()  # empty: the folder's name; the first is the one answered
    tokenizer: Path | None = None  # folder of the tokenizer; None: the model's
    device: Device = "auto"  # auto: cuda (HIP too) where there is one, else cpu
    dtype: Dtype = "auto"  # auto: float32 on a CPU and for exact numerics, bfloat16 on a GPU
    numerics: Numerics = (
        "deployed"  # exact: the mathematical model, without rounding of activations
    )
    max_model_len: int | None = None  # tokens; None: what the model was made for
    load_format: LoadFormat = "auto"  # dummy: random weights in the checkpoint's formats and shapes
    seed: int = 0  # of dummy weights
    threads: int | None = None  # of torch on a CPU; None: torch's own choice

    def __post_init__(self) -> None:
        _require_positive("max_model_len", self.max_model_len)
        _require_positive("threads", self.threads)
        if self.numerics == "exact" and self.dtype not in ("auto", "float32"):
            raise ConfigError(f"numerics exact computes in float32, got dtype {self.dtype}")
        if any(not name for name in self.served_model_name):
            raise ConfigError("served_model_name must not be empty")

    @property
    def names(self) -> tuple[str, ...]:
        """The names that requests may use; the first is the one that answers carry."""
        return self.served_model_name or (self.model.resolve().name,)

    def dtype_on(self, device_type: str) -> ResolvedDtype:
        """The dtype of activations and cache on a device type of torch (`cpu`, `cuda`)."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if device_type == "cpu" or self.numerics == "exact" else "bfloat16"


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """How much state a worker holds."""

    block_size: int = 128  # tokens
    num_blocks: int | None = None  # None: what `memory_bytes` or `memory_utilization` gives
    memory_bytes: int | None = None  # of state; None: what `memory_utilization` gives
    memory_utilization: float = (
        0.9  # of a GPU's memory, weights included; a CPU worker takes 1 GiB of state
    )
    enable_prefix_caching: bool = True  # prefill only
    snapshot_bytes: int = 256 << 20  # of window and overlap state kept for prefix hits

    def __post_init__(self) -> None:
        if self.block_size < 128 or self.block_size % 128:
            raise ConfigError(f"block_size must be a multiple of 128, got {self.block_size}")
        _require_positive("num_blocks", self.num_blocks)
        _require_positive("memory_bytes", self.memory_bytes)
        if not 0 < self.memory_utilization <= 1:
            raise ConfigError(
                f"memory_utilization must lie in (0, 1], got {self.memory_utilization}"
            )
        if self.snapshot_bytes < 0:
            raise ConfigError(f"snapshot_bytes must not be negative, got {self.snapshot_bytes}")


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """What one step takes, and how much may wait. At a bound a worker refuses."""

    # prompt tokens a prefill step computes; None: as many as the device is best at
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 128  # sequences that run (decode) or are computed at once (prefill)
    max_queued: int = 1024  # requests accepted but not scheduled
    growth_tokens: int = 1024  # decode: room reserved for output at admission, at most
    retain_lease_s: float = 30.0  # prefill: finished state waits this long for a GRANT
    commit_lease_s: float = 1.0  # prefill: and is kept this long after COMMIT
    reserve_wait_s: float = 1.0  # decode: a RESERVE waits this long for its Submit
    inject_bytes_per_step: int = 64 << 20  # decode: of arrived state, scattered between two steps
    cuda_graphs: bool = True  # decode: steps are captured graphs, where the model's can be

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_queued",
            "growth_tokens",
            "inject_bytes_per_step",
            "retain_lease_s",
            "commit_lease_s",
            "reserve_wait_s",
        ):
            _require_positive(name, getattr(self, name))
        if self.max_num_batched_tokens is not None:
            _require_positive("max_num_batched_tokens", self.max_num_batched_tokens)

    def batched_tokens_on(self, device_type: str) -> int:
        """`max_num_batched_tokens` on such a device: a GPU's experts want many rows each."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return 8192 if device_type == "cuda" else 2048


@dataclass(frozen=True, slots=True)
class DiscoveryOptions:
    """How workers and gateways find each other, and when silence is death."""

    gateways: tuple[str, ...] = (
        "127.0.0.1:8010",
    )  # name:port; registers at every address of each name
    heartbeat_s: float = 1.0  # a worker's to each gateway
    resolve_s: float = 5.0  # names are resolved anew this often
    beat_s: float = 0.5  # an engine loop's sign of life on each event stream
    silence_s: float = 2.0  # without one, the worker's attempts end

    def __post_init__(self) -> None:
        for name in ("heartbeat_s", "resolve_s", "beat_s", "silence_s"):
            _require_positive(name, getattr(self, name))
        if self.silence_s <= self.beat_s:
            raise ConfigError(
                f"silence_s must be longer than beat_s, got {self.silence_s} and {self.beat_s}"
            )
        if not self.gateways:
            raise ConfigError("at least one gateway is needed")
        for address in self.gateways:
            parse_address(address)


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """Where a worker is reached. Port 0 takes a free one; what is taken is told to the gateways."""

    host: str = "127.0.0.1"  # bound by gRPC, metrics and transfer
    advertise_host: str | None = (
        None  # told to peers; None: host, or this machine's name for 0.0.0.0
    )
    grpc_port: int = 0
    metrics_port: int = 0
    shutdown_timeout_s: float = (
        30.0  # running requests may finish for this long after SIGTERM; 0 aborts them
    )

    def __post_init__(self) -> None:
        _require_port("grpc_port", self.grpc_port)
        _require_port("metrics_port", self.metrics_port)
        _require_not_negative("shutdown_timeout_s", self.shutdown_timeout_s)


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """The HTTP server that clients speak to."""

    host: str = "127.0.0.1"
    port: int = 8000
    # a second one, this gateway's alone; `port` may then be shared with others of this host
    own_port: int | None = None
    root_path: str = ""  # behind a proxy that strips a prefix
    allowed_origins: tuple[str, ...] = ()  # CORS; empty: none
    max_body_bytes: int = 16 << 20
    max_logprobs: int = 20  # alternatives a token, at most
    max_choices: int = 128  # n, and prompts of one completion request, at most
    request_timeout_s: float = 600.0  # a request's deadline
    keep_alive_s: float = 15.0  # a comment on a silent SSE stream this often
    access_log: bool = False  # one line a request
    shutdown_timeout_s: float = (
        30.0  # open streams may finish for this long after SIGTERM; 0 aborts them
    )

    def __post_init__(self) -> None:
        _require_port("port", self.port)
        if self.own_port is not None:
            _require_port("own_port", self.own_port)
        for name in ("max_body_bytes", "max_choices", "request_timeout_s", "keep_alive_s"):
            _require_positive(name, getattr(self, name))
        _require_not_negative("max_logprobs", self.max_logprobs)
        _require_not_negative("shutdown_timeout_s", self.shutdown_timeout_s)
        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path must start with /, got {self.root_path!r}")


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How chats become prompts and completions become messages, where the model leaves a choice."""

    template: Path | None = None  # a Jinja file; None: the checkpoint's own
    tool_call_parser: ToolCallParser = "auto"  # auto: what the template shows
    reasoning_parser: ReasoningParser = "auto"


@dataclass(frozen=True, slots=True)
class AdmissionOptions:
    """What the gateway takes on before it answers 429."""

    max_inflight: int = 1024  # requests admitted and not finished
    max_inflight_tokens: int = 8 << 20  # prompt tokens of those
    retry_after_s: float = 1.0  # told to the refused
    max_attempts: int = 4  # of one request
    max_engine_deaths: int = 2  # a request that was there at this many is an error

    def __post_init__(self) -> None:
        for name in (
            "max_inflight",
            "max_inflight_tokens",
            "retry_after_s",
            "max_attempts",
            "max_engine_deaths",
        ):
            _require_positive(name, getattr(self, name))


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """How a (prefill, decode) pair is picked among those with equal layouts."""

    policy: RoutingPolicy = "cache_aware"


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """Where the gateway's gRPC registry listens for workers."""

    host: str = "127.0.0.1"
    port: int = 8010

    def __post_init__(self) -> None:
        _require_port("registry_port", self.port)


@dataclass(frozen=True, slots=True)
class LogOptions:
    level: LogLevel = "info"
    format: LogFormat = "text"


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    model: ModelOptions
    chat: ChatOptions = field(default_factory=ChatOptions)
    http: HttpOptions = field(default_factory=HttpOptions)
    admission: AdmissionOptions = field(default_factory=AdmissionOptions)
    routing: RoutingOptions = field(default_factory=RoutingOptions)
    discovery: DiscoveryOptions = field(default_factory=DiscoveryOptions)
    registry: RegistryOptions = field(default_factory=RegistryOptions)
    log: LogOptions = field(default_factory=LogOptions)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """What prefill and decode share; their schedulers read other parts of `scheduler`."""

    model: ModelOptions
    cache: CacheOptions = field(default_factory=CacheOptions)
    scheduler: SchedulerOptions = field(default_factory=SchedulerOptions)
    transfer: TransferOptions = field(default_factory=TransferOptions)
    discovery: DiscoveryOptions = field(default_factory=DiscoveryOptions)
    endpoint: EndpointOptions = field(default_factory=EndpointOptions)
    log: LogOptions = field(default_factory=LogOptions)


@dataclass(frozen=True, slots=True)
class PrefillConfig(WorkerConfig):
    pass


@dataclass(frozen=True, slots=True)
class DecodeConfig(WorkerConfig):
    pass


def parse_address(address: str) -> tuple[str, int]:
    """`name:port`, `1.2.3.4:port` or `[::1]:port` as (host, port).

    Raises:
        ConfigError: it is none of those.
    """
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
        raise ConfigError(f"an address is HOST:PORT, got {address!r}")
    return host, int(port)


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ConfigError(f"{name} must be positive, got {value}")


def _require_not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ConfigError(f"{name} must not be negative, got {value}")


def _require_port(name: str, value: int) -> None:
    if not 0 <= value <= MAX_PORT:
        raise ConfigError(f"{name} must lie in 0..{MAX_PORT}, got {value}")
