"""How a stage process ends, as its parent sees it."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLEEP = "print('ready', flush=True); time.sleep(60)"

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a stage with the given body, which is gone when the test ends."""
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "params.yaml").touch()
    processes: list[subprocess.Popen[str]] = []

    def start(body: str, stdin: Any = subprocess.PIPE, **environment: str) -> subprocess.Popen[str]:
        lines = ["import atexit, os, sys, time", "from ldm.base.errors import InputError"]
        lines += ["from ldm.stages.stage import stage_main, stop_at_checkpoint", "def run(root):"]
        lines += ["    " + line for line in (body or "pass").splitlines()] + ["stage_main('toy', run)"]
        clean = {name: value for name, value in os.environ.items() if name != "LDM_OWNER_PIPE"}
        process = subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines)],
            cwd=tmp_path,
            env={**clean, "PYTHONPATH": str(ROOT), **environment},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None and process.stdout.readline() == "ready\n"


def end(process: subprocess.Popen[str], seconds: float = 10) -> tuple[int, str]:
    """Exit code and stderr of a stage that ends by itself in time."""
    assert process.stderr is not None
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < deadline, "the stage goes on"
        time.sleep(0.01)
    return process.returncode, process.stderr.read()


def test_a_stage_that_returns_ends_with_0(start: Start) -> None:
    assert end(start("")) == (0, "")


def test_bad_input_is_one_line_and_exit_code_2(start: Start) -> None:
    assert end(start("raise InputError('params.yaml: unknown key data.sise')")) == (
        2,
        "error: params.yaml: unknown key data.sise\n",
    )


def test_an_argument_that_a_stage_does_not_take_is_bad_input() -> None:
    command = [sys.executable, "-m", "ldm.stages.evaluate", "sgld"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: evaluate: found 'sgld', which this stage does not take\n")


def test_outside_of_a_project_is_bad_input(start: Start, tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").unlink()
    code, words = end(start(""))
    assert code == 2
    assert words.startswith("error: ") and words.count("\n") == 1 and "no dvc.yaml" in words


def test_any_other_failure_keeps_its_traceback(start: Start) -> None:
    code, words = end(start("raise ValueError('a bug')"))
    assert code == 1
    assert "Traceback" in words and "ValueError: a bug" in words


def test_a_closed_owner_pipe_ends_a_stage_that_waits(start: Start) -> None:
    """Waiting in the system, where only a real signal arrives; what the stage holds is let go."""
    process = start(f"try:\n    {SLEEP}\nfinally:\n    print('let go', flush=True)", LDM_OWNER_PIPE="1")
    ready(process)
    time.sleep(0.2)  # until it waits
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    assert end(process) == (130, "toy: stopped\n")
    assert process.stdout.read() == "let go\n"


def test_a_closed_owner_pipe_ends_a_stage_that_works(start: Start) -> None:
    process = start("print('ready', flush=True)\nwhile True: sum(range(1000))", LDM_OWNER_PIPE="1")
    ready(process)
    assert process.stdin is not None
    process.stdin.close()
    assert end(process) == (130, "toy: stopped\n")


def test_an_owner_killed_with_9_takes_its_stage_along(start: Start, tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE)  # holds the other end
    assert owner.stdout is not None
    process = start(SLEEP, stdin=owner.stdout, LDM_OWNER_PIPE="1")
    owner.stdout.close()
    ready(process)
    owner.kill()
    owner.wait()
    assert end(process) == (130, "toy: stopped\n")


def test_an_owner_that_lives_does_not_stop_its_stage(start: Start) -> None:
    process = start("time.sleep(0.3)", LDM_OWNER_PIPE="1")
    assert process.stdin is not None
    process.stdin.write("chatter\n")
    process.stdin.flush()
    assert end(process) == (0, "")


def test_without_an_owner_stdin_means_nothing(start: Start) -> None:
    assert end(start("time.sleep(0.3)", stdin=subprocess.DEVNULL)) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_stage_with_130_and_no_traceback(number: signal.Signals, start: Start) -> None:
    process = start(f"try:\n    {SLEEP}\nfinally:\n    print('let go', flush=True)")
    ready(process)
    process.send_signal(number)
    assert end(process) == (130, "toy: stopped\n")
    assert process.stdout is not None and process.stdout.read() == "let go\n"


POLLING = """
try:
    with stop_at_checkpoint() as should_stop:
        print('ready', flush=True)
        while not should_stop(): time.sleep(0.05)
        time.sleep(0.3)
        print('saved', flush=True)
        raise KeyboardInterrupt('stopped at a checkpoint after 64 images')
finally:
    print('let go', flush=True)
"""


@pytest.mark.parametrize("how", ["signal", "pipe", "both"])
def test_a_loop_that_polls_reaches_its_checkpoint(how: str, start: Start) -> None:
    process = start(POLLING, LDM_OWNER_PIPE="1")
    ready(process)
    assert process.stdin is not None and process.stdout is not None
    if how != "pipe":
        process.send_signal(signal.SIGTERM)
    if how != "signal":
        process.stdin.close()
    assert end(process) == (130, "toy: stopped at a checkpoint after 64 images\n")
    assert process.stdout.read() == "saved\nlet go\n"


def test_a_second_signal_on_the_way_out_changes_nothing(start: Start) -> None:
    """Ctrl-C reaches the whole group, and then the owner closes the pipe or sends SIGTERM as well."""
    process = start(f"atexit.register(time.sleep, 0.5)\n{SLEEP}")
    ready(process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert select.select([process.stderr], [], [], 10)[0]
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert end(process) == (130, "toy: stopped\n")
