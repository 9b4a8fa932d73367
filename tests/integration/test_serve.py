"""`scission serve` as a user starts it: a chat answered, a death survived, a clean end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import openai
import pytest

from scission.common.ports import free_port

ROOT = Path(__file__).parents[2]
START_S = 90.0


class Stack:
    """A running `scission serve`; its log goes to a file."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.log = log

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, None
        except OSError:
            return 0, None

    def children(self) -> dict[str, int]:
        """role -> pid of the processes under the supervisor."""
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not folder.name.isdecimal():
                    continue
                # "pid (name) state parent ..."; the name may hold blanks
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                words = (folder / "cmdline").read_text().split("\0")
                if parent == self.process.pid and "-m" in words:
                    role = words[words.index("-m") + 1].rpartition(".")[2]
                    found[role] = int(folder.name)
        return found

    def until(self, condition: Callable[[], bool], limit_s: float = START_S) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)

    def chat(self) -> str:
        client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="scission-nano",
            messages=[{"role": "user", "content": "Hello!"}],
            max_tokens=8,
            temperature=0,
        )
        assert answer.usage is not None and answer.usage.completion_tokens >= 1
        return answer.choices[0].message.content or ""


def start(log: TextIO, *flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "scission.services.cli", "serve", "--device=cpu", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    port = free_port("127.0.0.1")
    log = tmp_path / "serve.log"
    flags = (f"--port={port}", "--threads=1", "--num-gpu-blocks-override=64", "--max-num-seqs=4")
    with log.open("w") as file, start(file, *flags) as process:
        running = Stack(process, port, log)
        try:
            running.until(lambda: running.get("/ready")[0] == 200)
            yield running
        finally:
            process.kill()


def test_one_command_answers_a_chat_and_ends_cleanly(stack: Stack) -> None:
    first = stack.chat()
    assert stack.chat() == first
    assert stack.get("/v1/models")[1]["data"][0]["id"] == "scission-nano"

    # a dead worker comes back by itself, and the same answer with it
    decode = stack.children()["decode"]
    os.kill(decode, signal.SIGKILL)
    stack.until(lambda: stack.children().get("decode", decode) != decode)
    stack.until(lambda: stack.get("/ready")[0] != 200, 10)
    stack.until(lambda: stack.get("/ready")[0] == 200)
    assert stack.chat() == first

    stack.process.terminate()
    assert stack.process.wait(30) == 0, stack.log.read_text()
    assert stack.process.stdout is not None
    assert f"ready at {stack.url} after" in stack.process.stdout.read()
    assert stack.children() == {}
    assert "Traceback" not in stack.log.read_text()


def test_nothing_is_left_when_the_supervisor_is_killed(stack: Stack) -> None:
    pids = stack.children().values()
    assert len(pids) == 3
    stack.process.kill()
    stack.process.wait(10)
    end = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
