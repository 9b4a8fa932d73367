"""How a benchmark's figures are told: the options that all share, the JSON report, spreads."""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import torch

from scission.common.config import Device, Dtype, LoadFormat, ModelOptions, Numerics
from scission.common.errors import ScissionError
from scission.services.bench.floor import DeviceRates, measure_rates
from scission.services.bench.subject import Subject
from scission.services.cli import versions

Function = TypeVar("Function", bound=Callable[..., Any])


def integers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Callback of an option that takes positive integers with commas between them: 1,8,32."""
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"positive integers such as 1,8,32 are accepted, got {value!r}")
    return numbers


def engine_options(function: Function) -> Function:
    """The flags that say which model is measured, and where the report goes."""
    for decorator in reversed(
        (
            click.argument("directory", type=click.Path(path_type=Path), metavar="DIR"),
            click.option(
                "--load-format",
                type=click.Choice(get_args(LoadFormat)),
                default="auto",
                show_default=True,
            ),
            click.option("--layers", type=int, help="cut a dummy model to its first layers"),
            click.option(
                "--device", type=click.Choice(get_args(Device)), default="auto", show_default=True
            ),
            click.option(
                "--dtype", type=click.Choice(get_args(Dtype)), default="auto", show_default=True
            ),
            click.option(
                "--numerics",
                type=click.Choice(get_args(Numerics)),
                default="deployed",
                show_default=True,
            ),
            click.option("--threads", type=click.IntRange(1), help="of torch on a CPU"),
            click.option(
                "--json", "json_path", type=click.Path(path_type=Path), help="write a report there"
            ),
        )
    ):
        function = decorator(function)
    return function


def model_options(
    directory: Path, load_format: Any, device: Any, dtype: Any, numerics: Any, threads: int | None
) -> ModelOptions:
    return ModelOptions(
        directory,
        device=device,
        dtype=dtype,
        numerics=numerics,
        load_format=load_format,
        threads=threads,
    )


def rates_of(subject: Subject) -> DeviceRates | None:
    """The device's measured rates; None where there is no floor: on a CPU, whose absolute figures
    say little.
    """
    if subject.device.type != "cuda":
        return None
    return measure_rates(subject.device)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: the median, and the fastest and slowest tenth's ends."""
    ordered = sorted(1000 * value for value in seconds)
    return {
        "median_ms": statistics.median(ordered),
        "p10_ms": ordered[len(ordered) // 10],
        "p90_ms": ordered[-1 - len(ordered) // 10],
    }


def against_floor(seconds: float, floor_s: float | None) -> dict[str, float]:
    """The floor and the share of it that was reached; nothing where there is no floor."""
    if floor_s is None:
        return {}
    return {"floor_ms": 1000 * floor_s, "share_of_floor": floor_s / seconds}


def floor_text(row: dict[str, Any]) -> str:
    if "floor_ms" not in row:
        return ""
    return f", floor {row['floor_ms']:.3f} ms, share {row['share_of_floor']:.1%}"


def write_report(
    json_path: Path | None,
    subject: Subject,
    rates: DeviceRates | None,
    results: Sequence[dict[str, Any]],
) -> None:
    """Everything that is needed to repeat and to judge the figures, as JSON."""
    if json_path is None:
        return
    report = {
        "command": ["scission", *sys.argv[1:]],
        "device": _device_name(subject.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "model": subject.describe(),
        "rates": None if rates is None else asdict(rates),
        "results": list(results),
    }
    json_path.write_text(json.dumps(report, indent=2) + "\n")


def or_exit(action: Callable[[], None]) -> None:
    """One line on standard error and status 1 for what a user can put right."""
    try:
        action()
    except ScissionError as error:
        click.echo(f"scission: {error.message}", err=True)
        sys.exit(1)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
