"""How a stage process ends, as its parent sees it; the identity of its work; its progress lines."""

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.errors import InputError
from ldm.stages.runtime import Progress, work_folder, work_key

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
        lines = ["import atexit, os, sys, time", "from ldm.errors import InputError"]
        lines += ["from ldm.stages.runtime import stage_main, stop_at_checkpoint", "def run(root):"]
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


# the identity of a run and who holds it


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source file of a module of ours that is loaded."""
    path = tmp_path / "loop.py"
    path.write_text("x = 1\n")
    module = types.ModuleType("ldm.training.loop")
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return path


def test_a_key_names_parameters_inputs_and_code(edited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, inputs = {"seed": 0, "lr": 0.1}, {"shards": "aa"}
    key = work_key("train_vae", params, inputs)
    assert key == work_key("train_vae", {"lr": 0.1, "seed": 0}, dict(inputs))
    others = [
        work_key("train_unet", params, inputs),
        work_key("train_vae", {**params, "lr": 0.2}, inputs),
        work_key("train_vae", params, {"shards": "ab"}),
    ]
    edited.write_text("x = 2\n")
    others.append(work_key("train_vae", params, inputs))
    edited.write_text("x = 1\n")
    monkeypatch.setattr(torch, "__version__", "0.0")
    others.append(work_key("train_vae", params, inputs))
    monkeypatch.undo()
    assert len({key, *others}) == 6


def test_the_key_covers_the_stages_own_module(edited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m ldm.stages.train_vae` loads it under the name `__main__`."""
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    work_key("train_vae", {}, {})  # an interactive session has no file
    main.__file__ = str(edited)
    monkeypatch.delitem(sys.modules, "ldm.training.loop")
    key = work_key("train_vae", {}, {})
    edited.write_text("x = 2\n")
    assert work_key("train_vae", {}, {}) != key


def test_a_work_folder_has_one_holder(tmp_path: Path) -> None:
    with work_folder(tmp_path, "train_vae", "abc") as folder:
        assert folder == tmp_path / ".ldm/work/train_vae/abc" and folder.is_dir()
        (folder / "checkpoint").touch()
        with work_folder(tmp_path, "train_vae", "abd"):
            pass
        with (
            pytest.raises(InputError, match=r"abc: another process trains this very run"),
            work_folder(tmp_path, "train_vae", "abc"),
        ):
            pass
    with work_folder(tmp_path, "train_vae", "abc") as folder:
        assert (folder / "checkpoint").exists()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    reached, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), work_folder(tmp_path, "train_vae", "abc"):
            os.write(writes, b".")
            time.sleep(60)
        os._exit(1)
    assert os.read(reached, 1) == b"."
    with pytest.raises(InputError), work_folder(tmp_path, "train_vae", "abc"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with work_folder(tmp_path, "train_vae", "abc"):
        pass


# progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("ldm.stages.runtime.time.monotonic", lambda: now[0])
    return now


def test_progress_is_a_plain_line_every_few_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress("train_vae", 10_000)
    progress(2_000)  # resumed here: what an earlier process did counts neither for the rate nor for the time left
    for second in range(1, 9):
        clock[0] = 100.0 + second
        progress(2_000 + 1_000 * second, {"loss": 0.25, "elbo_nats": -1234.5, "kl_nats": 30.0, "lr": 0.1})
    lines = capsys.readouterr().out.splitlines()
    note = "  loss 0.25 elbo_nats -1234 kl_nats 30"
    assert lines == [
        f"train_vae: {done:,}/10,000 images  1,000 images/s  {left} s left{note}"
        for done, left in ((3_000, 7), (8_000, 2), (10_000, 0))
    ]


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress = Progress("train_vae", 10)
    for done in range(11):
        progress(done, {"loss": 0.25})
    assert all(words in terminal.getvalue() for words in ("train_vae", "10/10", "images/s", "loss 0.25"))
    assert capsys.readouterr().out == ""
