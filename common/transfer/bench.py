"""Speed of a hand-off between two processes of this host, per tier, against one core's memcpy and
against a pair of bare processes (`bench_floor.py`).

`scission bench transfer`; figures of one run are comparable with each other, not with another
machine's.
"""

import json
import multiprocessing
import platform
import re
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import zmq

from scission.common.cache.layout import CacheLayout, Component, Kind
from scission.common.cache.storage import CacheStorage
from scission.common.errors import ConfigError, TransferError
from scission.common.transfer.bench_floor import pair_rate
from scission.common.transfer.events import (
    Closed,
    Committed,
    Destination,
    Granted,
    Ready,
    ReserveRequested,
    SenderEvent,
    StateSource,
)
from scission.common.transfer.options import CurveKeys, TransferOptions
from scission.common.transfer.receiver import Receiver
from scission.common.transfer.sender import Sender
from scission.protos import transfer_pb2

TIERS = ("shared", "tcp", "curve")
DIGEST = {"bench": "1"}
MEMCPY_BYTES = 256 << 20
TIMEOUT_S = 120.0


def bench_layout(num_layers: int) -> CacheLayout:
    """Shapes of DeepSeek-V4's state in bfloat16: compressed rows in blocks, windows and sums in
    slots.
    """
    even, odd = tuple(range(0, num_layers, 2)), tuple(range(1, num_layers, 2))
    every = tuple(range(num_layers))
    return CacheLayout(
        (
            Component("csa_kv", Kind.PAGED, even, (512,), "bfloat16", tokens_per_row=4),
            Component("csa_index", Kind.PAGED, even, (128,), "bfloat16", tokens_per_row=4),
            Component("hca_kv", Kind.PAGED, odd, (512,), "bfloat16", tokens_per_row=128),
            Component(
                "window_kv",
                Kind.RING,
                every,
                (512,),
                "bfloat16",
                ring_size=128,
                live_lookback=127,
            ),
        ),
        block_size=128,
    )


@dataclass(frozen=True, slots=True)
class Load:
    """What one measurement ships, again and again."""

    num_tokens: int = 65536
    num_layers: int = 32
    chunk_tokens: int = 8192  # of one prefill chunk
    layer_group: int = 8  # layers of one piece
    repeats: int = 5
    is_scattered: bool = False  # blocks of a request in random order, as in a pool that is used
    devices: tuple[str, str] = ("cpu", "cpu")  # where the state lies at either end

    def blocks(self) -> list[int]:
        num_blocks = self.num_tokens // 128
        ids = np.arange(1, num_blocks + 1)
        if self.is_scattered:
            np.random.default_rng(0).shuffle(ids)
        result: list[int] = ids.tolist()
        return result

    def pieces(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        return [
            (
                (layer, min(layer + self.layer_group, self.num_layers)),
                (token, min(token + self.chunk_tokens, self.num_tokens)),
            )
            for token in range(0, self.num_tokens, self.chunk_tokens)
            for layer in range(0, self.num_layers, self.layer_group)
        ]


def memcpy_rate(repeats: int = 5) -> float:
    """Bytes per second of one core copying a large array; the best of some tries."""
    source = np.ones(MEMCPY_BYTES, np.uint8)
    target = np.zeros_like(source)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - started)
    return MEMCPY_BYTES / best


def measure(tier: str, load: Load, options: TransferOptions) -> dict[str, Any]:
    """Ship the load over one tier, from this process's pool into another's.

    Returns GB/s (1e9 bytes) from GRANT to COMMIT with every piece ready at once, and the seconds
    that are exposed when pieces become ready over twice that time, as they do under computation.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    epoch = secrets.randbits(63)
    process = context.Process(target=_receive, args=(theirs, load, options, epoch), daemon=True)
    process.start()
    storage = _storage(load, load.devices[0])
    woken = threading.Event()
    sender = Sender(storage, DIGEST, "prefill-bench", 1, options, woken.set)
    try:
        if not ours.poll(TIMEOUT_S):
            raise TransferError("the receiving process did not start")
        destination = Destination("decode-bench", epoch, ours.recv())
        _ship(sender, woken, destination, load, spread_s=0.0)  # first touches and the handshake
        rounds = [_ship(sender, woken, destination, load, 0.0) for _ in range(load.repeats)]
        seconds = statistics.median(committed.seconds for committed in rounds)
        spread = _ship(sender, woken, destination, load, spread_s=2 * seconds)
        num_bytes = rounds[0].num_bytes
        return {
            "tier": tier,
            "bytes": num_bytes,
            "median_gb_per_s": num_bytes / seconds / 1e9,
            "best_gb_per_s": num_bytes / min(committed.seconds for committed in rounds) / 1e9,
            "exposed_s": spread.exposed_s,
            "shipped_over_s": spread.seconds,
        }
    finally:
        sender.close()
        ours.close()
        process.join(10)
        if process.is_alive():
            process.kill()


def _storage(load: Load, device: str) -> CacheStorage:
    torch.set_num_threads(1)
    layout = bench_layout(load.num_layers)
    storage = CacheStorage(layout, load.num_tokens // 128 + 1, 2, torch.device(device))
    for tensor in storage.paged.values():
        tensor.fill_(1)  # every page its own, not the zero page
    return storage


def _ship(
    sender: Sender, woken: threading.Event, destination: Destination, load: Load, spread_s: float
) -> Committed:
    """One request; its pieces become ready at once, or evenly over `spread_s`."""
    deadline = time.monotonic() + TIMEOUT_S
    handle = sender.reserve(
        "bench", 0, destination, load.num_tokens, 1, deadline, StateSource(load.blocks(), 1)
    )
    events: list[SenderEvent] = []
    if spread_s:
        _wait(sender, woken, events, Granted)
    pieces = load.pieces()
    started = time.monotonic()
    for i, (layers, tokens) in enumerate(pieces):
        ready_at = started + spread_s * (i + 1) / len(pieces)
        time.sleep(max(0.0, ready_at - time.monotonic()))
        sender.piece_ready(handle, layers, tokens)
    sender.finish(handle, [transfer_pb2.Sequence()], time.monotonic())
    _wait(sender, woken, events, Closed)
    for event in events:
        if isinstance(event, Committed):
            return event
    raise TransferError(f"the transfer did not commit: {events}")


def _wait(
    sender: Sender, woken: threading.Event, events: list[SenderEvent], kind: type[SenderEvent]
) -> None:
    while not any(isinstance(event, kind) for event in events):
        woken.wait(0.1)
        woken.clear()
        events += sender.poll()
        if any(isinstance(event, Closed) for event in events):
            return


def _receive(pipe: Pipe, load: Load, options: TransferOptions, epoch: int) -> None:
    """The other process: an engine that does nothing but inject, until the pipe closes."""
    storage = _storage(load, load.devices[1])
    woken = threading.Event()
    receiver = Receiver(storage, DIGEST, "decode-bench", epoch, options, woken.set)
    blocks = load.blocks()[::-1] if load.is_scattered else load.blocks()
    pipe.send(receiver.address)
    try:
        while not pipe.poll():
            for event in receiver.poll():
                if isinstance(event, ReserveRequested):
                    receiver.grant(event.handle, blocks, 1)
                elif isinstance(event, Ready):
                    receiver.commit(event.handle)
            if not receiver.inject(16 << 20):
                woken.wait(0.1)
                woken.clear()
    except (EOFError, OSError):
        pass
    finally:
        receiver.close()


def tier_options(tier: str, directory: Path, options: TransferOptions) -> TransferOptions:
    """Options that make a pair on this host take the tier."""
    curve = None
    if tier == "curve":
        public, secret = (key.decode() for key in zmq.curve_keypair())
        curve = CurveKeys(public, secret, public, frozenset({public}))
    return replace(options, arena_dir=directory if tier == "shared" else None, curve=curve)


def run(tiers: Sequence[str], load: Load, options: TransferOptions) -> dict[str, Any]:
    """All tiers and, between host memories, the baselines, as one report."""
    is_on_host = load.devices == ("cpu", "cpu")
    pair = pair_rate(options.slot_bytes, load.repeats) if is_on_host else None
    baseline = memcpy_rate()
    results = []
    for tier in tiers:
        with tempfile.TemporaryDirectory(dir=TransferOptions().arena_dir) as directory:
            results.append(measure(tier, load, tier_options(tier, Path(directory), options)))
    baseline = max(baseline, memcpy_rate())
    for result in results:
        rate = result["median_gb_per_s"] * 1e9
        result["share_of_memcpy"] = rate / baseline
        result["share_of_pair"] = rate / pair if pair is not None else None
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "zmq": zmq.zmq_version(),
        "devices": load.devices,
        "slot_bytes": options.slot_bytes,
        "arena_bytes": options.arena_bytes,
        "window_slots": options.window_slots,
        "bulk_sockets": options.bulk_sockets,
        "copy_threads": options.copy_threads,
        "tokens": load.num_tokens,
        "is_scattered": load.is_scattered,
        "memcpy_gb_per_s": baseline / 1e9,
        "pair_gb_per_s": pair / 1e9 if pair is not None else None,
        "tiers": results,
    }


def _devices(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, str]:
    """One device for both ends, or two."""
    names = value.split(",")
    if len(names) > 2 or not all(re.fullmatch(r"cpu|cuda(:\d+)?", name) for name in names):
        raise click.BadParameter(f"{value!r} is not cpu, cuda, cuda:N or two of them with a comma")
    return names[0], names[-1]


def _size(name: str, minimum: int) -> Callable[[Any], Any]:
    """An option for a field of TransferOptions."""
    return click.option(
        f"--{name.replace('_', '-')}",
        default=getattr(TransferOptions(), name),
        show_default=True,
        type=click.IntRange(minimum),
    )


@click.command("transfer", help="Hand-off between two processes of this host, per tier.")
@click.option(
    "--tier", "tiers", multiple=True, type=click.Choice(TIERS), help="again for more  [all]"
)
@click.option(
    "--devices",
    default="cpu",
    show_default=True,
    callback=_devices,
    help="where the state lies: one for both ends or two, as cuda:0,cuda:1",
)
@click.option("--tokens", default=Load().num_tokens, show_default=True, type=click.IntRange(128))
@click.option("--repeats", default=Load().repeats, show_default=True, type=click.IntRange(1))
@_size("slot_bytes", 4096)
@_size("arena_bytes", 4096)
@_size("window_slots", 1)
@_size("bulk_sockets", 1)
@_size("copy_threads", 1)
@click.option("--scattered", is_flag=True, help="blocks in random order, as in a pool in use")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="write the report there")
def command(
    tiers: tuple[str, ...],
    devices: tuple[str, str],
    tokens: int,
    repeats: int,
    scattered: bool,
    json_path: Path | None,
    **sizes: Any,
) -> None:
    load = Load(tokens // 128 * 128, repeats=repeats, is_scattered=scattered, devices=devices)
    try:
        options = TransferOptions(**sizes)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    report = run(tiers or TIERS, load, options)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(f"memcpy of one core: {report['memcpy_gb_per_s']:.1f} GB/s")
    if report["pair_gb_per_s"] is not None:
        click.echo(f"two bare processes, copy and hash: {report['pair_gb_per_s']:.1f} GB/s")
    for result in report["tiers"]:
        of_pair = result["share_of_pair"]
        click.echo(
            f"{result['tier']:>7}: {result['median_gb_per_s']:.2f} GB/s, "
            f"{result['share_of_memcpy']:.0%} of memcpy, "
            + (f"{of_pair:.0%} of the pair, " if of_pair is not None else "")
            + f"{result['exposed_s'] * 1000:.1f} ms exposed of {result['bytes'] / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    command()
