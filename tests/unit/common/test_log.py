import asyncio
import io
import json
import logging
from collections.abc import Iterator

import pytest

from scission.common.config import LogOptions
from scission.common.log import bind_request, request_logger, set_up_logging


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_json_line_has_the_request_and_the_event_fields(stream: io.StringIO) -> None:
    set_up_logging(LogOptions(format="json"), "prefill", stream)
    logger = request_logger(logging.getLogger("scission.x"), "7-1")
    logger.info("granted %d blocks", 3, extra={"wait_s": 0.5})
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "role": "prefill",
        "logger": "scission.x",
        "message": "granted 3 blocks",
        "request_id": "7-1",
        "wait_s": 0.5,
    }


async def test_tasks_do_not_share_a_request(stream: io.StringIO) -> None:
    set_up_logging(LogOptions(), "gateway", stream)
    logger = logging.getLogger("scission.x")
    both_bound = asyncio.Barrier(2)

    async def work(request_id: str) -> None:
        with bind_request(request_id):
            await both_bound.wait()
            logger.info("working for %s", request_id)

    await asyncio.gather(work("a-1"), work("b-2"))
    lines = sorted(stream.getvalue().splitlines(), key=lambda line: line[-3:])
    assert [("[a-1]" in line, "[b-2]" in line) for line in lines] == [(True, False), (False, True)]


def test_a_message_cannot_forge_a_second_line(stream: io.StringIO) -> None:
    set_up_logging(LogOptions(), "gateway", stream)
    logging.getLogger("scission.x").warning("name %s", "x\n2026 INFO forged")
    assert stream.getvalue().count("\n") == 1


def test_exceptions_keep_their_traceback(stream: io.StringIO) -> None:
    set_up_logging(LogOptions(format="json"), "decode", stream)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("scission.x").exception("failed")
    assert "ValueError: boom" in json.loads(stream.getvalue())["exception"]


def test_lines_below_the_level_are_left_out(stream: io.StringIO) -> None:
    set_up_logging(LogOptions(level="warning"), "decode", stream)
    logging.getLogger("scission.x").info("quiet")
    assert stream.getvalue() == ""
