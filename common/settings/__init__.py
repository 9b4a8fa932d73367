"""The one reader of flags, environment and file.

A setting's value comes from the first of: its flag (`--max-num-seqs 8`), its variable
(`SCISSION_MAX_NUM_SEQS=8`), the YAML file of `--config` (`max-num-seqs: 8`), its default. All
processes know all settings, so that one file or one set of flags serves them all.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from scission.common import config
from scission.common.curve_keys import load_curve_keys
from scission.common.errors import ConfigError
from scission.common.model_source import resolve_model
from scission.common.settings.parse import parser_of
from scission.common.settings.table import (
    ACCEPTED_SWITCHES,
    BY_NAME,
    CONFIGS,
    ENVIRONMENT_PREFIX,
    SECTIONS,
    SETTINGS,
    UNSUPPORTED,
    Setting,
    Unsupported,
)
from scission.common.types import Role

CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"


@dataclass(frozen=True, slots=True)
class Sourced:
    """A value, as its flag, variable or file gave it, and where that was."""

    value: Any
    source: str  # "--port", "SCISSION_PORT", "FILE: port" or "default"

    @property
    def is_default(self) -> bool:
        return self.source == "default"


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings' values; every one is of its type, not yet checked against its neighbours."""

    values: Mapping[str, Sourced] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name].value

    def with_values(self, source: str, **changes: Any) -> "Settings":
        """The same with some values replaced; they are passed on to child processes."""
        unknown = changes.keys() - BY_NAME.keys()
        assert not unknown, unknown
        return Settings(
            {**self.values, **{name: Sourced(value, source) for name, value in changes.items()}}
        )

    def to_flags(self) -> list[str]:
        """Flags that give another process these values, whatever its environment says."""
        flags: list[str] = []
        for setting in SETTINGS:
            sourced = self.values[setting.name]
            if sourced.is_default or setting.section == "serve":
                continue
            if setting.is_switch:
                negative = "--no-" + setting.flag.removeprefix("--")
                flags.append(setting.flag if sourced.value else negative)
            elif setting.is_list:
                flags += [f"{setting.flag}={item}" for item in sourced.value]
            else:
                flags.append(f"{setting.flag}={'none' if sourced.value is None else sourced.value}")
        return flags

    def section(self, name: str) -> dict[str, Any]:
        """field -> value of one section, for its dataclass."""
        return {
            setting.field: self.values[setting.name].value
            for setting in SETTINGS
            if setting.section == name
        }


def read_settings(
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Path | None = None,
) -> Settings:
    """Layer flags over environment over file over defaults.

    Args:
        flags: name -> text, tuple of texts or bool, of the flags that were given, unsupported
            ones included.
        environment: `os.environ`.
        file: YAML; None: what SCISSION_CONFIG names, if it does.

    Raises:
        ConfigError: a value is not of its type, the file has an unknown key, or something is asked
            for that is not served.
    """
    if file is None and environment.get(CONFIG_VARIABLE):
        file = Path(environment[CONFIG_VARIABLE])
    file_values = _read_file(file) if file else {}
    known = [(str(item.name), item.flag, item.variable) for item in SETTINGS]
    known += [(item.name, item.flag, item.variable) for item in UNSUPPORTED]
    given: dict[str, Sourced] = {}
    for name, flag, variable in known:
        if name in flags:
            given[name] = Sourced(flags[name], flag)
        elif environment.get(variable, "") != "":
            given[name] = Sourced(environment[variable], variable)
        elif name in file_values:
            given[name] = Sourced(file_values[name], f"{file}: {name}")
    for unsupported in UNSUPPORTED:
        if unsupported.name in given:
            _refuse(unsupported, given[unsupported.name])
    return Settings(
        {
            setting.name: _parse(setting, given[setting.name])
            if setting.name in given
            else Sourced(setting.default, "default")
            for setting in SETTINGS
        }
    )


def build_config(
    role: Role, settings: Settings
) -> config.GatewayConfig | config.PrefillConfig | config.DecodeConfig:
    """The checked config of one process. A model that is no folder yet is downloaded or written.

    Raises:
        ConfigError: a value is out of its bounds, or two do not go together.
    """
    config_type = CONFIGS[role]
    sections = {item.name for item in fields(config_type)}
    pieces: dict[str, Any] = {
        name: SECTIONS[name](**settings.section(name))
        for name in sections - {"model", "transfer", "endpoint"}
    }
    if "endpoint" in sections:
        endpoint = config.EndpointOptions(
            **settings.section("endpoint"), shutdown_timeout_s=settings["shutdown_timeout"]
        )
        pieces["endpoint"] = endpoint = replace(
            endpoint, advertise_host=_advertised_host(endpoint, pieces["discovery"])
        )
        pieces["transfer"] = _transfer_options(role, settings, endpoint)
    # last, since it may take minutes: everything else has been found right by then
    model = settings.section("model")
    folder, name = resolve_model(settings["model"])
    if not model["served_model_name"]:
        model["served_model_name"] = (name,)
    pieces["model"] = config.ModelOptions(folder, **model)
    built = config_type(**pieces)
    assert isinstance(built, config.GatewayConfig | config.PrefillConfig | config.DecodeConfig)
    return built


def check_settings(settings: Settings) -> None:
    """Check every section, as all processes of a stack will, before one is started.

    Raises:
        ConfigError: a value is out of its bounds, or two do not go together.
    """
    for name, section in SECTIONS.items():
        values = settings.section(name)
        section(Path(), **values) if name == "model" else section(**values)
    if settings["transfer_curve_dir"] is not None:
        load_curve_keys(settings["transfer_curve_dir"], Role.DECODE)


def describe_settings(settings: Settings) -> str:
    """One line a setting: name, value, where the value came from."""
    rows = [(name, sourced.value, sourced.source) for name, sourced in settings.values.items()]
    shown = [(name, "" if value is None else _show(value), source) for name, value, source in rows]
    widths = [max(len(row[column]) for row in shown) for column in (0, 1)]
    return "\n".join(
        f"{name:{widths[0]}}  {value:{widths[1]}}  {source}" for name, value, source in shown
    )


def closest(name: str, candidates: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing when no candidate is near."""
    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _show(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: {path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} must map settings to values")
    known = BY_NAME.keys() | {item.name for item in UNSUPPORTED} | set(ACCEPTED_SWITCHES)
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: no setting is called {key!r}{closest(name, known)}")
        values[name] = value
    return values


def _refuse(unsupported: Unsupported, given: Sourced) -> None:
    value = str(given.value)
    if unsupported.is_switch:
        if value.lower() in ("false", "0", "no", "off"):
            return
    elif value in unsupported.accepted:
        return
    accepted = f" other than {' or '.join(unsupported.accepted)}" if unsupported.accepted else ""
    raise ConfigError(f"{given.source}{accepted} is not supported: {unsupported.why}")


def _parse(setting: Setting, given: Sourced) -> Sourced:
    value = given.value
    try:
        if value is None or (value == "none" and setting.is_optional):
            return Sourced(None if not setting.is_list else (), given.source)
        if setting.is_list:
            if isinstance(value, str):
                value = value.split(",")
            items = tuple(str(item).strip() for item in value)
            return Sourced(tuple(item for item in items if item), given.source)
        if isinstance(value, list | tuple | dict):
            raise ValueError("expected one value")
        return Sourced(parser_of(setting.type)(str(value).strip()), given.source)
    except ValueError as error:
        raise ConfigError(f"{given.source}: {error}, got {value!r}") from None


def _advertised_host(endpoint: config.EndpointOptions, discovery: config.DiscoveryOptions) -> str:
    # gRPC is slow to import, and help and checks do not want it
    from scission.common.rpc import advertised_host

    gateway, _ = config.parse_address(discovery.gateways[0])
    return advertised_host(endpoint.host, endpoint.advertise_host, gateway)


def _transfer_options(
    role: Role, settings: Settings, endpoint: config.EndpointOptions
) -> config.TransferOptions:
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    key_dir = settings["transfer_curve_dir"]
    return config.TransferOptions(
        **settings.section("transfer"),
        bind=f"tcp://{host}:{settings['transfer_port'] or '*'}",
        advertise_host=endpoint.advertise_host,
        curve=load_curve_keys(key_dir, role) if key_dir else None,
    )
