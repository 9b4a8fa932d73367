"""`scission bench decode`: the time of a decode step by batch size, against its floor."""

from pathlib import Path
from typing import Any

import click

from scission.services.bench.floor import DeviceRates, decode_bytes
from scission.services.bench.report import (
    against_floor,
    engine_options,
    floor_text,
    integers,
    model_options,
    or_exit,
    rates_of,
    spread,
    write_report,
)
from scission.services.bench.subject import Sequences, Subject, open_subject, timed

WARM_UP_STEPS = 4


def measure(
    subject: Subject,
    rates: DeviceRates | None,
    batch: int,
    context: int,
    steps: int,
    *,
    is_eager: bool = False,
) -> dict[str, Any]:
    """Steps of `batch` sequences whose prompts of `context` tokens were computed before; captured
    ones where there can be, unless `is_eager`.
    """
    is_captured = subject.captures and not is_eager
    # one more: a step whose tokens nobody waits for is under way at the end
    max_tokens = context + WARM_UP_STEPS + steps + 1
    sequences = Sequences(subject, batch, max_tokens, is_captured=is_captured)
    sequences.prefill(context)
    timed(sequences.step, WARM_UP_STEPS)
    times = spread(timed(sequences.step, steps))
    sequences.settle()
    median_s = times["median_ms"] / 1000
    floor_s = None
    if rates is not None:
        mean_context = context + WARM_UP_STEPS + steps // 2
        layout = subject.loaded.layout
        num_bytes = decode_bytes(subject.tensors, layout, subject.shape, batch, mean_context)
        floor_s = num_bytes / rates.copy_bytes_per_s
    return {
        "batch": batch,
        "context": context,
        "steps": steps,
        "is_captured": is_captured,
        **times,
        "tokens_per_s": batch / median_s,
        **against_floor(median_s, floor_s),
    }


@click.command("decode", help="Time of a decode step and tokens per second, by batch size.")
@engine_options
@click.option("--batch", "batches", callback=integers, default="1,8,32", show_default=True)
@click.option("--context", type=click.IntRange(1), default=1024, show_default=True, help="tokens")
@click.option("--steps", type=click.IntRange(1), default=64, show_default=True)
@click.option("--eager", is_flag=True, help="without captured graphs")
def command(
    directory: Path,
    layers: int | None,
    json_path: Path | None,
    batches: tuple[int, ...],
    context: int,
    steps: int,
    eager: bool,
    **options: Any,
) -> None:
    def run() -> None:
        with open_subject(model_options(directory, **options), layers) as subject:
            rates = rates_of(subject)
            results = []
            for batch in batches:
                row = measure(subject, rates, batch, context, steps, is_eager=eager)
                results.append(row)
                click.echo(
                    f"batch {batch:>4}, context {context}: {row['median_ms']:.3f} ms a step "
                    f"({row['p10_ms']:.3f} to {row['p90_ms']:.3f}), "
                    f"{row['tokens_per_s']:.1f} tokens/s{floor_text(row)}"
                )
            write_report(json_path, subject, rates, results)

    or_exit(run)
