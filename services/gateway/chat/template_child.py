"""The process in which chat templates are compiled and rendered, one conversation at a time.

A template may loop for ever or fill the memory, and no thread can be stopped from outside. Here the
kernel stops it: a timer of CPU time that ends the process, and a bound on its memory. The parent
starts another one (template_process.py). Imports nothing of the project but its frames.
"""

import json
import os
import resource
import signal
import socket
import sys
from typing import Any

import jinja2

from scission.services.gateway.chat.template_environment import TemplateRefusal, make_environment
from scission.services.gateway.chat.template_frames import receive_frame, send_frame

MAX_MESSAGE_CHARS = 1000


def main() -> None:
    """Serve the socket that is standard input until its other end closes."""
    # a ctrl-C is the parent's to judge
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    try:
        first = json.loads(receive_frame(connection))
        limits = first["limits"]
        _limit_memory(limits["memory_bytes"])
        templates, answer = _compile(first, limits["cpu_s"])
        send_frame(connection, answer)
        while True:
            request = json.loads(receive_frame(connection))
            _start_timer(limits["cpu_s"])
            answer = _render(templates[request["template"]], request["arguments"], limits)
            _start_timer(0)
            send_frame(connection, answer)
    except (EOFError, ConnectionError):
        return


def _limit_memory(max_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        max_bytes = min(max_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, hard))


def _start_timer(cpu_s: float) -> None:
    """After so much CPU time SIGPROF ends the process, wherever it is; 0 stops the timer."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def _compile(first: dict[str, Any], cpu_s: float) -> tuple[dict[str, jinja2.Template], bytes]:
    environment = make_environment()
    environment.globals.update(first["variables"])
    templates = {}
    _start_timer(cpu_s)
    try:
        for name, text in first["templates"].items():
            templates[name] = environment.from_string(text)
    except Exception as error:
        return {}, _answer(error=_describe(error))
    finally:
        _start_timer(0)
    return templates, _answer()


def _render(template: jinja2.Template, arguments: dict[str, Any], limits: dict[str, Any]) -> bytes:
    pieces = []
    room = limits["max_chars"]
    try:
        for piece in template.generate(arguments):
            room -= len(piece)
            if room < 0:
                return _answer(error=f"the prompt is longer than {limits['max_chars']} characters")
            pieces.append(piece)
        return _answer(prompt="".join(pieces))
    except TemplateRefusal as error:
        return _answer(refusal=_readable(str(error)))
    except Exception as error:
        return _answer(error=_describe(error))


def _describe(error: Exception) -> str:
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return _readable(f"{type(error).__name__}: {error}") + line


def _readable(text: str) -> str:
    return text[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()


def _answer(**fields: str) -> bytes:
    """Raises UnicodeEncodeError when a text holds half a surrogate pair."""
    return json.dumps(fields, ensure_ascii=False).encode()


if __name__ == "__main__":
    main()
