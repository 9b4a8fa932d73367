# ruff: noqa: T201
"""Trains scission-nano on one GPU, in minutes; stops in time and goes on from where it was.

    python -m examples.nano.train --minutes 20 --out /tmp/nano

Time is the schedule: lengths, the indexer's stages and the learning rate follow the share of
--minutes that is over. The folder gets `state.pt` (all that --resume needs), `weights-*.pt` (the
parameters, in parts) and `log.jsonl` (losses, and the share of held-out problems that come out
exactly right, by task).
"""

import argparse
import json
import multiprocessing as mp
import queue
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.nano.data.problems import TASKS, WITH_TOOLS
from examples.nano.data.rows import RowMaker, nano_tokenizer
from examples.nano.network import (
    Network,
    Parameters,
    Roundings,
    initial_parameters,
    rounded_weights,
)
from examples.nano.optimizer import FIXED, Optimizer
from examples.nano.shape import CONFIG

# (share of the time from which it holds, lengths and how often each is drawn, sparse attention)
STAGES: tuple[tuple[float, dict[int, float], bool], ...] = (
    (0.00, {256: 1.0}, False),
    (0.12, {256: 0.65, 512: 0.35}, False),
    (0.32, {256: 0.35, 512: 0.25, 1024: 0.15, 2048: 0.25}, False),
    (0.52, {256: 0.30, 512: 0.20, 1024: 0.30, 2048: 0.20}, True),
    (0.66, {256: 0.30, 512: 0.20, 1024: 0.28, 2048: 0.12, 8192: 0.10}, True),
)
LENGTHS = (256, 512, 1024, 2048, 8192)
DECAY_FROM = 0.55  # of the time: from here the learning rate falls to zero
WARM_UP_STEPS = 100
INDEX_WEIGHT, DRAFT_WEIGHT, BALANCE_RATE = 1.0, 0.2, 1e-3


@dataclass
class Batch:
    ids: Tensor  # [rows, length] int64
    mask: Tensor  # [rows, length] bool: the next token is the model's to say


def _make_rows(seed: int, num_tokens: int, lengths: tuple[int, ...], queues: list[Any]) -> None:
    maker = RowMaker(nano_tokenizer(), seed)
    while True:
        for length, rows_queue in zip(lengths, queues, strict=True):
            if rows_queue.full():
                time.sleep(0.002)
                continue
            rows = [maker.row(length) for _ in range(max(num_tokens // length, 1))]
            rows_queue.put(tuple(np.stack(part) for part in zip(*rows, strict=True)))


class Rows:
    """Batches of every length, made by processes of their own."""

    def __init__(
        self, num_workers: int, num_tokens: int, seed: int, lengths: tuple[int, ...]
    ) -> None:
        context = mp.get_context("spawn")
        self._queues = {length: context.Queue(maxsize=12) for length in lengths}
        for worker in range(num_workers):
            arguments = (seed * 1000 + worker, num_tokens, lengths, list(self._queues.values()))
            context.Process(target=_make_rows, args=arguments, daemon=True).start()

    def next(self, length: int, device: torch.device) -> Batch:
        try:
            ids, mask = self._queues[length].get(timeout=300)
        except queue.Empty:
            raise RuntimeError(f"no rows of length {length} came within 300 s") from None
        return to_batch(ids, mask, device)


def to_batch(ids: np.ndarray, mask: np.ndarray, device: torch.device) -> Batch:
    return Batch(
        torch.from_numpy(ids.astype(np.int64)).to(device, non_blocking=True),
        torch.from_numpy(mask).to(device, non_blocking=True),
    )


def losses(net: Network, p: Parameters, batch: Batch, is_sparse: bool) -> tuple[Tensor, ...]:
    """Of the next token, of the draft for the one after it, of the indexer; and experts' loads."""
    weights = rounded_weights(p, net.roundings)
    out = net(weights, batch.ids, is_sparse=is_sparse)
    said = batch.mask.flatten().nonzero().squeeze(1)
    targets = batch.ids.roll(-1, 1).flatten()[said]
    main = F.cross_entropy(F.linear(out.state[said].float(), p["head"]), targets)
    drafted = batch.mask.roll(-1, 1) & batch.mask
    drafted[:, -2:] = False
    said = drafted.flatten().nonzero().squeeze(1)
    targets = batch.ids.roll(-2, 1).flatten()[said]
    assert out.draft is not None
    draft = F.cross_entropy(F.linear(out.draft[said].float(), p["head"]), targets)
    return main, draft, out.index_loss, out.loads


@torch.no_grad()
def balance(p: Parameters, loads: Tensor) -> None:
    """Nudge the router's bias towards the experts that were taken too rarely."""
    p["gate_bias"].add_(torch.sign(loads.mean(-1, keepdim=True) - loads), alpha=BALANCE_RATE)


def leave_out_if_not_finite(p: Parameters) -> Tensor:
    """Zero gradients that are not finite, so that no parameter is lost: how many tensors had some.

    Of a stack of layers only the layers concerned are zeroed; the host does not wait.
    """
    wrong = []
    for w in p.values():
        if w.grad is not None:
            dims = tuple(range(1, w.dim()))
            is_finite = (
                torch.isfinite(w.grad).all(dims, keepdim=True) if dims else w.grad.isfinite()
            )
            w.grad.masked_fill_(~is_finite, 0.0)
            wrong.append(~is_finite.all())
    return torch.stack(wrong).sum()


class Probe:
    """Held-out problems whose answers are compared as a whole, each alone in its row."""

    def __init__(self, num_tokens: int, lengths: tuple[int, ...], device: torch.device) -> None:
        # not compiled: what is compiled for training gives other answers without gradients
        self._net = Network(CONFIG, Roundings(), device)
        maker = RowMaker(nano_tokenizer(), 99)
        plain = [name for name in TASKS if name not in WITH_TOOLS]
        self._batches: list[tuple[Batch, list[str], int]] = []
        for length in lengths:
            names = {256: plain, 1024: list(WITH_TOOLS)}.get(length, ["needle"])
            count = max(num_tokens // length, 1)
            for _ in range(4 if length in (256, 1024) else 2):
                chosen = [names[i % len(names)] for i in range(count)]
                rows = [maker.probe(name, length) for name in chosen]
                ids, mask = (np.stack(part) for part in zip(*rows, strict=True))
                self._batches.append((to_batch(ids, mask, device), chosen, length))

    @torch.no_grad()
    def __call__(self, p: Parameters, is_sparse: bool) -> dict[str, float]:
        right: dict[str, list[bool]] = defaultdict(list)
        weights = rounded_weights(p, self._net.roundings)
        for batch, names, length in self._batches:
            out = self._net(weights, batch.ids, is_sparse=is_sparse, with_draft=False)
            said = batch.mask.flatten().nonzero().squeeze(1)
            targets = batch.ids.roll(-1, 1).flatten()[said]
            guesses = F.linear(out.state[said].float(), p["head"]).argmax(-1)
            wrong = torch.zeros_like(batch.mask.flatten())
            wrong[said] = guesses != targets
            is_right = ~wrong.view_as(batch.mask).any(1)
            for name, right_one in zip(names, is_right.tolist(), strict=True):
                right[f"{name}-{length}" if length > 1024 else name].append(right_one)
        return {name: round(sum(all_) / len(all_), 3) for name, all_ in sorted(right.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of the whole training")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on from state.pt in --out")
    parser.add_argument("--tokens", type=int, default=65536, help="of a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=12, help="processes that make rows")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.003)
    parser.add_argument("--probe-seconds", type=float, default=120.0)
    parser.add_argument("--save-seconds", type=float, default=60.0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--stop-seconds", type=float, default=1e9, help="of this run; --resume goes on"
    )
    parser.add_argument("--weights", type=Path, help="begin with the weights-*.pt of this folder")
    parser.add_argument("--seconds-before", type=float, default=0.0, help="that --weights took")
    parser.add_argument("--max-steps", type=int, default=10**9)
    options = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = tuple(n for n in LENGTHS if n <= options.tokens)
    rows = Rows(options.workers, options.tokens, options.seed, lengths)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 256
    torch._dynamo.config.suppress_errors = True

    def compiled(f: Any) -> Any:
        return f if options.no_compile else torch.compile(f, dynamic=False)

    net = Network(CONFIG, Roundings(), device, compiled)
    p = initial_parameters(CONFIG, torch.Generator().manual_seed(options.seed))
    p = {name: w.to(device) for name, w in p.items()}
    for name, w in p.items():
        w.requires_grad_(name not in FIXED)
    optimizer = Optimizer(p, options.muon_rate, options.adam_rate)
    options.out.mkdir(parents=True, exist_ok=True)
    log = (options.out / "log.jsonl").open("a")
    before = options.seconds_before
    if options.weights is not None:
        with torch.no_grad():
            for part in sorted(options.weights.glob("weights-*.pt")):
                for name, w in torch.load(part, map_location=device, weights_only=True).items():
                    p[name].copy_(w)
    if options.resume:
        saved = torch.load(options.out / "state.pt", map_location=device, weights_only=True)
        before, optimizer.num_steps = saved["seconds"], saved["steps"]
        with torch.no_grad():
            for name, w in saved["parameters"].items():
                p[name].copy_(w)
        optimizer.state = saved["optimizer"]

    def note(**values: Any) -> None:
        log.write(json.dumps(values) + "\n")
        log.flush()
        print(json.dumps(values), flush=True)

    def save() -> None:
        state = {
            "seconds": before + time.monotonic() - started, "steps": optimizer.num_steps,
            "parameters": p, "optimizer": optimizer.state,
        }  # fmt: skip
        torch.save(state, options.out / "state.tmp")
        (options.out / "state.tmp").rename(options.out / "state.pt")
        for part, names in enumerate(parts_of(p)):
            values = {name: p[name].detach().cpu() for name in names}
            torch.save(values, options.out / f"weights-{part}.tmp")
            (options.out / f"weights-{part}.tmp").rename(options.out / f"weights-{part}.pt")

    count = sum(w.numel() for name, w in p.items() if name != "tid2eid")
    given = {name: str(value) for name, value in vars(options).items()}
    note(parameters=count, options=given, torch=torch.__version__)
    probe = Probe(options.tokens, lengths, device)
    draws = np.random.default_rng(options.seed)
    total, tokens = options.minutes * 60, 0
    num_left_out = torch.zeros((), dtype=torch.int64, device=device)
    last_probe = last_save = last_note = time.monotonic()
    while True:
        share = (before + time.monotonic() - started) / total
        is_over = share >= 1 or optimizer.num_steps >= options.max_steps
        if is_over or time.monotonic() - started > options.stop_seconds:
            break
        _, mix, is_sparse = next(stage for stage in reversed(STAGES) if share >= stage[0])
        mix = {length: weight for length, weight in mix.items() if length in lengths}
        weights = np.array(list(mix.values()))
        length = int(draws.choice(list(mix), p=weights / weights.sum()))
        batch = rows.next(length, device)
        main_loss, draft_loss, index_loss, loads = losses(net, p, batch, is_sparse)
        (main_loss + DRAFT_WEIGHT * draft_loss + INDEX_WEIGHT * index_loss).backward()
        num_left_out += leave_out_if_not_finite(p)
        warm_up = min(optimizer.num_steps / WARM_UP_STEPS, 1.0)
        optimizer.step(p, warm_up * min((1 - share) / (1 - DECAY_FROM), 1.0))
        balance(p, loads)
        tokens += batch.ids.numel()
        now = time.monotonic()
        step = optimizer.num_steps
        if step in (1, 2, 3, 5, 10, 20) or now - last_note > 10:
            note(
                step=step, seconds=round(now - started, 1), length=length,
                loss=round(main_loss.item(), 4), draft=round(draft_loss.item(), 4),
                index=round(index_loss.item(), 4), left_out=int(num_left_out), tokens=tokens,
                memory=torch.cuda.max_memory_allocated() >> 30 if device.type == "cuda" else 0,
            )  # fmt: skip
            last_note = now
        if now - last_probe > options.probe_seconds:
            note(step=step, seconds=round(now - started, 1), right=probe(p, is_sparse))
            last_probe = time.monotonic()
        if now - last_save > options.save_seconds:
            save()
            last_save = time.monotonic()
    save()
    if is_over:
        note(step=optimizer.num_steps, done=True, right=probe(p, True))


def parts_of(p: Parameters, limit: int = 15 << 20) -> list[list[str]]:
    """The names in runs whose tensors take at most `limit` bytes, where they can."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, w in p.items():
        if parts[-1] and size + w.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += w.nbytes
    return parts


if __name__ == "__main__":
    main()
