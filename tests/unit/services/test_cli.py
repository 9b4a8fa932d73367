import json
import os
import subprocess
import sys
import time

import click.testing
import pytest

from scission.services.cli import make_command


def run(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(make_command(), arguments, prog_name="scission")


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["decode", "--help"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from scission.services.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'grpc', 'fastapi', 'transformers', 'rich', 'huggingface_hub', 'zmq'}\n"
        "print('slow:', *sorted(slow & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Usage: " in done.stdout
    assert done.stdout.splitlines()[-1] == "slow:"


def test_every_command_has_help() -> None:
    listed = run("--help").output
    for name in ("serve", "gateway", "prefill", "decode", "bench", "inspect", "doctor", "version"):
        assert name in listed
        assert run(name, "--help").exit_code == 0


def test_a_wrong_command_is_answered_with_the_nearest_one() -> None:
    result = run("serv")
    assert result.exit_code == 2
    assert "(did you mean serve?)" in result.output


def test_version_names_what_it_stands_on() -> None:
    found = json.loads(run("version", "--json").output)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"][0].isdigit()


def test_inspect_of_no_checkpoint_is_one_line_and_status_1() -> None:
    result = run("inspect", "/no/such/folder")
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1


def test_without_the_workers_packages_a_command_says_what_it_lacks() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from scission.services.cli import main\n"
        "main(['inspect', '/no/such/folder'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "needs torch" in done.stderr and "scission[worker]" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_serve_refuses_a_taken_port_before_it_starts_anything() -> None:
    from scission.common.ports import listen

    with listen("127.0.0.1", 0) as listener:
        started = time.monotonic()
        result = run("serve", "--port", str(listener.getsockname()[1]))
    assert result.exit_code == 2
    assert "--port: cannot listen on 127.0.0.1" in result.output
    assert time.monotonic() - started < 5
