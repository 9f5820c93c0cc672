"""Programs at a terminal or in a pipe: their status, and what they print, when something goes wrong outside of them."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from dynaroute.errors import DynarouteError
from dynaroute.pipeline.terminal import program
with program("me"):
    {}
"""
BUFFERED, UNBUFFERED = [sys.executable, "-c"], [sys.executable, "-u", "-c"]


def run(python, body, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **environment):
    environment = os.environ | {"PYTHONUNBUFFERED": ""} | environment
    command = [*python, PROGRAM.format(body)]
    return subprocess.run(command, stdout=stdout, stderr=stderr, env=environment, text=True, timeout=60)


@pytest.fixture
def closed_pipe():
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("python", [BUFFERED, UNBUFFERED], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("body", ["print('a')", "print('a' * 10**6)", "print('a'); raise SystemExit"])
def test_a_closed_pipe_ends_a_program_quietly(closed_pipe, python, body):
    done = run(python, body, stdout=closed_pipe)
    assert (done.returncode, done.stderr) == (141, "")
    assert run(python, body, stdout=closed_pipe, stderr=closed_pipe).returncode == 141
    done = run(python, f"sys.stdout = sys.stderr; {body}", stderr=closed_pipe)
    assert (done.returncode, done.stdout) == (141, "")


def test_a_mistake_is_told_although_nobody_reads_the_output(closed_pipe):
    done = run(BUFFERED, "print('a'); raise DynarouteError('no such thing')", stdout=closed_pipe)
    assert (done.returncode, done.stderr) == (1, "me: no such thing\n")


def test_a_pipe_that_is_not_stdout_is_a_bug():
    done = run(BUFFERED, "raise BrokenPipeError(32, 'of a worker')")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "BrokenPipeError: [Errno 32] of a worker")


@pytest.mark.parametrize("body", ["print('a')", "print('a', flush=True)"])
def test_a_full_disk_is_one_line(body):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = run(BUFFERED, body, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("me: ")
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("stream", "closed"), [("out", ">&-"), ("err", "2>&-"), ("err", ">&- 2>&-")])
def test_a_program_runs_without_any_output(stream, closed):
    command = [sys.executable, "-c", PROGRAM.format(f"print(1, file=sys.std{stream})")]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_characters_that_stdout_cannot_encode_are_replaced():
    done = run(BUFFERED, r"print('caf\xe9 \ud800')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "caf? ?\n")
