"""Rendering chat templates in processes of their own, which are ended when they take too much."""

import asyncio
import contextlib
import json
import queue
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from scission.common.errors import CapacityError, CheckpointError, RequestError, UnavailableError
from scission.services.gateway.chat.template_frames import receive_frame, send_frame

CHILD = "scission.services.gateway.chat.template_child"
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class TemplateLimits:
    """What one conversation may cost. An everyday one takes a millisecond."""

    cpu_s: float = 5.0
    wall_s: float = 20.0  # on a machine that has other things to do
    memory_bytes: int = 2 << 30  # of the process, everything included
    max_chars: int = 64 << 20  # of a prompt


class TemplateProcess:
    """One child process; its calls block. It is started when it is needed, also after its end."""

    def __init__(
        self, templates: Mapping[str, str], variables: Mapping[str, str], limits: TemplateLimits
    ) -> None:
        self._first = orjson.dumps(
            {"templates": dict(templates), "variables": dict(variables), "limits": asdict(limits)}
        )
        self._limits = limits
        self._connection: socket.socket | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, which compiles the templates.

        Raises:
            CheckpointError: they do not compile, or not within the limits.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", CHILD],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._connection = ours
        try:
            answer = self._exchange(self._first, START_TIMEOUT_S)
        except (OSError, EOFError) as error:
            problem = self._end(error) or f"its process ended ({error})"
            raise CheckpointError(f"the chat template cannot be compiled: {problem}") from error
        if "error" in answer:
            self.close()
            raise CheckpointError(f"the chat template cannot be compiled: {answer['error']}")

    def render(self, request: bytes) -> str:
        """The prompt of one request frame.

        Raises:
            RequestError: the template refuses the conversation, fails, or takes too much.
            UnavailableError: the process was ended by something else.
        """
        if self._child is not None and self._child.poll() is not None:
            self.close()
        if self._child is None:
            self.start()
        try:
            answer = self._exchange(request, self._limits.wall_s)
        except (OSError, EOFError) as error:
            problem = self._end(error)
            if problem is None:
                raise UnavailableError("the chat template's process ended; try again") from error
            raise _not_rendered(problem) from error
        if "refusal" in answer:
            raise RequestError(answer["refusal"], param="messages")
        if "error" in answer:
            raise _not_rendered(answer["error"])
        return answer["prompt"]

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._connection is not None:
            self._connection.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._connection = self._child = None

    def _exchange(self, frame: bytes, timeout_s: float) -> dict[str, str]:
        assert self._connection is not None
        deadline = time.monotonic() + timeout_s
        self._connection.settimeout(timeout_s)
        send_frame(self._connection, frame)
        self._connection.settimeout(max(0.001, deadline - time.monotonic()))
        answer: dict[str, str] = orjson.loads(receive_frame(self._connection))
        return answer

    def _end(self, error: Exception) -> str | None:
        """Collect the process after a failed exchange: which limit it broke, None if none."""
        child = self._child
        assert child is not None
        is_ending = not isinstance(error, TimeoutError)
        if is_ending:
            # it closed the socket, so the kernel has all but finished with it
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.0)
        self.close()
        if not is_ending:
            return f"it took longer than {self._limits.wall_s:g} s"
        if child.returncode == -signal.SIGPROF:
            return f"it took more than {self._limits.cpu_s:g} s of CPU time"
        return None


class TemplateRenderer:
    """Renders conversations in a few processes, without holding up the event loop."""

    def __init__(
        self,
        templates: Mapping[str, str],
        variables: Mapping[str, str],
        limits: TemplateLimits | None = None,
        *,
        processes: int = 2,
        max_waiting: int = 256,
    ) -> None:
        """Raises CheckpointError when the templates do not compile."""
        limits = limits or TemplateLimits()
        children = [TemplateProcess(templates, variables, limits) for _ in range(processes)]
        children[0].start()
        self._idle: queue.LifoQueue[TemplateProcess] = queue.LifoQueue()
        for child in reversed(children):
            self._idle.put(child)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="template")
        self._num_waiting = 0
        self._max_waiting = max_waiting
        weakref.finalize(self, _close_all, children)

    async def render(self, template: str, arguments: Mapping[str, Any]) -> str:
        """The prompt; `arguments` are plain JSON values.

        Raises:
            RequestError, UnavailableError: as TemplateProcess.render says.
            CapacityError: too many conversations wait already.
        """
        if self._num_waiting >= self._max_waiting:
            raise CapacityError("too many conversations wait to be rendered", retry_after_s=1.0)
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._render, template, arguments
            )
        finally:
            self._num_waiting -= 1

    def _render(self, template: str, arguments: Mapping[str, Any]) -> str:
        frame = {"template": template, "arguments": arguments}
        try:
            request = orjson.dumps(frame)
        except TypeError:
            # an integer of over 64 bits or half a surrogate pair: the slower encoder takes them
            request = json.dumps(frame).encode()
        # there are as many as threads
        process = self._idle.get_nowait()
        try:
            return process.render(request)
        finally:
            self._idle.put(process)


def _close_all(children: list[TemplateProcess]) -> None:
    for child in children:
        child.close()


def _not_rendered(problem: str) -> RequestError:
    return RequestError(
        f"the chat template cannot render this conversation: {problem}", param="messages"
    )
