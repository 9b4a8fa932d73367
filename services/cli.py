"""The command `scission`: one subcommand a module, imported when it is called.

Help and flag errors come within a tenth of a second: nothing here imports torch, gRPC or FastAPI.
"""

import functools
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from scission.common.command_line import SECTIONS_SHOWN, role_command, settings_command
from scission.common.errors import ScissionError
from scission.common.settings import Settings, closest
from scission.common.types import Role

STANDS_ON = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "tokenizers",
    "numpy",
    "grpcio",
    "protobuf",
    "pyzmq",
    "fastapi",
    "uvicorn",
    "pydantic",
)

# what the extra `worker` brings and a gateway's installation lacks, as it is imported
WORKER_MODULES = ("torch", "triton", "transformers", "safetensors", "numpy", "zmq")

T = TypeVar("T")

# name -> module whose `command` it is
_BENCHMARKS: dict[str, str] = {
    "decode": "scission.services.bench.decode",
    "prefill": "scission.services.bench.prefill",
    "transfer": "scission.common.transfer.bench",
}


class LazyGroup(click.Group):
    """A group whose commands are made when they are asked for."""

    def __init__(self, name: str, help: str, commands: dict[str, Callable[[], click.Command]]):
        super().__init__(name, help=help, context_settings={"help_option_names": ["-h", "--help"]})
        self._makers = commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._makers)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        maker = self._makers.get(cmd_name)
        return maker() if maker is not None else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self._makers:
            ctx.fail(f"No such command '{args[0]}'.{closest(args[0], self._makers)}")
        return super().resolve_command(ctx, args)


def make_command() -> click.Command:
    return LazyGroup(
        "scission",
        "Serve mixture-of-experts models with prefill and decode as separate services.",
        {
            "serve": _serve,
            "gateway": lambda: _role(Role.GATEWAY, "One gateway: HTTP in front, workers behind."),
            "prefill": lambda: _role(Role.PREFILL, "One prefill worker."),
            "decode": lambda: _role(Role.DECODE, "One decode worker."),
            "bench": _bench,
            "inspect": _inspect,
            "doctor": _doctor,
            "bundle": _bundle,
            "keys": _keys,
            "health": _health,
            "version": _version,
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    try:
        make_command().main(args=arguments, prog_name="scission")
    except ModuleNotFoundError as error:
        if error.name not in WORKER_MODULES:
            raise
        click.echo(
            f"scission: this command needs {error.name}; only the gateway's packages are installed"
            " here (the extra `worker` brings the others: pip install 'scission[worker]')",
            err=True,
        )
        sys.exit(1)


def versions() -> dict[str, str]:
    """Of ourselves, of Python, and of what we stand on; `not installed` where that is so."""
    found = {"scission": _version_of("scission"), "python": platform.python_version()}
    return found | {name: _version_of(name) for name in STANDS_ON}


def _serve() -> click.Command:
    def run(settings: Settings) -> int:
        from scission.services.serve import serve

        return serve(settings)

    return settings_command(
        "serve",
        "The whole stack on this machine, in the foreground: a gateway, prefills and decodes.\n\n"
        "MODEL is a folder or a hub id; without one the bundled model is served.",
        run,
        SECTIONS_SHOWN["serve"],
    )


def _role(role: Role, help: str) -> click.Command:
    def load_run() -> Callable[[Any], int]:
        module = importlib.import_module(f"scission.services.{role}.__main__")
        run: Callable[[Any], int] = module.run
        return run

    return role_command(role, help, load_run)


def _doctor() -> click.Command:
    def run(settings: Settings, as_json: bool) -> int:
        from scission.services.doctor import doctor

        return doctor(settings, as_json=as_json)

    return settings_command(
        "doctor",
        "What would keep `serve`, given the same flags, from running here; exits 1 if something.",
        run,
        SECTIONS_SHOWN["serve"],
        [click.Option(["--json", "as_json"], is_flag=True, help="for programs")],
    )


def _bench() -> click.Command:
    def load(module: str) -> click.Command:
        command: click.Command = importlib.import_module(module).command
        return command

    makers: dict[str, Callable[[], click.Command]] = {
        name: functools.partial(load, module) for name, module in _BENCHMARKS.items()
    }
    return LazyGroup("bench", "Measure an engine without a gateway.", makers)


def _inspect() -> click.Command:
    @click.command("inspect", help="What a checkpoint is, what it needs, and where it fits.")
    @click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
    @click.option("--json", "as_json", is_flag=True, help="for programs")
    def command(directory: Path, as_json: bool) -> None:
        from rich.console import Console

        from scission.common.checkpoint.inspect import inspect_checkpoint
        from scission.common.checkpoint.print_inspection import inspection_json, print_inspection

        inspection = _or_exit(lambda: inspect_checkpoint(directory))
        if as_json:
            click.echo(inspection_json(inspection))
        else:
            print_inspection(inspection, Console())
        sys.exit(1 if inspection.problems else 0)

    return command


def _bundle() -> click.Command:
    @click.command("bundle", help="Print the folder of the bundled model.")
    def command() -> None:
        from scission.common.model_source import BUNDLED

        click.echo(BUNDLED)

    return command


def _keys() -> click.Command:
    @click.command("keys", help="Make the CURVE keys for --transfer-curve-dir in DIR, once.")
    @click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
    def command(directory: Path) -> None:
        from scission.common.curve_keys import write_curve_keys

        _or_exit(lambda: write_curve_keys(directory))
        click.echo(directory)

    return command


def _health() -> click.Command:
    @click.command("health", help="Exit 0 if the worker at HOST:PORT (gRPC) serves, else 1.")
    @click.argument("address", metavar="HOST:PORT")
    @click.option("--timeout-s", type=float, default=3.0, show_default=True)
    def command(address: str, timeout_s: float) -> None:
        from scission.common.grpc_health import is_serving

        sys.exit(0 if is_serving(address, timeout_s) else 1)

    return command


def _version() -> click.Command:
    @click.command("version", help="Versions of scission and of what it stands on.")
    @click.option("--json", "as_json", is_flag=True, help="for programs")
    def command(as_json: bool) -> None:
        found = versions()
        if as_json:
            import json

            click.echo(json.dumps(found, indent=2))
            return
        width = max(map(len, found))
        for name, version in found.items():
            click.echo(f"{name:{width}}  {version}")

    return command


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _or_exit(action: Callable[[], T]) -> T:
    """One line on standard error and status 1 for what a user can put right."""
    try:
        return action()
    except ScissionError as error:
        click.echo(f"scission: {error.message}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
