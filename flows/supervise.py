"""Run one stage as a child process: pass on its lines, limit its time, leave none of its processes behind.

The child is `python -m ldm.versioning.reproduce STAGE` in a session of its own. Its stdin is a pipe of which only this process
holds the other end. DVC passes it on to the stage, which stops when it closes (`LDM_OWNER_PIPE`), even after `kill -9` of
this process.
"""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from ldm.stages.runtime import BAD_INPUT
from ldm.versioning.reproduce import Reproduced, Status

GRACE = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))  # seconds to end after each signal
POLL = 0.2  # seconds between looks at the clock
MEMORY_POLL = 0.5  # seconds between looks at the memory


@dataclass(frozen=True)
class Step:
    """One step of a run: a stage whose command ran, whose outs DVC's run-cache had, or for which nothing had changed."""

    name: str
    status: str  # executed, restored, cached
    seconds: float
    peak_bytes: int = 0  # resident memory of the largest process, as seen every `MEMORY_POLL` seconds; 0 if unknown


class StageFailed(Exception):
    """A stage ended with an error; `exit_code` is that of its command (2: bad input)."""

    def __init__(self, stage: str, exit_code: int, reason: str = "") -> None:
        self.stage, self.exit_code, self.bad_input = stage, exit_code, exit_code == BAD_INPUT
        super().__init__(reason or f"stage {stage} failed with exit code {exit_code}")


def run_stage(
    root: Path,
    stage: str,
    *,
    status: Status | None = None,
    on_line: Callable[[str], object] = print,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Step:
    """Bring one stage up to date; on return, whatever happened, none of its processes is left.

    Waits if another process holds DVC's lock. Raises `StageFailed`, also after `timeout` seconds.
    """
    start = time.monotonic()
    status = status or Status(root)
    if status.is_up_to_date(stage):
        return Step(stage, "cached", time.monotonic() - start)
    status.changed()
    peak, looked = 0, 0.0
    with _child(root, stage, env or {}) as (child, result):
        assert child.stdout
        for line in _lines(child.stdout):
            if timeout is not None and time.monotonic() - start > timeout:
                raise StageFailed(stage, -signal.SIGTERM, f"stage {stage} took more than {timeout:g} s")
            if time.monotonic() > looked + MEMORY_POLL:
                peak, looked = max(peak, peak_memory(child.pid)), time.monotonic()
            if line is not None:
                on_line(line)
            elif child.poll() is not None:  # a process that left the session may still hold the output open
                break
        code = child.wait()
        with open(result, closefd=False) as file:
            found = Reproduced(**json.loads(file.read() or "{}"))  # nothing if it was killed
    if code != 0:
        raise StageFailed(stage, found.exit_code or code)
    return Step(stage, found.status, time.monotonic() - start, peak)


def peak_memory(session: int) -> int:
    """Peak resident bytes of the largest process. (`wait4` would report our own if that is larger.)"""
    peak = 0
    for process in _with_descendants(_running(session)):
        with contextlib.suppress(OSError):  # it has ended
            found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
    return peak


def _runs(process: psutil.Process) -> bool:
    """False for a zombie, too: in a container it may stay for as long as the init lets it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _running(session: int) -> set[psutil.Process]:
    """The processes of a session that run."""
    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):  # it has ended
            if os.getsid(pid) == session and _runs(process := psutil.Process(pid)):
                found.add(process)
    return found


def _with_descendants(processes: set[psutil.Process]) -> set[psutil.Process]:
    """With those that they started in sessions of their own, as the ranks of a training are."""
    found = set(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found.update(process.children(recursive=True))
    return found


def _stop(session: int) -> None:
    """End all processes, gently first. The leader may be gone while others are not."""
    for number, grace in GRACE:
        if not (processes := _running(session)):
            return
        if number == signal.SIGKILL:
            processes = _with_descendants(processes)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        deadline = time.monotonic() + grace
        while any(map(_runs, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)


@contextlib.contextmanager
def _child(root: Path, stage: str, env: Mapping[str, str]) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """The leader of a session, and a pipe with what it writes at its end. None of the session's processes is left at the end."""
    read, write = os.pipe()  # neither end is inherited, except as the child's stdin
    result, theirs = os.pipe()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # `python` in dvc.yaml is this one
    ours = {"PATH": path, "LDM_OWNER_PIPE": "1", "LDM_RESULT_FD": str(theirs), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm.versioning.reproduce", stage],
        cwd=root,
        env={**os.environ, **env, **ours},
        stdin=read,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        pass_fds=(theirs,),
    )
    os.close(read)
    os.close(theirs)
    try:
        yield process, result
    finally:
        _stop(process.pid)
        process.poll()
        os.close(write)
        os.close(result)


def _lines(output: IO[str]) -> Iterator[str | None]:
    """Lines as they come, None at least every `POLL` seconds; ends with the output."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        with output:
            for line in output:
                lines.put(line.rstrip("\r\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=POLL)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line
