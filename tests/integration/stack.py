"""The real thing on loopback: every gateway, prefill and decode a process of its own, killed and
counted by tests.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from scission.common.ports import free_port

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
# leases are short, so that a test sees them end
FLAGS = (
    "--device=cpu",
    "--numerics=exact",
    "--threads=1",
    "--num-gpu-blocks-override=256",
    "--max-num-seqs=64",
    "--retain-lease-s=5",
    "--commit-lease-s=0.5",
    "--shutdown-timeout=5",
)


class Stack:
    """Processes by name: gateway-0, prefill-0, decode-0, ... Workers register at every gateway."""

    def __init__(
        self,
        model: Path,
        log_dir: Path,
        *,
        prefills: int = 1,
        decodes: int = 1,
        gateways: int = 1,
        flags: Sequence[str] = (),
    ) -> None:
        self._model = model
        self._log_dir = log_dir
        self._flags = [*FLAGS, *flags]
        self._http_ports = [free_port(HOST) for _ in range(gateways)]
        self._registry_ports = [free_port(HOST) for _ in range(gateways)]
        self._names = [
            *(f"gateway-{i}" for i in range(gateways)),
            *(f"prefill-{i}" for i in range(prefills)),
            *(f"decode-{i}" for i in range(decodes)),
        ]
        self._grpc_ports = {
            name: free_port(HOST) for name in self._names if not name.startswith("gateway")
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.http = httpx.Client(timeout=60.0)

    def __enter__(self) -> Self:
        try:
            for name in self._names:
                self.start(name)
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def url(self, path: str = "", gateway: int = 0) -> str:
        return f"http://{HOST}:{self._http_ports[gateway]}{path}"

    def start(self, name: str, *flags: str) -> None:
        """Start (or, after its death, start anew) the process of that name, with further flags."""
        role, index = name.split("-")
        command = [
            sys.executable,
            "-m",
            f"scission.services.{role}",
            str(self._model),
            *self._flags,
        ]
        if role == "gateway":
            command += [
                f"--port={self._http_ports[int(index)]}",
                f"--registry-port={self._registry_ports[int(index)]}",
            ]
        else:
            command.append(f"--grpc-port={self._grpc_ports[name]}")
            command += [f"--gateway={HOST}:{port}" for port in self._registry_ports]
        command += flags
        with (self._log_dir / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")]),
                    "OMP_NUM_THREADS": "1",
                },
            )

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)
        if number == signal.SIGKILL:
            self.processes[name].wait()

    def kill(self, name: str) -> None:
        self.signal(name, signal.SIGKILL)

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
        for process in self.processes.values():
            process.wait()
        self.http.close()

    def log(self, name: str) -> str:
        return (self._log_dir / f"{name}.log").read_text(errors="replace")

    def workers(self, gateway: int = 0) -> list[dict[str, Any]]:
        """What the gateway knows of its workers."""
        found: list[dict[str, Any]] = self.http.get(self.url("/workers", gateway)).json()["workers"]
        return found

    def ready_workers(self, gateway: int = 0) -> set[str]:
        """Names of the workers that answer that gateway."""
        ports = {port: name for name, port in self._grpc_ports.items()}
        return {
            ports[int(worker["grpc_address"].rpartition(":")[2])]
            for worker in self.workers(gateway)
            if worker["state"] == "ready"
        }

    def wait_ready(self, gateway: int = 0) -> None:
        """Until /ready is 200 and every worker that was started answers."""

        def is_ready() -> bool:
            for name, process in self.processes.items():
                assert process.poll() is None or process.returncode == -signal.SIGKILL, self.log(
                    name
                )
            try:
                if self.http.get(self.url("/ready", gateway)).status_code != httpx.codes.OK:
                    return False
                return self.ready_workers(gateway) == self._grpc_ports.keys()
            except httpx.TransportError:
                return False

        wait_until(is_ready, START_TIMEOUT_S, "the stack is ready")

    def revive(self, name: str) -> None:
        """Bring a killed or frozen worker back, and wait until it serves."""
        if self.processes[name].poll() is None:
            self.signal(name, signal.SIGCONT)
        else:
            wait_until(lambda: name not in self.ready_workers(), 10.0, f"{name} is known dead")
            self.start(name)
        self.wait_ready()

    def metrics(self, address: str) -> dict[str, float]:
        """A worker's samples, `name{label=value,...}` -> value, without the labels all have."""
        samples: dict[str, float] = {}
        for family in text_string_to_metric_families(
            self.http.get(f"http://{address}/metrics").text
        ):
            for sample in family.samples:
                labels = {
                    k: v
                    for k, v in sample.labels.items()
                    if k not in ("model_name", "role", "instance")
                }
                suffix = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
                samples[f"{sample.name}{{{suffix}}}" if suffix else sample.name] = sample.value
        return samples

    def blocks(self, address: str) -> dict[str, float]:
        """Blocks of cache by state."""
        prefix = "scission_kv_blocks{state="
        return {
            name.removeprefix(prefix).removesuffix("}"): value
            for name, value in self.metrics(address).items()
            if name.startswith(prefix)
        }

    def busy(self, role: str) -> str | None:
        """The name of a worker of that role which the gateway has given a request to."""
        for worker in self.workers():
            if worker["role"] == role and worker["num_requests"]:
                port = int(worker["grpc_address"].rpartition(":")[2])
                return next(name for name, p in self._grpc_ports.items() if p == port)
        return None

    def is_drained(self) -> bool:
        """Every living worker holds nothing but free and cached blocks."""
        for worker in self.workers():
            try:
                blocks = self.blocks(worker["metrics_address"])
            except httpx.TransportError:  # dead, and about to be dropped from the list
                return False
            held = {k: v for k, v in blocks.items() if v}
            if held.keys() - {"free", "cached"}:
                return False
        return True

    def wait_drained(self, timeout_s: float = 10.0) -> None:
        wait_until(self.is_drained, timeout_s, "every pool is free or cached")

    def complete(
        self, prompt: str | list[int], *, gateway: int = 0, **fields: Any
    ) -> dict[str, Any]:
        """One completion, whole; raises on any status but 200."""
        body = {"prompt": prompt, "temperature": 0, "return_token_ids": True, **fields}
        response = self.http.post(self.url("/v1/completions", gateway), json=body)
        assert response.status_code == httpx.codes.OK, response.text
        answer: dict[str, Any] = response.json()
        return answer

    @contextmanager
    def stream(
        self, prompt: str | list[int], *, gateway: int = 0, **fields: Any
    ) -> Iterator[Iterator[dict[str, Any]]]:
        """One streamed completion as its parsed events up to `[DONE]`; an error is an event too."""
        body = {
            "prompt": prompt,
            "temperature": 0,
            "return_token_ids": True,
            "stream": True,
            **fields,
        }
        with httpx.Client(timeout=60.0) as client:
            with client.stream("POST", self.url("/v1/completions", gateway), json=body) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise AssertionError(f"{response.status_code}: {response.text}")
                yield _events(response.iter_lines())


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: "):
            if line == "data: [DONE]":
                return
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")


def token_ids_of(event: Mapping[str, Any]) -> list[int]:
    """The tokens that one event or one whole answer brings for its first choice."""
    assert "error" not in event, event
    return [token for choice in event["choices"] for token in choice.get("token_ids") or ()]


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until the condition holds; fails the test with `what` when it does not in time."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
