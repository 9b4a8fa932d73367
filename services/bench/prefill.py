"""`scission bench prefill`: the time to a prompt's first token by its length, against its floor."""

from pathlib import Path
from typing import Any

import click

from scission.services.bench.floor import DeviceRates, prefill_operations
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
from scission.services.bench.subject import (
    Sequences,
    Subject,
    default_chunk_tokens,
    open_subject,
    timed,
)


def measure(
    subject: Subject, rates: DeviceRates | None, num_tokens: int, chunk_tokens: int, repeats: int
) -> dict[str, Any]:
    """One prompt alone, in chunks, up to its first token; each time other tokens."""
    sequences = Sequences(subject, 1, num_tokens)
    sequences.prefill(num_tokens, chunk_tokens)  # warm-up
    times = spread(timed(lambda: sequences.prefill(num_tokens, chunk_tokens), repeats))
    median_s = times["median_ms"] / 1000
    floor_s = None
    if rates is not None:
        operations = prefill_operations(subject.tensors, subject.shape, num_tokens)
        floor_s = operations.seconds(rates)
    return {
        "prompt_tokens": num_tokens,
        "chunk_tokens": chunk_tokens,
        "repeats": repeats,
        **times,
        "tokens_per_s": num_tokens / median_s,
        **against_floor(median_s, floor_s),
    }


@click.command("prefill", help="Time to the first token of one prompt, by its length.")
@engine_options
@click.option("--prompt-tokens", callback=integers, default="1024,8192", show_default=True)
@click.option("--chunk-tokens", type=click.IntRange(1), help="[as the workers]")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
def command(
    directory: Path,
    layers: int | None,
    json_path: Path | None,
    prompt_tokens: tuple[int, ...],
    chunk_tokens: int | None,
    repeats: int,
    **options: Any,
) -> None:
    def run() -> None:
        with open_subject(model_options(directory, **options), layers) as subject:
            rates = rates_of(subject)
            chunk = chunk_tokens or default_chunk_tokens(subject.device)
            results = []
            for num_tokens in prompt_tokens:
                row = measure(subject, rates, num_tokens, chunk, repeats)
                results.append(row)
                click.echo(
                    f"{num_tokens:>7} prompt tokens: {row['median_ms']:.1f} ms to the first token "
                    f"({row['p10_ms']:.1f} to {row['p90_ms']:.1f}), "
                    f"{row['tokens_per_s']:.1f} tokens/s{floor_text(row)}"
                )
            write_report(json_path, subject, rates, results)

    or_exit(run)
