"""`scission serve`: gateways, prefills and decodes as child processes of one supervisor.

Each child's lines come out under its name; one that dies after the stack was ready is started
again, as a new epoch. SIGTERM and SIGINT drain: gateways first, since they feed the others.
"""

import asyncio
import contextlib
import http.client
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TextIO

import click

from scission.common.errors import ConfigError
from scission.common.log import set_up_logging
from scission.common.model_source import resolve_model
from scission.common.ports import free_port, listen
from scission.common.processes import count_gpus
from scission.common.settings import Settings, build_config, check_settings
from scission.common.types import Role

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 30.0
# a child that has lived this long starts its next life without waiting
SETTLED_S = 60.0
READY_POLL_S = 0.1
# beyond the drain's own limit: what a process does around it, stopping its engine included
EXIT_GRACE_S = 15.0
INTERRUPTED_STATUS = 130


@dataclass(frozen=True, slots=True)
class ChildSpec:
    name: str  # gateway, prefill-0, decode-1
    role: Role
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)  # besides ours
    own_port: int | None = None  # of a gateway that shares --port with others


def serve(settings: Settings) -> int:
    """Run the whole stack in the foreground until a signal; the exit status.

    Raises:
        ConfigError: a setting is wrong or a port is taken; nothing has been started.
    """
    check_settings(settings)
    _require_free("--port", settings["host"], settings["port"])
    settings = _fill_in(settings)
    # every process checks its own; what is wrong is better told before any is started
    for role in (Role.GATEWAY, Role.PREFILL, Role.DECODE):
        config = build_config(role, settings)
    set_up_logging(config.log, "supervisor")
    supervisor = Supervisor(plan_children(settings, count_gpus()), settings)
    return asyncio.run(supervisor.run())


def plan_children(settings: Settings, num_gpus: int) -> list[ChildSpec]:
    """The processes of a stack; on GPUs, workers are dealt out over them and share their memory."""
    workers = [(Role.PREFILL, i) for i in range(settings["prefill"])]
    workers += [(Role.DECODE, i) for i in range(settings["decode"])]
    uses_gpus = num_gpus > 0 and settings["device"] != "cpu"
    if uses_gpus and settings.values["gpu_memory_utilization"].is_default:
        sharing = -(-len(workers) // num_gpus)
        share = round(settings["gpu_memory_utilization"] / sharing, 3)
        settings = settings.with_values("serve", gpu_memory_utilization=share)
    if settings["threads"] is None:
        threads = max(1, (os.cpu_count() or 1) // len(workers))
        settings = settings.with_values("serve", threads=threads)
    children = _gateways(settings)
    for index, (role, number) in enumerate(workers):
        environment = {}
        if uses_gpus and num_gpus > 1 and not _names_devices(os.environ):
            environment = {"CUDA_VISIBLE_DEVICES": str(index % num_gpus)}
        command = _command(role, settings)
        children.append(ChildSpec(f"{role}-{number}", role, command, environment))
    return children


def _gateways(settings: Settings) -> list[ChildSpec]:
    """One on the port, or several that share it and have another each for who means one of them."""
    count = settings["num_gateways"]
    if count == 1:
        return [ChildSpec("gateway", Role.GATEWAY, _command(Role.GATEWAY, settings))]
    children = []
    for i, address in enumerate(settings["gateway"]):
        own_port = free_port(settings["host"])
        registry_port = int(address.rpartition(":")[2])
        own = settings.with_values("serve", own_port=own_port, registry_port=registry_port)
        command = _command(Role.GATEWAY, own)
        children.append(ChildSpec(f"gateway-{i}", Role.GATEWAY, command, own_port=own_port))
    return children


class Child:
    """One process after another under one name, its output passed on line by line."""

    def __init__(self, spec: ChildSpec, output: TextIO, prefix: str) -> None:
        self.spec = spec
        self._output = output
        self._prefix = prefix
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run_once(self) -> int:
        """Start the process and wait until it has ended and its output is out; its status."""
        self._process = await asyncio.create_subprocess_exec(
            *self.spec.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.spec.environment},
            # a Ctrl-C of the terminal is the supervisor's, which then stops them in order
            process_group=0,
        )
        try:
            assert self._process.stdout is not None
            await self._pass_on(self._process.stdout)
            return await self._process.wait()
        finally:
            self.signal(signal.SIGKILL)
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if there is a process."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _pass_on(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while data := await stream.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            # a line without an end is passed on in parts
            if len(rest) > 1 << 20:
                lines, rest = [*lines, rest], b""
            self._write(lines)
        if rest:
            self._write([rest])

    def _write(self, lines: Iterable[bytes]) -> None:
        text = "".join(f"{self._prefix}{line.decode(errors='replace')}\n" for line in lines)
        with contextlib.suppress(BrokenPipeError):
            self._output.write(text)
            self._output.flush()


class Supervisor:
    """Starts the children, keeps them alive, and stops them in order."""

    def __init__(
        self, specs: list[ChildSpec], settings: Settings, output: TextIO = sys.stderr
    ) -> None:
        width = max(len(spec.name) for spec in specs)
        is_json = settings["log_format"] == "json"
        self._children = [
            Child(spec, output, "" if is_json else _prefix(spec.name, i, width, output))
            for i, spec in enumerate(specs)
        ]
        self._settings = settings
        self._stopping = asyncio.Event()
        self._interrupted = asyncio.Event()
        self._is_ready = False
        self._status = 0

    async def run(self) -> int:
        """Until a signal, or until a child ends before the stack was ready."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        keeping = [asyncio.create_task(self._keep_alive(child)) for child in self._children]
        announcing = asyncio.create_task(self._announce())
        await self._stopping.wait()
        announcing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await announcing
        draining = asyncio.create_task(self._drain(keeping))
        interrupted = asyncio.create_task(self._interrupted.wait())
        await asyncio.wait({draining, interrupted}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            self._status = INTERRUPTED_STATUS
        for task in (draining, interrupted, *keeping):
            task.cancel()
        # a cancelled keeper kills its process
        await asyncio.gather(draining, interrupted, *keeping, return_exceptions=True)
        return self._status

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._interrupted.set()
        else:
            logger.info("stopping; once more to stop at once")
            self._stopping.set()

    async def _keep_alive(self, child: Child) -> None:
        backoff_s = FIRST_BACKOFF_S
        while not self._stopping.is_set():
            started = time.monotonic()
            status = await child.run_once()
            if self._stopping.is_set():
                return
            if not self._is_ready:
                logger.error("%s ended with %s", child.spec.name, _describe(status))
                self._status = status if status > 0 else 1
                self._stopping.set()
                return
            if time.monotonic() - started > SETTLED_S:
                backoff_s = FIRST_BACKOFF_S
            logger.warning(
                "%s ended with %s; starting it again in %.1f s",
                child.spec.name,
                _describe(status),
                backoff_s,
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    async def _announce(self) -> None:
        started = time.monotonic()
        host, port = _reachable(self._settings["host"]), self._settings["port"]
        gateways = [c.spec for c in self._children if c.spec.role is Role.GATEWAY]
        for own_port in [gateway.own_port or port for gateway in gateways]:
            while not await asyncio.to_thread(_answers_ready, host, own_port):
                await asyncio.sleep(READY_POLL_S)
        self._is_ready = True
        name = self._settings["served_model_name"][0]
        shown = f"[{host}]" if ":" in host else host
        click.echo(
            f"ready at http://{shown}:{port} after {time.monotonic() - started:.1f} s: model {name}"
        )

    async def _drain(self, keeping: list["asyncio.Task[None]"]) -> None:
        """SIGTERM to the gateway, then to the workers; SIGKILL to who takes too long."""
        limit_s = self._settings["shutdown_timeout"] + EXIT_GRACE_S
        pairs = list(zip(self._children, keeping, strict=True))
        gateways = [pair for pair in pairs if pair[0].spec.role is Role.GATEWAY]
        workers = [pair for pair in pairs if pair[0].spec.role is not Role.GATEWAY]
        for group in (gateways, workers):
            for child, _ in group:
                child.signal(signal.SIGTERM)
            _, late = await asyncio.wait([task for _, task in group], timeout=limit_s)
            for child, task in group:
                if task in late:
                    logger.warning("%s has not ended in %.0f s: killed", child.spec.name, limit_s)
                    child.signal(signal.SIGKILL)
            await asyncio.wait([task for _, task in group])


def _command(role: Role, settings: Settings) -> tuple[str, ...]:
    # -P: a folder of our name where the user stands, such as a clone, is not what is imported
    python = (sys.executable, "-P", "-m", f"scission.services.{role}")
    return (*python, f"--parent-pid={os.getpid()}", *settings.to_flags())


def _fill_in(settings: Settings) -> Settings:
    """Resolve the model and choose what was left open, the same for all processes.

    Raises:
        ConfigError: one gateway's ports are given, but several gateways are to be started.
    """
    if settings["num_gateways"] > 1:
        for name in ("gateway", "registry_port", "own_port"):
            if not settings.values[name].is_default:
                raise ConfigError(
                    f"--{name.replace('_', '-')} names one gateway's port; "
                    f"{settings['num_gateways']} gateways choose theirs"
                )
    folder, name = resolve_model(settings["model"])
    settings = settings.with_values("serve", model=str(folder.resolve()))
    if not settings["served_model_name"]:
        settings = settings.with_values("serve", served_model_name=(name,))
    if settings["port"] == 0:
        settings = settings.with_values("serve", port=free_port(settings["host"]))
    registry_host = settings["registry_host"]
    if settings.values["registry_port"].is_default:
        settings = settings.with_values("serve", registry_port=free_port(registry_host))
    if settings.values["gateway"].is_default:
        host = _reachable(registry_host)
        address = f"[{host}]" if ":" in host else host
        others = [free_port(registry_host) for _ in range(settings["num_gateways"] - 1)]
        ports = [settings["registry_port"], *others]
        settings = settings.with_values(
            "serve", gateway=tuple(f"{address}:{port}" for port in ports)
        )
    return settings


def _require_free(flag: str, host: str, port: int) -> None:
    try:
        with listen(host, port):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{flag}: cannot listen on {host}:{port}: {reason}") from error


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _answers_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=2.0)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _names_devices(environment: "os._Environ[str]") -> bool:
    return any(environment.get(f"{kind}_VISIBLE_DEVICES") for kind in ("CUDA", "HIP", "ROCR"))


def _prefix(name: str, index: int, width: int, output: TextIO) -> str:
    prefix = f"{name:{width}} | "
    return click.style(prefix, fg=_COLOURS[index % len(_COLOURS)]) if output.isatty() else prefix


_COLOURS = ("cyan", "green", "magenta", "yellow", "blue")


def _describe(status: int) -> str:
    return f"status {status}" if status >= 0 else signal.Signals(-status).name
