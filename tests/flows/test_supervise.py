"""A stage as a child process: its lines and code arrive, and nothing of it is left, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import supervise
from flows.supervise import StageFailed, run_stage


def wait_for(path: Path, seconds: float = 20) -> int:
    """The process id that a stage has written."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
    return int(path.read_text())


def test_a_stage_runs_once_and_its_lines_arrive(project: Path) -> None:
    lines: list[str] = []
    first = run_stage(project, "shard", on_line=lines.append)
    assert (first.name, first.status) == ("shard", "executed")
    assert lines == ["shard starts"]
    assert first.peak_bytes > 5 * 2**20
    second = run_stage(project, "shard", on_line=lines.append)
    assert second.status == "cached" and lines == ["shard starts"]


def test_outs_from_the_run_cache_are_restored(project: Path) -> None:
    run_stage(project, "shard")
    (project / "dvc.lock").unlink()
    assert run_stage(project, "shard").status == "restored"


@pytest.mark.parametrize("code", [1, 2, 77])
def test_the_commands_own_exit_code_and_last_words(project: Path, code: int) -> None:
    (project / "knob.txt").write_text(f"shard exit {code}")
    lines: list[str] = []
    with pytest.raises(StageFailed) as failure:
        run_stage(project, "shard", on_line=lines.append)
    assert failure.value.exit_code == code
    assert failure.value.bad_input == (code == 2)
    assert lines == ["shard starts", "error: shard cannot"]


def test_a_failure_of_dvc_itself_is_a_failure_with_its_words(project: Path) -> None:
    lines: list[str] = []
    with pytest.raises(StageFailed):
        run_stage(project, "train_unet", on_line=lines.append)  # its dependency was never made
    assert "data/shards" in lines[-1]


@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN])
def test_a_stage_that_takes_too_long_is_ended(inherited: Any, project: Path, gone: Callable[[int], bool]) -> None:
    """Also where SIGINT is ignored, as in what a shell starts in the background."""
    (project / "knob.txt").write_text("shard sleep")
    start, before = time.monotonic(), signal.signal(signal.SIGINT, inherited)
    try:
        with pytest.raises(StageFailed, match="more than 2 s") as failure:
            run_stage(project, "shard", timeout=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 15
    assert not failure.value.bad_input
    pid = project / "shard.pid"
    assert not pid.exists() or gone(int(pid.read_text()), 0)  # a slow machine may not have come that far
    run_stage_again(project)


LAST_WORDS = """
import signal, sys
def end(*_):
    print("x" * 200_000)
    print("at a checkpoint")
    sys.exit(130)
signal.signal(signal.SIGINT, end)
"""


def test_the_last_words_of_a_stage_that_is_stopped_arrive(project: Path) -> None:
    """Also if they are more than a pipe holds: nobody else reads them, and it could not go on to its end."""
    (project / "stage.py").write_text(LAST_WORDS + (project / "stage.py").read_text())
    (project / "knob.txt").write_text("shard sleep")
    lines, stopped = list[str](), threading.Event()

    def tell(line: str) -> None:
        lines.append(line)
        stopped.set()

    start = time.monotonic()
    with pytest.raises(StageFailed, match="stopped"):
        run_stage(project, "shard", on_line=tell, stopped=stopped)
    assert [len(line) for line in lines[1:-1]] == [200_000] and lines[-1] == "at a checkpoint"
    assert time.monotonic() - start < supervise.GRACE[0][1]
    run_stage_again(project)


OTHER_SESSION = """
import subprocess
with open("other.pid", "w") as file:
    file.write(str(subprocess.Popen(["sleep", "60"], start_new_session=True).pid))
"""


def test_a_deaf_stage_is_killed(project: Path, gone: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "GRACE", ((signal.SIGINT, 0.5), (signal.SIGTERM, 0.5), (signal.SIGKILL, 5.0)))
    deaf = "import signal\nfor number in (2, 15): signal.signal(number, signal.SIG_IGN)\n"
    (project / "stage.py").write_text(deaf + OTHER_SESSION + (project / "stage.py").read_text())
    (project / "knob.txt").write_text("shard sleep")
    with pytest.raises(StageFailed):
        run_stage(project, "shard", timeout=3)
    for pid in (project / "shard.pid", project / "other.pid"):  # the other one has a session of its own, as ranks have
        assert not pid.exists() or gone(int(pid.read_text()), 0)  # a slow machine may not have come that far
    assert json.loads((project / ".dvc/tmp/rwlock").read_text()) == {"read": {}, "write": {}}  # of DVC, which was killed too


def test_one_that_starts_while_the_others_are_told_to_end_is_told_too() -> None:
    """DVC starts a stage, and from then on leaves Ctrl-C to it."""
    code = "import signal, subprocess, sys\n"
    code += "signal.signal(signal.SIGINT, lambda *_: sys.exit(subprocess.call(['sleep', '60'])))\n"
    code += "print('ready', flush=True)\nsignal.pause()"
    leader = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert leader.stdout is not None and leader.stdout.readline() == "ready\n"
    start = time.monotonic()
    supervise._stop(leader.pid)
    assert time.monotonic() - start < supervise.GRACE[0][1] and not supervise._running(leader.pid)
    leader.communicate()
    assert leader.returncode == 256 - signal.SIGINT  # of `sleep`


def test_a_process_that_left_the_session_and_holds_the_output_holds_nobody_up(project: Path) -> None:
    (project / "stage.py").write_text(OTHER_SESSION + (project / "stage.py").read_text())
    lines: list[str] = []
    assert run_stage(project, "shard", on_line=lines.append).seconds < 40
    assert lines == ["shard starts"]
    os.kill(int((project / "other.pid").read_text()), signal.SIGKILL)  # it was still there


def test_a_zombie_does_not_run() -> None:
    """In a container, those that lost their parent may stay zombies."""
    leader = subprocess.Popen(["true"], start_new_session=True)
    os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)
    assert os.getsid(leader.pid) == leader.pid and not supervise._running(leader.pid)
    leader.wait()


def test_nothing_outlives_an_owner_killed_with_9(project: Path, gone: Callable[[int], bool]) -> None:
    (project / "knob.txt").write_text("shard sleep")
    root = Path(supervise.__file__).parents[1]
    owner = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from flows.supervise import run_stage; "
         "run_stage(Path(sys.argv[1]), 'shard')", str(project)],
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    stage = wait_for(project / "shard.pid")
    dvc = int(Path(f"/proc/{stage}/stat").read_text().rpartition(")")[2].split()[1])
    owner.kill()
    owner.wait()
    assert gone(stage) and gone(dvc)
    run_stage_again(project)


def run_stage_again(project: Path) -> None:
    """No lock was left behind: the stage runs at once."""
    (project / "knob.txt").write_text("none")
    start = time.monotonic()
    assert run_stage(project, "shard").status == "executed"
    assert time.monotonic() - start < 15
