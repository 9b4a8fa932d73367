"""Templates that loop, grow or break harm neither the gateway nor the next conversation."""

import asyncio
import gc
import os
import signal
import time
from datetime import datetime

import pytest

from scission.common.errors import CapacityError, CheckpointError, RequestError
from scission.services.gateway.chat.template_process import (
    TemplateLimits,
    TemplateProcess,
    TemplateRenderer,
)

LIMITS = TemplateLimits(cpu_s=0.3, wall_s=30.0, memory_bytes=400 << 20, max_chars=1000)


def render(template: str, limits: TemplateLimits = LIMITS, **arguments: object) -> str:
    renderer = TemplateRenderer({"default": template}, {"bos_token": "<s>"}, limits, processes=1)
    return asyncio.run(renderer.render("default", arguments))


def test_helpers_that_published_templates_rely_on_are_there() -> None:
    template = (
        "{{ bos_token }}{% for i in items %}\n"
        "  {% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}\n"
        "{{ i }}{% endfor %}|{% generation %}g{% endgeneration %}|"
        "{{ {'b': '<é>', 'a': 1} | tojson }}|{{ [1] | tojson(indent=2) }}|"
        "{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{{ dict(a=1).a }}"
    )
    assert render(template, items=[0, 1, 2, 3]) == ('<s>02|g|{"b": "<é>", "a": 1}|[\n  1\n]|21')
    assert render("{{ strftime_now('%Y') }}") == datetime.now().strftime("%Y")


LONG_LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
COSTLY = {
    "a loop in Jinja": (LONG_LOOP, "CPU time"),
    "a loop in C": ("{{ '%d' % (7 ** 9999999) }}", "CPU time|OverflowError|ValueError"),
    "a prompt without end": (LONG_LOOP.replace("{% endfor %}", "x{% endfor %}", 1), "characters"),
    "one huge text": ("{% set x = 'x' * 2000000000 %}{{ x }}", "MemoryError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError|CPU"),
    "private attributes": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "private names in a namespace": ("{% set n = namespace(__class__=1) %}", "SecurityError"),
    "a change of the messages": ("{{ items.append(1) }}", "SecurityError"),
}


@pytest.mark.parametrize("case", COSTLY)
def test_a_template_that_takes_too_much_is_stopped(case: str) -> None:
    template, problem = COSTLY[case]
    start = time.monotonic()
    with pytest.raises((RequestError, CheckpointError), match=problem):
        render(template, items=[])
    assert time.monotonic() - start < 20


async def test_the_event_loop_turns_while_a_template_hangs() -> None:
    renderer = TemplateRenderer(
        {"default": "{% if hang %}" + LONG_LOOP + "{% endif %}ok"}, {}, LIMITS, processes=2
    )
    hanging = asyncio.create_task(renderer.render("default", {"hang": True}))
    for _ in range(3):
        # the other process serves meanwhile
        assert await renderer.render("default", {}) == "ok"
    with pytest.raises(RequestError, match="CPU time"):
        await hanging
    assert [await renderer.render("default", {}) for _ in range(3)] == ["ok"] * 3


def test_a_process_that_stands_still_is_killed_after_the_wall_time() -> None:
    process = TemplateProcess({"default": "ok"}, {}, TemplateLimits(wall_s=0.2))
    process.start()
    assert process._child is not None
    os.kill(process._child.pid, signal.SIGSTOP)
    with pytest.raises(RequestError, match=r"longer than 0\.2 s"):
        process.render(b'{"template": "default", "arguments": {}}')
    slower = TemplateProcess({"default": "ok"}, {}, TemplateLimits())
    assert slower.render(b'{"template": "default", "arguments": {}}') == "ok"
    slower.close()


def test_a_process_that_was_killed_meanwhile_is_started_again() -> None:
    process = TemplateProcess({"default": "ok"}, {}, LIMITS)
    for _ in range(2):
        assert process.render(b'{"template": "default", "arguments": {}}') == "ok"
        assert process._child is not None
        process._child.kill()
        process._child.wait()
    process.close()


def test_templates_that_do_not_compile_are_an_error_at_start() -> None:
    with pytest.raises(CheckpointError, match=r"TemplateSyntaxError: .*\(line 2\)"):
        TemplateRenderer({"default": "ok\n{% if %}"}, {}, LIMITS)
    # powers of constants are computed by the compiler
    with pytest.raises(CheckpointError, match="CPU time"):
        TemplateRenderer({"default": "{{ 9 ** (9 ** 9) }}"}, {}, LIMITS)


async def test_waiting_conversations_are_bounded() -> None:
    renderer = TemplateRenderer({"default": "ok"}, {}, LIMITS, processes=1, max_waiting=2)
    results = await asyncio.gather(
        *(renderer.render("default", {}) for _ in range(3)), return_exceptions=True
    )
    assert results[:2] == ["ok", "ok"]
    assert isinstance(results[2], CapacityError)


async def test_half_a_character_in_a_prompt_is_the_requests_fault() -> None:
    renderer = TemplateRenderer({"default": "{{ x }}"}, {}, LIMITS, processes=1)
    with pytest.raises(RequestError, match="UnicodeEncodeError"):
        await renderer.render("default", {"x": "\ud800"})
    assert await renderer.render("default", {"x": 2**70}) == str(2**70)


def test_processes_end_with_their_renderer() -> None:
    renderer = TemplateRenderer({"default": "ok"}, {}, LIMITS, processes=1)
    process = renderer._idle.queue[0]
    child = process._child
    assert child is not None and child.poll() is None
    del renderer
    gc.collect()
    assert child.poll() is not None
