"""One stage as one child process: its lines, a time limit, and an end that leaves no orphan.

The child is `python -m ldm.versioning.reproduce STAGE` in a session of its own. Its stdin is a pipe that only this process
holds open; DVC
hands it on to the stage, which watches it (`LDM_OWNER_PIPE`) and stops when it closes, even after `kill -9` of the owner.
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
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from ldm.versioning.reproduce import Reproduced, Status

GRACE = ((signal.SIGINT, 20.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))  # seconds to end by each
TAIL = 50  # lines kept for an error message
POLL = 0.2  # seconds between looks at the clock
BAD_INPUT = 2  # exit code of a stage whose input the user has to mend


@dataclass(frozen=True)
class Outcome:
    """How a stage went: its command ran, DVC's run-cache had the outs, or nothing had changed."""

    stage: str
    status: Literal["executed", "restored", "cached"]
    seconds: float
    peak_bytes: int  # resident memory of its largest process, as seen twice a second; 0 where /proc does not tell


class StageFailed(Exception):
    """A stage ended with an error; `exit_code` is its command's own (2: bad input), `tail` its last lines."""

    def __init__(self, stage: str, exit_code: int, tail: tuple[str, ...], reason: str = "") -> None:
        self.stage, self.exit_code, self.tail = stage, exit_code, tail
        super().__init__(reason or f"stage {stage} failed with exit code {exit_code}")

    @property
    def bad_input(self) -> bool:
        return self.exit_code == BAD_INPUT


class StageCancelled(Exception):
    """Someone asked for the stage to stop, and it has."""


def run_stage(
    root: Path,
    stage: str,
    *,
    status: Status | None = None,
    on_line: Callable[[str], object] = print,
    timeout: float | None = None,
    cancelled: threading.Event | None = None,
    env: Mapping[str, str] | None = None,
) -> Outcome:
    """Bring one stage up to date; on return, whatever happened, none of its processes is left.

    Waits where another process holds DVC's lock. Raises `StageFailed` (also after `timeout` seconds) or, once
    `cancelled` is set, `StageCancelled`.
    """
    start = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL)
    status = status or Status(root)
    if status.is_up_to_date(stage):
        return Outcome(stage, "cached", time.monotonic() - start, 0)
    status.changed()
    peak, looked = 0, 0.0
    with _child(root, stage, env or {}) as child:
        for line in _lines(child.output):
            if timeout is not None and time.monotonic() - start > timeout:
                raise StageFailed(stage, -signal.SIGTERM, tuple(tail), f"stage {stage} took more than {timeout:g} s")
            if cancelled is not None and cancelled.is_set():
                raise StageCancelled(f"stage {stage} was cancelled")
            if time.monotonic() > looked + 0.5:
                peak, looked = max(peak, peak_memory(child.pid)), time.monotonic()
            if line is None:
                if child.poll():  # something that left the group may still hold the output open
                    break
                continue
            tail.append(line)
            on_line(line)
        code, result = child.wait(), child.result()
    if code != 0:
        raise StageFailed(stage, result.exit_code or code, tuple(tail))
    return Outcome(stage, result.status, time.monotonic() - start, peak)


def peak_memory(session: int) -> int:
    """Peak resident bytes of the largest process in a session. (`wait4` would report our own where it is larger.)"""
    peak = 0
    for process in _running(session):
        with contextlib.suppress(OSError):  # it has ended
            found = re.search(r"VmHWM:\s*(\d+) kB", (process / "status").read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
    return peak


def _running(session: int) -> Iterator[Path]:
    """`/proc/PID` of a session's processes, without those that have ended and only wait for someone to notice."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session, *_ = stat.read_text().rpartition(")")[2].split()
            if int(its_session) == session and state != "Z":
                yield stat.parent


class _Child:
    """The leader of a session and process group."""

    def __init__(self, process: "subprocess.Popen[str]", result: int) -> None:
        assert process.stdout is not None
        self.output, self.pid, self._process, self._result = process.stdout, process.pid, process, result

    def poll(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def wait(self) -> int:
        return self._process.wait()

    def result(self) -> Reproduced:
        """What it said of itself at its end; nothing if it was killed."""
        with open(self._result, closefd=False) as file:
            return Reproduced(**json.loads(file.read() or "{}"))

    def stop(self) -> None:
        """End the whole group, gently first. The leader may be gone while others are not."""
        for number, grace in GRACE:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline:
                if self._gone():
                    return
                time.sleep(0.05)

    def _gone(self) -> bool:
        """Whether nobody is left. In a container, what ended may stay in the group for as long as its init lets it."""
        if not self.poll():
            return False
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return True
        return Path("/proc/self").exists() and not any(_running(self.pid))


@contextlib.contextmanager
def _child(root: Path, stage: str, env: Mapping[str, str]) -> Iterator[_Child]:
    read, write = os.pipe()  # neither end is inherited, except as the child's stdin
    result, theirs = os.pipe()
    interpreter = Path(sys.executable).parent  # `python` in dvc.yaml is this one
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm.versioning.reproduce", stage],
        cwd=root,
        env={
            **os.environ,
            **env,
            "PATH": f"{interpreter}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "LDM_OWNER_PIPE": "1",
            "LDM_RESULT_FD": str(theirs),
            "PYTHONUNBUFFERED": "1",
        },
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
    child = _Child(process, result)
    try:
        yield child
    finally:
        child.stop()
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
