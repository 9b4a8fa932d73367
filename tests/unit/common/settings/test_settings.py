import dataclasses
from pathlib import Path

import click.testing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scission.common.command_line import role_command, settings_command
from scission.common.config import DecodeConfig, GatewayConfig
from scission.common.curve_keys import write_curve_keys
from scission.common.errors import ConfigError
from scission.common.settings import (
    Settings,
    build_config,
    check_settings,
    describe_settings,
    read_settings,
)
from scission.common.settings.parse import parser_of
from scission.common.settings.table import CONFIGS, SECTIONS, SETTINGS
from scission.common.types import Role

# filled from other settings, or fixed
DERIVED = {
    "model.model",
    "transfer.bind",
    "transfer.advertise_host",
    "transfer.curve",
    "transfer.connect_timeout_s",
    "transfer.max_transfers",
    "transfer.max_reships",
    "endpoint.shutdown_timeout_s",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def read(*arguments: str, environment: dict[str, str] | None = None) -> Settings:
    """The settings that a command line and an environment give."""
    read_to: list[Settings] = []

    def run(settings: Settings) -> int:
        read_to.append(settings)
        return 0

    command = settings_command("serve", "", run, SECTIONS)
    result = click.testing.CliRunner().invoke(command, arguments, env=environment)
    if result.exit_code:
        raise ConfigError(f"{result.exit_code}: {result.output}")
    return read_to[0]


def test_every_field_of_every_config_has_a_setting() -> None:
    covered = {setting.path for setting in SETTINGS} | DERIVED
    sections = {f.name for config in CONFIGS.values() for f in dataclasses.fields(config)}
    missing = {
        f"{section}.{field.name}"
        for section in sections
        for field in dataclasses.fields(SECTIONS[section])
    } - covered
    assert missing == set()


def test_every_default_is_a_legal_value() -> None:
    check_settings(read_settings({}, {}))


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "scission.yaml"
    file.write_text("port: 1\nmax-num-seqs: 2\nblock_size: 256\n")
    environment = {"SCISSION_PORT": "3", "SCISSION_MAX_NUM_SEQS": "4"}
    settings = read("--port", "5", f"--config={file}", environment=environment)
    assert [settings[name] for name in ("port", "max_num_seqs", "block_size", "seed")] == [
        5,
        4,
        256,
        0,
    ]
    sources = [settings.values[name].source for name in ("port", "max_num_seqs", "block_size")]
    assert sources == ["--port", "SCISSION_MAX_NUM_SEQS", f"{file}: block_size"]
    assert settings.values["seed"].is_default


def test_print_config_shows_values_and_sources() -> None:
    shown = describe_settings(read("--port", "5", environment={"SCISSION_SEED": "7"}))
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert rows["port"] == ["5", "--port"]
    assert rows["seed"] == ["7", "SCISSION_SEED"]
    assert rows["block_size"] == ["128", "default"]


def test_children_read_back_what_the_supervisor_read(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "scission.yaml"
    file.write_text("served-model-name: [a, b]\nenable-prefix-caching: false\n")
    settings = read(
        str(model), "--max-model-len=4K", "--transfer-arena-dir=none", f"--config={file}"
    )
    # a variable that contradicts the file must not win in the child
    environment = {"SCISSION_ENABLE_PREFIX_CACHING": "1", "SCISSION_SERVED_MODEL_NAME": "c"}
    child = read(*settings.to_flags(), environment=environment)
    assert build_config(Role.DECODE, child) == build_config(Role.DECODE, settings)
    assert child["transfer_arena_dir"] is None
    assert child["served_model_name"] == ("a", "b") and child["max_model_len"] == 4096


def test_other_servers_spellings_mean_the_same(model: Path) -> None:
    settings = read(
        f"--model-path={model}",
        "--context-length=99",
        "--max-running-requests=3",
        "--chunked-prefill-size=64",
        "--mem-fraction-static=0.5",
        "--disable-radix-cache",
        "--trust-remote-code",
        "-tp",
        "1",
    )
    config = build_config(Role.PREFILL, settings)
    assert not isinstance(config, GatewayConfig)
    assert config.model.max_model_len == 99
    assert config.scheduler.max_num_seqs == 3
    assert config.scheduler.max_num_batched_tokens == 64
    assert config.cache.memory_utilization == 0.5
    assert not config.cache.enable_prefix_caching


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-num-seq", "3"], "--max-num-seqs"),
        (["-tp", "2"], "--tensor-parallel-size other than 1 is not supported"),
        (["--api-key", "k"], "--api-key is not supported: put a proxy"),
        (["--ssl-keyfile", "k"], "--ssl-keyfile is not supported"),
        (["--enable-expert-parallel"], "--enable-expert-parallel is not supported"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype other than auto is not supported"),
        (["--dtype", "half"], "--dtype: expected auto, float32 or bfloat16, got 'half'"),
        (["--port", "80x"], "--port: expected a whole number"),
        (["--config", "/no/such/file"], "--config: /no/such/file cannot be read"),
        (["a", "--model", "b"], "the model is given twice"),
        (["--max-model-len", "1", "--context-length", "2"], "given twice"),
    ],
)
def test_a_wrong_flag_is_named_and_exits_with_2(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(*arguments)
    assert raised.value.message.startswith("2: ")
    assert says in " ".join(raised.value.message.split())
    assert "Traceback" not in raised.value.message


def test_a_key_asked_for_by_variable_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="SCISSION_API_KEY is not supported"):
        read(environment={"SCISSION_API_KEY": "secret"})


def test_an_unknown_key_of_the_file_is_named_with_its_neighbour(tmp_path: Path) -> None:
    file = tmp_path / "scission.yaml"
    file.write_text("max-num-seq: 3\n")
    with pytest.raises(ConfigError, match=r"'max-num-seq' \(did you mean max_num_seqs\?\)"):
        read_settings({}, {}, file)


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "a: [", "port: [1, 2]"])
def test_a_file_of_another_shape_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "scission.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        read_settings({}, {}, file)


@given(st.integers(0, 10**6), st.sampled_from(["", "k", "M", "GiB", "Ki"]))
def test_sizes_take_suffixes(number: int, suffix: str) -> None:
    factor = {"": 1, "k": 1000, "M": 1 << 20, "GiB": 1 << 30, "Ki": 1 << 10}[suffix]
    assert parser_of(int)(f"{number}{suffix}") == number * factor


@pytest.mark.parametrize("text", ["", "k", "1kk", "1.5", "0x10", "1 000", "9B9"])
def test_other_numbers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        parser_of(int)(text)


def test_a_gateway_ignores_the_workers_settings(model: Path) -> None:
    config = build_config(Role.GATEWAY, read(str(model), "--max-num-seqs=3", "--port=81"))
    assert isinstance(config, GatewayConfig)
    assert config.http.port == 81
    assert config.model.names == ("tiny",)


def test_one_shutdown_timeout_serves_gateway_and_workers(model: Path) -> None:
    settings = read(str(model), "--shutdown-timeout=7")
    gateway, decode = build_config(Role.GATEWAY, settings), build_config(Role.DECODE, settings)
    assert isinstance(gateway, GatewayConfig) and isinstance(decode, DecodeConfig)
    assert gateway.http.shutdown_timeout_s == decode.endpoint.shutdown_timeout_s == 7


def test_transfer_listens_and_is_reached_where_the_worker_is(model: Path) -> None:
    settings = read(
        str(model), "--worker-host=0.0.0.0", "--advertise-host=worker-7", "--transfer-port=99"
    )
    config = build_config(Role.DECODE, settings)
    assert isinstance(config, DecodeConfig)
    assert config.transfer.bind == "tcp://0.0.0.0:99"
    assert config.transfer.advertise_host == config.endpoint.advertise_host == "worker-7"


def test_each_role_reads_its_own_curve_keys(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    write_curve_keys(keys)
    write_curve_keys(keys)  # again: they stay
    settings = read(str(model), f"--transfer-curve-dir={keys}")
    prefill, decode = build_config(Role.PREFILL, settings), build_config(Role.DECODE, settings)
    assert not isinstance(prefill, GatewayConfig) and not isinstance(decode, GatewayConfig)
    assert prefill.transfer.curve is not None and decode.transfer.curve is not None
    assert prefill.transfer.curve.server == decode.transfer.curve.public
    assert decode.transfer.curve.allowed == {prefill.transfer.curve.public}
    assert (keys / "decode.secret").stat().st_mode & 0o777 == 0o600
    (keys / "prefill.secret").unlink()
    with pytest.raises(ConfigError, match=r"prefill\.secret"):
        build_config(Role.PREFILL, settings)


@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_folder_that_is_not_there_is_no_hub_id(model: str) -> None:
    with pytest.raises(ConfigError, match="there is no model folder"):
        build_config(Role.GATEWAY, read(model))


def test_a_main_is_given_its_config_and_its_status_is_the_exit_code(model: Path) -> None:
    given: list[object] = []

    def run(config: object) -> int:
        given.append(config)
        return 3

    command = role_command(Role.DECODE, "", lambda: run)
    result = click.testing.CliRunner().invoke(command, [str(model)])
    assert result.exit_code == 3 and isinstance(given[0], DecodeConfig)
