from pathlib import Path

import pytest

from scission.common.config import (
    CacheOptions,
    DiscoveryOptions,
    EndpointOptions,
    HttpOptions,
    ModelOptions,
    SchedulerOptions,
    parse_address,
)
from scission.common.errors import ConfigError


def test_exact_numerics_means_float32_everywhere() -> None:
    options = ModelOptions(Path("m"), numerics="exact")
    assert options.dtype_on("cuda") == options.dtype_on("cpu") == "float32"
    with pytest.raises(ConfigError, match="float32"):
        ModelOptions(Path("m"), numerics="exact", dtype="bfloat16")


def test_auto_dtype_follows_the_device() -> None:
    options = ModelOptions(Path("m"))
    assert (options.dtype_on("cpu"), options.dtype_on("cuda")) == ("float32", "bfloat16")


def test_a_model_is_served_under_its_folders_name_unless_told(tmp_path: Path) -> None:
    assert ModelOptions(tmp_path / "tiny").names == ("tiny",)
    assert ModelOptions(tmp_path, served_model_name=("a", "b")).names == ("a", "b")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: CacheOptions(block_size=100), "block_size.*128.*100"),
        (lambda: CacheOptions(memory_utilization=1.5), "memory_utilization.*1.5"),
        (lambda: SchedulerOptions(max_num_seqs=0), "max_num_seqs.*0"),
        (lambda: EndpointOptions(grpc_port=70000), "grpc_port.*70000"),
        (lambda: HttpOptions(root_path="api"), "root_path.*'api'"),
        (lambda: HttpOptions(request_timeout_s=float("nan")), "request_timeout_s.*nan"),
        (lambda: DiscoveryOptions(silence_s=0.4), "silence_s.*0.4"),
        (lambda: DiscoveryOptions(gateways=("gateway",)), "HOST:PORT.*'gateway'"),
        (lambda: DiscoveryOptions(gateways=()), "at least one"),
        (lambda: ModelOptions(Path("m"), max_model_len=0), "max_model_len.*0"),
    ],
)
def test_an_error_says_what_was_given(make: object, names: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=names):
        make()


def test_addresses_of_all_kinds_are_split() -> None:
    assert parse_address("gateway:8010") == ("gateway", 8010)
    assert parse_address("[::1]:8010") == ("::1", 8010)
    for wrong in ("gateway", ":8010", "gateway:", "gateway:99999", "gateway:x"):
        with pytest.raises(ConfigError):
            parse_address(wrong)
