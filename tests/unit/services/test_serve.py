"""The supervisor over small programs in the place of gateway and workers: real processes."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from scission.common.errors import ConfigError
from scission.common.ports import free_port
from scission.common.settings import Settings, read_settings
from scission.common.types import Role
from scission.services.serve import (
    INTERRUPTED_STATUS,
    ChildSpec,
    Supervisor,
    _fill_in,
    plan_children,
)

GATEWAY = """
    import http.server, signal, sys, threading
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
        def log_message(self, *arguments):
            pass
    server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer)
    def stop(*arguments):
        print("gateway drained", flush=True)
        threading.Thread(target=server.shutdown).start()
    signal.signal(signal.SIGTERM, stop)
    server.serve_forever()
"""
WORKER = """
    import os, signal, sys
    print("worker", os.getpid(), flush=True)
    def stop(*arguments):
        print("worker drained", flush=True)
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    while True:
        signal.pause()
"""
STUBBORN = WORKER.replace("sys.exit(0)", "pass")
FAILING = "import sys; print('no such checkpoint', flush=True); sys.exit(2)"


@pytest.fixture
def stack() -> Settings:
    return read_settings(
        {"port": str(free_port("127.0.0.1")), "served_model_name": "tiny", "shutdown_timeout": "0"},
        {},
    )


def spec(name: str, role: Role, program: str, *arguments: str) -> ChildSpec:
    return ChildSpec(name, role, (sys.executable, "-c", textwrap.dedent(program), *arguments))


def specs(settings: Settings, worker: str = WORKER) -> list[ChildSpec]:
    return [
        spec("gateway", Role.GATEWAY, GATEWAY, str(settings["port"])),
        spec("decode-0", Role.DECODE, worker),
    ]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def supervise(
    settings: Settings,
    children: list[ChildSpec],
    meanwhile: Callable[[io.StringIO], Awaitable[None]],
) -> tuple[int, str]:
    output = io.StringIO()
    running = asyncio.create_task(Supervisor(children, settings, output).run())
    await meanwhile(output)
    return await asyncio.wait_for(running, 30), output.getvalue()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


async def test_a_ready_stack_is_announced_and_drains_gateway_first(
    stack: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    announced = ""

    async def meanwhile(output: io.StringIO) -> None:
        def is_announced() -> bool:
            nonlocal announced
            announced += capsys.readouterr().out
            return "ready at" in announced and "decode-0 | worker" in output.getvalue()

        await until(is_announced)
        interrupt()

    status, output = await supervise(stack, specs(stack), meanwhile)
    assert status == 0
    assert announced.startswith(f"ready at http://127.0.0.1:{stack['port']} after ")
    assert announced.endswith("model tiny\n")
    lines = output.splitlines()
    assert lines.index("gateway  | gateway drained") < lines.index("decode-0 | worker drained")


async def test_a_worker_that_dies_is_started_again(
    stack: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    announced = ""

    def pids(output: io.StringIO) -> list[int]:
        return [
            int(line.split()[-1])
            for line in output.getvalue().splitlines()
            if line.startswith("decode-0 | worker") and line.split()[-1].isdecimal()
        ]

    async def meanwhile(output: io.StringIO) -> None:
        def is_announced() -> bool:
            nonlocal announced
            announced += capsys.readouterr().out
            return "ready at" in announced and len(pids(output)) == 1

        await until(is_announced)
        os.kill(pids(output)[0], signal.SIGKILL)
        await until(lambda: len(pids(output)) == 2)
        interrupt()

    status, output = await supervise(stack, specs(stack), meanwhile)
    assert status == 0 and "worker drained" in output


async def test_a_child_that_cannot_start_ends_the_stack_with_its_status(stack: Settings) -> None:
    async def meanwhile(output: io.StringIO) -> None:
        pass

    # a gateway that never gets ready: the stack is still starting when the worker ends
    children = [
        spec("gateway", Role.GATEWAY, WORKER),
        spec("prefill-0", Role.PREFILL, FAILING),
    ]
    status, output = await supervise(stack, children, meanwhile)
    assert status == 2
    assert "no such checkpoint" in output


async def test_a_second_signal_stops_at_once(stack: Settings) -> None:
    async def meanwhile(output: io.StringIO) -> None:
        await until(lambda: "worker" in output.getvalue())
        interrupt()
        await until(lambda: "worker drained" in output.getvalue())
        interrupt()

    status, _ = await supervise(stack, specs(stack, STUBBORN), meanwhile)
    assert status == INTERRUPTED_STATUS


async def test_a_child_that_will_not_stop_is_killed(
    stack: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scission.services.serve.EXIT_GRACE_S", 0.2)

    async def meanwhile(output: io.StringIO) -> None:
        await until(lambda: "worker" in output.getvalue())
        interrupt()

    status, _ = await supervise(stack, specs(stack, STUBBORN), meanwhile)
    assert status == 0


def test_no_child_outlives_its_supervisor() -> None:
    child = (
        "import os, sys, time\n"
        "from scission.common.processes import die_with\n"
        "die_with(int(sys.argv[1]))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())])\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": "src"}
    with subprocess.Popen(
        [sys.executable, "-c", parent, child], env=environment, stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline().strip().isdecimal()
        supervisor.kill()
        # the pipe ends when its last holder, the child, has gone
        assert supervisor.stdout.read() == ""


def test_an_orphan_does_not_start() -> None:
    code = "from scission.common.processes import die_with; die_with(1 << 30)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1 and "has gone" in done.stderr


def test_counts_and_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    settings = read_settings({"prefill": "2", "decode": "2", "device": "cpu"}, {})
    children = plan_children(settings, num_gpus=0)
    assert [child.name for child in children] == [
        "gateway",
        "prefill-0",
        "prefill-1",
        "decode-0",
        "decode-1",
    ]
    assert all("--threads=2" in child.command for child in children)


def test_gateways_share_the_port_and_each_has_its_own_beside_it() -> None:
    settings = _fill_in(read_settings({"num_gateways": "3", "device": "cpu", "port": "8123"}, {}))
    gateways = [c for c in plan_children(settings, num_gpus=0) if c.role is Role.GATEWAY]
    assert [gateway.name for gateway in gateways] == ["gateway-0", "gateway-1", "gateway-2"]
    assert all("--port=8123" in gateway.command for gateway in gateways)
    own = {f"--own-port={gateway.own_port}" for gateway in gateways}
    assert len(own) == 3
    assert all(len(own & set(gateway.command)) == 1 for gateway in gateways)
    # workers know all of their registries
    decode = plan_children(settings, num_gpus=0)[-1]
    assert sum(flag.startswith("--gateway=") for flag in decode.command) == 3


def test_ports_of_one_gateway_are_refused_for_several() -> None:
    with pytest.raises(ConfigError, match="--registry-port names one gateway's port; 2 gateways"):
        _fill_in(read_settings({"num_gateways": "2", "registry_port": "8010"}, {}))


def test_workers_share_gpus_and_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    settings = read_settings({"prefill": "2", "decode": "2"}, {})
    workers = plan_children(settings, num_gpus=2)[1:]
    devices = [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in workers]
    assert devices == ["0", "1", "0", "1"]
    assert all("--gpu-memory-utilization=0.45" in worker.command for worker in workers)


def test_children_import_the_package_and_not_a_folder_of_its_name(
    stack: Settings, tmp_path: Path
) -> None:
    decoy = tmp_path / "scission/services/decode/__main__.py"
    decoy.parent.mkdir(parents=True)
    decoy.write_text("print('decoy')")
    decoy.with_name("__init__.py").touch()
    decode = plan_children(stack, num_gpus=0)[-1]
    done = subprocess.run(
        [*decode.command, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("Usage: "), done.stderr
