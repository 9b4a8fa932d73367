"""Commands whose flags are the settings: `serve` and the processes' own mains.

Click finds wrong flags, names the nearest one and exits with 2; values are checked by
common/settings, in the same words as those of the environment and the file.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from scission.common.config import DecodeConfig, GatewayConfig, PrefillConfig
from scission.common.errors import ConfigError, ScissionError
from scission.common.processes import die_with
from scission.common.settings import Settings, build_config, describe_settings, read_settings
from scission.common.settings.table import ACCEPTED_SWITCHES, SETTINGS, UNSUPPORTED, Setting
from scission.common.types import Role

_WORKER = ["source", "model", "cache", "scheduler", "transfer", "discovery", "endpoint", "log"]
_GATEWAY = [
    *("source", "model", "chat", "http", "admission", "routing", "discovery", "registry", "log")
]
SECTIONS_SHOWN: dict[str, list[str]] = {
    "serve": list(dict.fromkeys(["serve", *_GATEWAY, *_WORKER])),
    Role.GATEWAY: _GATEWAY,
    Role.PREFILL: _WORKER,
    Role.DECODE: _WORKER,
}

_NOT_SETTINGS = ("config", "print_config", "parent_pid", "model_argument")
_EPILOG = (
    "A setting may also stand in the environment (SCISSION_MAX_NUM_SEQS=8) or in the file "
    "of --config (max-num-seqs: 8); a flag wins over both. Settings of the other processes are "
    "accepted, so that one set serves them all."
)


def settings_command(
    name: str,
    help: str,
    run: Callable[..., int],
    shown: Iterable[str],
    extra: Sequence[click.Option] = (),
) -> click.Command:
    """A command that takes every setting and shows, in its help, those of some sections.

    `run` is given the settings and, by name, the values of `extra`; it returns the exit status.
    """
    sections = set(shown)
    parameters: list[click.Parameter] = [
        click.Argument(["model_argument"], required=False, metavar="[MODEL]")
    ]
    for setting in SETTINGS:
        parameters += _options_of(setting, is_shown=setting.section in sections)
    for unsupported in UNSUPPORTED:
        spellings = [unsupported.flag, *unsupported.aliases]
        parameters.append(
            click.Option(
                [*spellings, unsupported.name],
                is_flag=unsupported.is_switch,
                default=None,
                hidden=True,
            )
        )
    for switch in ACCEPTED_SWITCHES:
        flag = switch.replace("_", "-")
        parameters.append(
            click.Option([f"--{flag}/--no-{flag}", switch], hidden=True, expose_value=False)
        )
    parameters += [
        *extra,
        click.Option(["--config"], metavar="FILE", help="YAML file of settings"),
        click.Option(["--parent-pid"], type=int, hidden=True),
        click.Option(
            ["--print-config"],
            is_flag=True,
            help="show every setting, its value and where it came from, and exit",
        ),
    ]

    def callback(**given: Any) -> None:
        if given["parent_pid"] is not None:
            die_with(given["parent_pid"])
        extras = {str(option.name): given.pop(str(option.name)) for option in extra}
        settings = _read(given)
        if given["print_config"]:
            click.echo(describe_settings(settings))
            return
        sys.exit(run(settings, **extras))

    return click.Command(
        name,
        params=parameters,
        callback=_reporting_errors(name, callback),
        help=help,
        epilog=_EPILOG,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def role_command(
    role: Role, help: str, load_run: Callable[[], Callable[[Any], int]]
) -> click.Command:
    """The command of one process; `load_run` imports its main, which is given the config."""

    def run(settings: Settings) -> int:
        return load_run()(build_config(role, settings))

    return settings_command(str(role), help, run, SECTIONS_SHOWN[role])


def run_main(
    role: Role,
    run: Callable[[GatewayConfig], int]
    | Callable[[PrefillConfig], int]
    | Callable[[DecodeConfig], int],
) -> NoReturn:
    """What `python -m scission.services.ROLE` does: read all settings, run, exit."""
    command = role_command(role, f"One {role} process.", lambda: run)
    command.main(prog_name=f"python -m scission.services.{role}", standalone_mode=True)
    raise AssertionError("click exits")


def _options_of(setting: Setting, is_shown: bool) -> list[click.Parameter]:
    """The option, and a hidden one for each other spelling."""
    help = setting.help
    if default := show_default(setting):
        help += f"  [{default}]"
    if setting.is_switch:
        negative = "--no-" + setting.flag.removeprefix("--")
        options = [
            click.Option(
                [f"{setting.flag}/{negative}", setting.name],
                default=None,
                help=help,
                hidden=not is_shown,
            )
        ]
        options += [
            click.Option([alias, f"{setting.name}__off"], is_flag=True, default=None, hidden=True)
            for alias in setting.negative_aliases
        ]
        return list(options)
    options = [
        click.Option(
            [flag, f"{setting.name}__{number}" if number else setting.name],
            metavar=setting.metavar,
            multiple=setting.is_list,
            help=help,
            hidden=bool(number) or not is_shown,
        )
        for number, flag in enumerate((setting.flag, *setting.aliases))
    ]
    return list(options)


def show_default(setting: Setting) -> str:
    """The default as a user would write it; nothing when there is none."""
    default = setting.default
    if default is None:
        return ""
    if setting.is_list:
        return ", ".join(default)
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int) and default >= 1 << 20 and default % (1 << 20) == 0:
        return f"{default >> 20}{'MiB' if 'bytes' in setting.field else 'M'}"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _read(given: dict[str, Any]) -> Settings:
    flags: dict[str, Any] = {}
    for parameter, value in given.items():
        name, _, alias = parameter.partition("__")
        if value is None or value == () or name in _NOT_SETTINGS:
            continue
        if alias == "off":
            value = not value
        if name in flags:
            raise ConfigError(f"--{name.replace('_', '-')} is given twice, by different spellings")
        flags[name] = value
    if given["model_argument"] is not None:
        if "model" in flags:
            raise ConfigError("the model is given twice, as MODEL and as --model")
        flags["model"] = given["model_argument"]
    file = Path(given["config"]) if given["config"] else None
    return read_settings(flags, os.environ, file)


def _reporting_errors(name: str, callback: Callable[..., None]) -> Callable[..., None]:
    """One line on standard error instead of a traceback for what a user can put right."""

    def call(**given: Any) -> None:
        try:
            callback(**given)
        except ScissionError as error:
            click.echo(f"scission {name}: {error.message}", err=True)
            sys.exit(2 if isinstance(error, ConfigError) else 1)

    return call
