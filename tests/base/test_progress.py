"""Progress on a terminal and in a log: in time, also when a batch takes long, and not a line too many."""

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ldm.base.progress import Progress

ROOT = Path(__file__).resolve().parents[2]

Lines = Callable[[], list[str]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("ldm.base.progress.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat after 0.3 s, which therefore tells of 0 s."""
    monkeypatch.setattr(Progress, "HEARTBEAT", 0.3)


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    """What was printed since the last look."""
    return lambda: capsys.readouterr().out.splitlines()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("progress of ")]


def next_line(lines: Lines) -> str:
    """The first line that comes within some seconds."""
    for _ in range(1000):
        if found := lines():
            return found[0]
        threading.Event().wait(0.01)  # real time, whatever the clock says
    raise AssertionError("nothing was printed")


# a log


def test_a_line_at_once_and_every_few_seconds(clock: list[float], lines: Lines) -> None:
    progress = Progress("train_vae", 10_000)
    progress(2_000)  # resumed here: what an earlier process did counts neither for the rate nor for the time left
    assert lines() == ["train_vae: 2,000/10,000 images"]
    for second in range(1, 9):
        clock[0] = 100.0 + second
        progress(2_000 + 1_000 * second, {"loss": 0.25, "elbo_nats": -1234.5, "kl_nats": 30.0, "lr": 0.1})
    note = "  loss 0.25 elbo_nats -1234 kl_nats 30"
    assert lines() == [
        f"train_vae: {done:,}/10,000 images  1,000 images/s  {left} s left{note}" for done, left in ((7_000, 3), (10_000, 0))
    ]


def test_a_short_step_prints_its_start_and_its_end(clock: list[float], lines: Lines) -> None:
    progress = Progress("evaluate: bound", 50)
    for done in range(51):
        clock[0] = 100.0 + done * 0.09
        progress(done)
    assert lines() == ["evaluate: bound: 0/50 images", "evaluate: bound: 50/50 images  11 images/s  0 s left"]


def test_metrics_are_shown_until_there_are_others(clock: list[float], lines: Lines) -> None:
    progress = Progress("train_unet", 30, "steps")
    for done, metrics in ((0, {}), (10, {"loss": 0.5}), (20, {}), (30, None)):
        clock[0] = 100.0 + done
        progress(done, metrics)
    assert [line.split("left  ")[-1] for line in lines()] == ["train_unet: 0/30 steps", *["loss 0.5"] * 3]


def test_a_last_batch_that_goes_beyond_the_total_leaves_nothing(clock: list[float], lines: Lines) -> None:
    progress = Progress("train_unet", 100)
    progress(0)
    clock[0] += 32.0
    progress(128)
    assert lines()[-1] == "train_unet: 128/100 images  4 images/s  0 s left"


def test_images_that_take_seconds_have_a_rate(clock: list[float], lines: Lines) -> None:
    with Progress("sample", 9) as progress:
        progress(0)
        clock[0] += 4.0
        progress(0)
        clock[0] += 4.0
        progress(1)
    assert lines() == ["sample: 0/9 images", "sample: 1/9 images  0.12 images/s  64 s left"]


@pytest.mark.parametrize("total", [0, 7])
def test_work_that_was_done_before_is_one_line(total: int, lines: Lines) -> None:
    progress = Progress("cache_latents", total)
    progress(total)
    progress(total)
    assert lines() == [f"cache_latents: {total}/{total} images"]


def test_a_count_without_a_total(clock: list[float], lines: Lines) -> None:
    with Progress("source", unit="files") as progress:
        progress(0)
        clock[0] += 10.0
        progress(1_200)
    assert lines() == ["source", "source: 0 files", "source: 1,200 files  120 files/s"]


# what takes long


@pytest.mark.usefixtures("hurried")
def test_a_batch_that_takes_long_is_told_of(lines: Lines) -> None:
    with Progress("train_unet", 9_600) as progress:
        progress(0, {})
        progress(64, {"loss": 0.5})
        assert lines() == ["train_unet: 0/9,600 images"]
        for seconds in range(2):  # after 0.3 s and after 0.6 s
            assert next_line(lines) == f"train_unet: 64/9,600 images, last update {seconds} s ago  loss 0.5"


@pytest.mark.usefixtures("hurried")
def test_what_happens_before_the_first_batch_is_told_of(lines: Lines) -> None:
    with Progress("train_unet", 9_600):
        assert next_line(lines) == "train_unet: 0 s"


@pytest.mark.usefixtures("hurried")
def test_seconds_are_those_since_the_last_update(clock: list[float], lines: Lines) -> None:
    with Progress("train_unet", 9_600) as progress:
        progress(64)
        clock[0] += 3.0
        progress(128)
        lines()
        clock[0] += 12.3
        assert next_line(lines) == "train_unet: 128/9,600 images, last update 12 s ago"


def test_batches_that_follow_each_other_need_no_heartbeat(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Progress, "INTERVAL", 0.05)
    monkeypatch.setattr(Progress, "HEARTBEAT", 0.4)
    with Progress("train_unet", 9_600) as progress:
        for done in range(60):
            progress(done)
            time.sleep(0.01)
    assert not [line for line in lines() if "last update" in line]


@pytest.mark.usefixtures("hurried")
def test_a_step_without_a_count(lines: Lines) -> None:
    with Progress("evaluate: samples"):
        assert lines() == ["evaluate: samples"]
        assert next_line(lines) == "evaluate: samples: 0 s"
    time.sleep(0.4)
    assert lines() == []


def test_a_short_step_without_a_count_prints_its_label_only(lines: Lines) -> None:
    with Progress("evaluate: samples"):
        pass
    assert lines() == ["evaluate: samples"]


# its end


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("how", ["done", "closed", "failed"])
def test_nothing_is_printed_after_the_end(how: str, lines: Lines) -> None:
    progress = Progress("train_vae", 10)
    progress(0)
    if how == "done":
        progress(10)
    elif how == "closed":
        progress.close()
    else:
        with pytest.raises(ValueError), progress:
            raise ValueError
    lines()
    assert "progress of train_vae" not in [thread.name for thread in threading.enumerate()]
    time.sleep(0.4)
    progress(10)
    progress.close()
    assert lines() == []


PROCESS = """
import os, sys, time
from ldm.base.progress import Progress
assert not {"torch", "rich", "numpy"} & sys.modules.keys()
Progress.HEARTBEAT = 0.00001
progress = Progress("shard", 10)
progress(1)
"""


def process(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROCESS + code]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=20)


def test_a_process_ends_without_having_closed_it() -> None:
    done = process("time.sleep(0.1)")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) > 2 and done.stdout.endswith(" ago\n")


def test_a_line_that_nobody_reads_harms_nothing() -> None:
    closed = "r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r)"
    done = process(f"{closed}; time.sleep(0.2); progress(10); os.write(2, b'on'); os._exit(0)")
    assert (done.returncode, done.stderr) == (0, "on")


def test_forks_neither_wait_nor_print() -> None:
    """A child that is forked while the thread prints: it can print itself, and no line comes twice or in pieces."""
    done = process(
        "for i in range(100):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        Progress.HEARTBEAT = 60.0\n"
        "        with Progress(f'child {i}'): sys.exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0"
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("child")] == [f"child {i}" for i in range(100)]
    rest = re.compile(r"shard: (\d+ s|1/10 images(, last update \d+ s ago)?)")
    assert all(rest.fullmatch(line) for line in lines if not line.startswith("child"))


# a terminal


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A stderr that says it is one."""
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stream


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    bar = terminal(monkeypatch)
    progress = Progress("train_vae", 10)
    for done in range(11):
        progress(done, {"loss": 0.25} if done == 5 else {})
    assert all(words in bar.getvalue() for words in ("train_vae", "10/10", "images/s", "left", "loss 0.25"))
    assert lines() == []


def test_a_terminal_gets_a_bar_without_a_count(monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    bar = terminal(monkeypatch)
    with Progress("evaluate: samples"):
        time.sleep(0.2)
    assert "evaluate: samples" in bar.getvalue() and " 0 s" in bar.getvalue()
    assert "left" not in bar.getvalue() and lines() == []
