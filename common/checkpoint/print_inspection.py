"""An inspection for eyes (tables; plain where there is no terminal) and for programs (JSON)."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from scission.common.checkpoint.inspect import Inspection


def inspection_json(inspection: Inspection) -> str:
    return json.dumps(asdict(inspection), indent=2, ensure_ascii=False)


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print what a checkpoint is, what it needs, and what is wrong with it."""
    console.print(f"[bold]{inspection.directory}[/bold]")
    console.print(
        f"{inspection.model_type}: {_count(inspection.num_parameters)} parameters, "
        f"{_size(inspection.num_bytes)} in {inspection.num_tensors} tensors and "
        f"{inspection.num_shards} shards"
    )
    if inspection.max_model_len is not None:
        console.print(
            f"context {inspection.max_model_len} tokens, vocabulary {inspection.vocab_size}"
        )
    for kind, count in inspection.layers.items():
        console.print(f"  {count:3d} x {kind}")
    console.print(_formats_table(inspection))
    if inspection.states:
        console.print(_states_table(inspection))
    if inspection.fits:
        console.print(_fits_table(inspection))
    for problem in inspection.problems:
        console.print(f"[red]cannot be served:[/red] {problem}", highlight=False)


def _formats_table(inspection: Inspection) -> Table:
    table = Table("tensors", "format", title="What is stored", title_justify="left")
    for heading in ("count", "parameters", "bytes"):
        table.add_column(heading, justify="right")
    for row in inspection.formats:
        parameters, size = _count(row.num_parameters), _size(row.num_bytes)
        table.add_row(row.group, row.format, str(row.num_tensors), parameters, size)
    return table


def _states_table(inspection: Inspection) -> Table:
    table = Table("state in", title="What a request needs", title_justify="left")
    lengths = list(inspection.states[0].handoff_bytes)
    for heading in ("per token", "per request", *(f"shipped at {n}" for n in lengths)):
        table.add_column(heading, justify="right")
    for needs in inspection.states:
        per_token = f"{needs.bytes_per_token:,.1f} B"
        shipped = [_size(size) for size in needs.handoff_bytes.values()]
        table.add_row(needs.dtype, per_token, _size(needs.bytes_per_request), *shipped)
    return table


def _fits_table(inspection: Inspection) -> Table:
    table = Table(
        "device", title="Where it fits, with one request of full context", title_justify="left"
    )
    table.add_column("memory", justify="right")
    table.add_column("devices", justify="right")
    for fit in inspection.fits:
        count = str(fit.num_devices) if fit.num_devices is not None else "does not fit"
        table.add_row(fit.device, _size(fit.memory_bytes), count)
    return table


def _count(n: int) -> str:
    for divisor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= divisor:
            return f"{n / divisor:.2f} {unit}"
    return str(n)


def _size(num_bytes: int) -> str:
    for divisor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= divisor:
            return f"{num_bytes / divisor:.2f} {unit}"
    return f"{num_bytes} B"
