"""Every setting there is: how it is spelled and which field of the config it fills.

What a setting may be is said by that field, in common/config.py. Flags of other servers for things
that are not served stand here too, so that they are refused by name.
"""

import types
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NewType

from scission.common import config
from scission.common.errors import ConfigError
from scission.common.types import Role

Name = NewType("Name", str)  # of a setting: max_num_seqs

ENVIRONMENT_PREFIX = "SCISSION_"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How many processes `scission serve` starts."""

    prefill: int = 1
    decode: int = 1
    num_gateways: int = 1

    def __post_init__(self) -> None:
        for name in ("prefill", "decode", "num_gateways"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Settings that become something else before a config is made."""

    model: str | None = None  # a folder or a hub id; None: the bundled model
    transfer_port: int = 0
    transfer_curve_dir: Path | None = None


SECTIONS: dict[str, type] = {
    "serve": ServeOptions,
    "source": SourceOptions,
    "model": config.ModelOptions,
    "cache": config.CacheOptions,
    "scheduler": config.SchedulerOptions,
    "transfer": config.TransferOptions,
    "discovery": config.DiscoveryOptions,
    "endpoint": config.EndpointOptions,
    "chat": config.ChatOptions,
    "http": config.HttpOptions,
    "admission": config.AdmissionOptions,
    "routing": config.RoutingOptions,
    "registry": config.RegistryOptions,
    "log": config.LogOptions,
}
CONFIGS: dict[Role, type] = {
    Role.GATEWAY: config.GatewayConfig,
    Role.PREFILL: config.PrefillConfig,
    Role.DECODE: config.DecodeConfig,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """`path` is section.field of the config; `aliases` are other servers' spellings."""

    name: Name
    path: str
    help: str
    aliases: tuple[str, ...] = ()
    negative_aliases: tuple[str, ...] = ()  # of a switch: they turn it off

    @property
    def section(self) -> str:
        return self.path.partition(".")[0]

    @property
    def field(self) -> str:
        return self.path.partition(".")[2]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def type(self) -> Any:
        """The annotation, `| None` removed."""
        if self.is_optional:
            return next(arg for arg in typing.get_args(self._annotation) if arg is not type(None))
        return self._annotation

    @property
    def is_optional(self) -> bool:
        """`none` is a value of it."""
        return typing.get_origin(self._annotation) in (typing.Union, types.UnionType)

    @property
    def _annotation(self) -> Any:
        return typing.get_type_hints(SECTIONS[self.section])[self.field]

    @property
    def is_switch(self) -> bool:
        return self.type is bool

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.type) is tuple

    @property
    def metavar(self) -> str:
        if typing.get_origin(self.type) is Literal:
            return "|".join(typing.get_args(self.type))
        if self.field.endswith("_s"):
            return "SECONDS"
        if "bytes" in self.field:
            return "BYTES"
        return {int: "N", float: "X", Path: "PATH"}.get(self.type, "TEXT")

    @property
    def default(self) -> Any:
        for item in fields(SECTIONS[self.section]):
            if item.name == self.field:
                return None if item.default is MISSING else item.default
        raise AssertionError(self.path)


def _setting(
    path: str,
    help: str,
    name: str = "",
    aliases: tuple[str, ...] = (),
    negative_aliases: tuple[str, ...] = (),
) -> Setting:
    own_name = Name(name or path.partition(".")[2])
    return Setting(own_name, path, help, aliases, negative_aliases)


SETTINGS: tuple[Setting, ...] = (
    _setting("serve.prefill", "prefill workers that `serve` starts"),
    _setting("serve.decode", "decode workers that `serve` starts"),
    _setting(
        "serve.num_gateways",
        "gateways that `serve` starts, on one port",
        aliases=("--api-server-count",),
    ),
    _setting(
        "source.model",
        "folder or hub id of the model; without one, the bundled model",
        aliases=("--model-path",),
    ),
    _setting("model.served_model_name", "name that requests use; several may be given"),
    _setting("model.tokenizer", "folder of the tokenizer", aliases=("--tokenizer-path",)),
    _setting("model.device", "where the model runs"),
    _setting("model.dtype", "of activations and cache"),
    _setting("model.numerics", "deployed: round as the model was trained; exact: do not round"),
    _setting(
        "model.max_model_len", "longest prompt plus output, tokens", aliases=("--context-length",)
    ),
    _setting("model.load_format", "dummy: random weights in the model's formats"),
    _setting("model.seed", "of dummy weights", aliases=("--random-seed",)),
    _setting("model.threads", "CPU threads of each worker's model"),
    _setting("cache.block_size", "tokens a block of cache holds", aliases=("--page-size",)),
    _setting("cache.num_blocks", "blocks of cache", "num_gpu_blocks_override"),
    _setting("cache.memory_bytes", "memory for the cache, such as 2GiB", "kv_cache_memory_bytes"),
    _setting(
        "cache.memory_utilization",
        "share of a GPU's memory to use",
        "gpu_memory_utilization",
        aliases=("--mem-fraction-static",),
    ),
    _setting(
        "cache.enable_prefix_caching",
        "reuse the state of prompts that start alike",
        negative_aliases=("--disable-radix-cache",),
    ),
    _setting("cache.snapshot_bytes", "memory for prefix snapshots", "prefix_snapshot_bytes"),
    _setting(
        "scheduler.max_num_batched_tokens",
        "prompt tokens a prefill step computes; without it 8192 on a GPU, 2048 on a CPU",
        aliases=("--chunked-prefill-size",),
    ),
    _setting(
        "scheduler.max_num_seqs",
        "sequences a worker runs at once",
        aliases=("--max-running-requests",),
    ),
    _setting(
        "scheduler.max_queued",
        "requests that may wait on a worker",
        "max_queued_requests",
    ),
    _setting("scheduler.growth_tokens", "room reserved for output when a decode admits"),
    _setting("scheduler.retain_lease_s", "finished state waits this long for a decode"),
    _setting("scheduler.commit_lease_s", "state is kept this long after the decode has it"),
    _setting("scheduler.reserve_wait_s", "a reservation waits this long for its request"),
    _setting("scheduler.inject_bytes_per_step", "arrived state taken in between two steps"),
    _setting(
        "scheduler.cuda_graphs",
        "on a GPU, decode by captured graphs",
        negative_aliases=("--enforce-eager", "--disable-cuda-graph"),
    ),
    _setting("source.transfer_port", "port on which a decode takes state; 0: a free one"),
    _setting("source.transfer_curve_dir", "folder of CURVE keys (`scission keys`)"),
    _setting(
        "transfer.arena_dir",
        "shared memory that prefill and decode both see",
        "transfer_arena_dir",
    ),
    _setting("transfer.arena_bytes", "of state under way to a decode", "transfer_arena_bytes"),
    _setting("transfer.slot_bytes", "of one message of state", "transfer_slot_bytes"),
    _setting("transfer.window_slots", "messages one hand-off may have under way"),
    _setting("transfer.bulk_sockets", "connections a pair ships state over"),
    _setting("transfer.copy_threads", "copy and hash state at each end of a hand-off"),
    _setting("transfer.stall_s", "without progress: ship again", "transfer_stall_s"),
    _setting("transfer.decide_s", "without progress: give up", "transfer_decide_s"),
    _setting("discovery.gateways", "HOST:PORT of a gateway's registry; repeatable", "gateway"),
    _setting("discovery.heartbeat_s", "between a worker's heartbeats"),
    _setting("discovery.resolve_s", "between look-ups of the gateways' names"),
    _setting("discovery.beat_s", "between an engine's signs of life"),
    _setting("discovery.silence_s", "without a sign of life a worker is dead"),
    _setting("endpoint.host", "address that a worker listens on", "worker_host"),
    _setting("endpoint.advertise_host", "address that a worker is reached at"),
    _setting("endpoint.grpc_port", "a worker's; 0: a free one"),
    _setting("endpoint.metrics_port", "a worker's; 0: a free one"),
    _setting("chat.template", "Jinja file, instead of the checkpoint's", "chat_template"),
    _setting("chat.tool_call_parser", "how tool calls are written; auto: as the template shows"),
    _setting("chat.reasoning_parser", "how thoughts are marked; auto: as the template shows"),
    _setting("http.host", "address that the gateway serves HTTP on"),
    _setting("http.port", "port of it"),
    _setting(
        "http.own_port",
        "another port, of this gateway alone: others may share --port; 0: a free one",
    ),
    _setting("http.root_path", "prefix that a proxy strips"),
    _setting("http.allowed_origins", "origins allowed by CORS; repeatable"),
    _setting("http.max_body_bytes", "of one request"),
    _setting("http.max_logprobs", "alternatives a token"),
    _setting("http.max_choices", "choices or prompts of one request"),
    _setting("http.request_timeout_s", "a request is over after this", "request_timeout"),
    _setting("http.keep_alive_s", "between comments on a silent stream", "sse_keep_alive_interval"),
    _setting("http.access_log", "log one line a request", "enable_log_requests"),
    _setting(
        "http.shutdown_timeout_s",
        "open requests may finish for this long on SIGTERM; 0 aborts them",
        "shutdown_timeout",
    ),
    _setting("admission.max_inflight", "requests the gateway takes on", "max_inflight_requests"),
    _setting("admission.max_inflight_tokens", "prompt tokens of those"),
    _setting("admission.retry_after_s", "told to clients that are turned away"),
    _setting("admission.max_attempts", "of one request, on other workers"),
    _setting("admission.max_engine_deaths", "that one request may be there at"),
    _setting("routing.policy", "how workers are picked", "routing_policy", aliases=("--policy",)),
    _setting("registry.host", "address that the gateway's registry listens on", "registry_host"),
    _setting("registry.port", "port of it", "registry_port"),
    _setting("log.level", "least that is logged", "log_level"),
    _setting("log.format", "of log lines", "log_format"),
)
BY_NAME: dict[str, Setting] = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A flag of other servers for what is not served here: only `accepted` values pass."""

    name: str
    why: str
    accepted: tuple[str, ...] = ()
    is_switch: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENVIRONMENT_PREFIX + self.name.upper()


UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        "tensor_parallel_size",
        "a worker runs on one device",
        ("1",),
        aliases=("-tp", "--tp-size", "--tp"),
    ),
    Unsupported(
        "pipeline_parallel_size",
        "a worker runs on one device",
        ("1",),
        aliases=("-pp", "--pp-size"),
    ),
    Unsupported(
        "data_parallel_size",
        "start more workers instead (--prefill N, --decode N)",
        ("1",),
        aliases=("-dp", "--dp-size"),
    ),
    Unsupported("enable_expert_parallel", "a worker runs on one device", is_switch=True),
    Unsupported("api_key", "put a proxy that checks keys in front of the gateway"),
    Unsupported("ssl_keyfile", "put a proxy that ends TLS in front of the gateway"),
    Unsupported("ssl_certfile", "put a proxy that ends TLS in front of the gateway"),
    Unsupported("ssl_ca_certs", "put a proxy that ends TLS in front of the gateway"),
    Unsupported("uds", "the gateway listens on --host and --port"),
    Unsupported("kv_cache_dtype", "the cache has the model's own formats", ("auto",)),
    Unsupported(
        "quantization",
        "weights are read in the checkpoint's own formats",
        ("auto", "fp8", "deepseek_v4_fp8"),
        aliases=("-q",),
    ),
    Unsupported(
        "trust_request_chat_template", "templates are not taken from requests", is_switch=True
    ),
    Unsupported("speculative_config", "drafting is not served"),
    Unsupported("kv_transfer_config", "prefill and decode always ship state (--transfer-...)"),
    Unsupported("disaggregation_mode", "use `scission prefill` and `scission decode`"),
    Unsupported("prefill_url", "workers register at the gateway (--gateway on the worker)"),
    Unsupported("decode_url", "workers register at the gateway (--gateway on the worker)"),
    Unsupported("enable_lora", "adapters are not served", is_switch=True),
    Unsupported("batch_invariant", "not served", is_switch=True),
    Unsupported("otlp_traces_endpoint", "tracing is not served"),
)
# True of this server whether they are given or not.
ACCEPTED_SWITCHES: tuple[str, ...] = (
    "trust_remote_code",
    "enable_auto_tool_choice",
    "enable_chunked_prefill",
    "disable_log_requests",
    "disable_log_stats",
)
