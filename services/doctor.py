"""`scission doctor`: what would keep the stack, with the same settings, from running here."""

import contextlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import click

from scission.common.errors import ConfigError, ScissionError
from scission.common.model_source import is_hub_id
from scission.common.ports import listen
from scission.common.processes import count_gpus
from scission.common.settings import Settings, check_settings

# (distribution, oldest version); the gateway alone needs the first group
GATEWAY_NEEDS = (("grpcio", (1, 62)), ("protobuf", (4, 25)), ("fastapi", (0, 115)))
WORKER_NEEDS = (
    ("torch", (2, 11)),
    ("triton", (3, 6)),
    ("transformers", (5, 17)),
    ("safetensors", (0, 5)),
    ("pyzmq", (26,)),
)
OPEN_FILES = 4096  # sockets of clients, streams and peers
GPU_TARGETS = ("sm_90 and later", "gfx942", "gfx950", "gfx1201")


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"  # it runs, worse
    BLOCKER = "blocker"


@dataclass(frozen=True, slots=True)
class Finding:
    about: str
    verdict: Verdict
    detail: str


def doctor(settings: Settings, *, as_json: bool = False) -> int:
    """Print all findings; 1 if one is a blocker."""
    findings = list(examine(settings))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        colours = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.BLOCKER: "red"}
        for finding in findings:
            verdict = click.style(f"{finding.verdict:8}", fg=colours[finding.verdict])
            click.echo(f"{verdict} {finding.about}: {finding.detail}")
    return int(any(finding.verdict is Verdict.BLOCKER for finding in findings))


def examine(settings: Settings) -> Iterator[Finding]:
    """Everything that can be known before anything is started."""
    yield _settings(settings)
    yield _python()
    for name, oldest in (*GATEWAY_NEEDS, *WORKER_NEEDS):
        yield _package(name, oldest)
    memory_bytes = available_memory_bytes()
    yield Finding("memory", Verdict.OK, f"{memory_bytes / 1e9:.1f} GB available")
    yield from _devices(settings)
    yield from _shared_memory(settings)
    yield _open_files()
    yield _port("http port", settings["host"], settings["port"])
    if not settings.values["registry_port"].is_default:
        yield _port("registry port", settings["registry_host"], settings["registry_port"])
    yield from _model(settings, memory_bytes)


def _settings(settings: Settings) -> Finding:
    try:
        check_settings(settings)
    except ConfigError as error:
        return Finding("settings", Verdict.BLOCKER, error.message)
    return Finding("settings", Verdict.OK, "all values are legal")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    verdict = Verdict.OK if sys.version_info >= (3, 11) else Verdict.BLOCKER
    return Finding("python", verdict, f"{version} (3.11 or later is needed)")


def _package(name: str, oldest: tuple[int, ...]) -> Finding:
    wanted = ".".join(map(str, oldest))
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        is_optional = name == "triton" and not sys.platform.startswith("linux")
        verdict = Verdict.WARNING if is_optional else Verdict.BLOCKER
        return Finding(name, verdict, f"not installed ({wanted} or later is needed)")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[: len(oldest)])
    if numbers < oldest:
        return Finding(name, Verdict.BLOCKER, f"{version}, but {wanted} or later is needed")
    return Finding(name, Verdict.OK, version)


def _devices(settings: Settings) -> Iterator[Finding]:
    wants_gpu = settings["device"] == "cuda"
    try:
        import torch
    except ImportError:
        return
    num_seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(num_seen):
        properties = torch.cuda.get_device_properties(index)
        arch = getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}"
        is_known = properties.major >= 9 or arch.partition(":")[0] in GPU_TARGETS
        detail = f"{properties.name}, {arch}, {properties.total_memory / 1e9:.0f} GB"
        if not is_known:
            detail += f"; tested are {', '.join(GPU_TARGETS)}"
        verdict = Verdict.OK if is_known else Verdict.WARNING
        yield Finding(f"gpu {index}", verdict, detail)
    if num_seen:
        return
    num_present = count_gpus()
    if num_present:
        verdict = Verdict.BLOCKER if wants_gpu else Verdict.WARNING
        detail = f"{num_present} present, but this torch ({torch.__version__}) sees none"
        yield Finding("gpu", verdict, detail)
    elif wants_gpu:
        yield Finding("gpu", Verdict.BLOCKER, "--device cuda is given, but there is none")
    else:
        detail = f"none; the model runs on {os.cpu_count()} CPU cores"
        yield Finding("gpu", Verdict.OK, detail)


def _shared_memory(settings: Settings) -> Iterator[Finding]:
    directory: Path | None = settings["transfer_arena_dir"]
    if directory is None:
        yield Finding("shared memory", Verdict.WARNING, "turned off: state goes over tcp")
        return
    about = f"shared memory {directory}"
    try:
        with tempfile.NamedTemporaryFile(prefix="scission-doctor-", dir=directory):
            pass
    except OSError as error:
        detail = f"cannot be written ({error.strerror}): state goes over tcp, more slowly"
        yield Finding(about, Verdict.WARNING, detail)
        return
    free = shutil.disk_usage(directory).free
    wanted = settings["transfer_arena_bytes"] * settings["decode"]
    detail = f"{free / 2**20:.0f} MiB free, {wanted / 2**20:.0f} MiB wanted"
    if free < wanted:
        detail += "; lower --transfer-arena-bytes or enlarge it (docker: shm_size)"
    yield Finding(about, Verdict.OK if free >= wanted else Verdict.BLOCKER, detail)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} allowed, up to {hard}"
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        detail += f"; raise it to {OPEN_FILES} (ulimit -n) for many clients"
        return Finding("open files", Verdict.WARNING, detail)
    return Finding("open files", Verdict.OK, detail)


def _port(about: str, host: str, port: int) -> Finding:
    try:
        with listen(host, port):
            pass
    except OSError as error:
        return Finding(about, Verdict.BLOCKER, f"{host}:{port}: {error.strerror or error}")
    return Finding(about, Verdict.OK, f"{host}:{port} is free")


def _model(settings: Settings, memory_bytes: int) -> Iterator[Finding]:
    model: str | None = settings["model"]
    if model is None:
        yield Finding("model", Verdict.OK, "the bundled one")
        return
    directory = Path(model).expanduser()
    if not directory.is_dir():
        if is_hub_id(model):
            detail = f"{model} is no folder: it will be looked up on the hub"
            yield Finding("model", Verdict.WARNING, detail)
        else:
            yield Finding("model", Verdict.BLOCKER, f"there is no folder {model}")
        return
    try:
        from scission.common.checkpoint.inspect import inspect_checkpoint

        inspection = inspect_checkpoint(directory)
    except ImportError as error:
        yield Finding("model", Verdict.WARNING, f"cannot be read without {error.name}")
        return
    except (ScissionError, OSError) as error:
        yield Finding("model", Verdict.BLOCKER, str(error))
        return
    for problem in inspection.problems:
        yield Finding("model", Verdict.BLOCKER, problem)
    yield Finding("model", Verdict.OK, f"{inspection.model_type} in {directory}")
    num_workers = settings["prefill"] + settings["decode"]
    if settings["device"] == "cuda":
        return
    needed = inspection.num_bytes * num_workers
    detail = f"{needed / 1e9:.1f} GB of weights in {num_workers} workers"
    verdict = Verdict.OK if needed < memory_bytes else Verdict.BLOCKER
    yield Finding("fit", verdict, f"{detail}, {memory_bytes / 1e9:.1f} GB of memory available")


def available_memory_bytes() -> int:
    """What this process and its children may still take: the machine's, or its container's."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    with contextlib.suppress(OSError):
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        available = int(match[1]) * 1024 if match else available
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        available = min(available, limit - int((group / "memory.current").read_text()))
    return available
