"""Run one stage as a child process: pass on its lines, limit its time, leave none of its processes behind.

The child runs `ldm.versioning.reproduce` in a session of its own. DVC passes its stdin on to the stage, which stops when it
closes (`LDM_OWNER_PIPE`): only this process holds the other end, so it closes even after `kill -9`.
"""

import codecs
import contextlib
import io
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import psutil

from ldm.base.errors import InputError
from ldm.stages.stage import BAD_INPUT
from ldm.versioning.repository import forget

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
    attempts: int = 1

    def after(self, spent: Sequence[float]) -> "Step":
        """This step with the seconds of failed attempts before it."""
        return replace(self, seconds=self.seconds + sum(spent), attempts=1 + len(spent))

    @property
    def words(self) -> str:
        return self.status if self.attempts == 1 else f"{self.status}, attempt {self.attempts}"

    @property
    def memory(self) -> str:
        return f"{self.peak_bytes / 2**20:,.0f} MiB" if self.peak_bytes else ""


class StageFailed(Exception):
    """A stage ended with an error, or was stopped; `exit_code` is that of its command (2: bad input)."""

    def __init__(self, stage: str, exit_code: int, seconds: float, reason: str = "", stopped: bool = False) -> None:
        self.exit_code, self.seconds, self.stopped = exit_code, seconds, stopped
        self.bad_input, self.said = exit_code == BAD_INPUT, ""  # the latter: the stage's own last `error: …`
        super().__init__(reason or f"stage {stage} failed with exit code {exit_code}")


def run_stage(
    root: Path, stage: str, *, on_line: Callable[[str], object] = print, timeout: float = math.inf, env: Mapping[str, str] = {},
    stopped: threading.Event | None = None,
) -> Step:  # fmt: skip
    """Bring one stage up to date, once DVC's lock is free; leaves no process.

    Raises `StageFailed`, also after `timeout` seconds and soon after `stopped` is set.
    """
    start, looked, peak = time.monotonic(), 0.0, 0
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # `python` in dvc.yaml is this one
    with tempfile.TemporaryFile("r+") as result, contextlib.ExitStack() as stack:
        fd = result.fileno()
        ours = {"PATH": path, "LDM_OWNER_PIPE": "1", "LDM_RESULT_FD": str(fd), "PYTHONUNBUFFERED": "1"}
        child: Any = stack.enter_context(subprocess.Popen(
            [sys.executable, "-m", "ldm.versioning.reproduce", stage], stdin=PIPE, stdout=PIPE, stderr=STDOUT,
            cwd=root, env={**os.environ, **env, **ours}, pass_fds=[fd], start_new_session=True,
        ))  # fmt: skip
        lines = _lines(child.stdout.fileno())
        stack.callback(_forget, root, child)
        stack.callback(_end, child.pid, lines, on_line)
        for line in lines:
            spent = time.monotonic() - start
            if spent > timeout:
                raise StageFailed(stage, -signal.SIGTERM, spent, f"stage {stage} took more than {timeout:g} s")
            if stopped and stopped.is_set():
                raise StageFailed(stage, -signal.SIGTERM, spent, f"stage {stage} was stopped, as its run ends", stopped=True)
            if time.monotonic() > looked + MEMORY_POLL:
                peak, looked = max(peak, _peak_memory(child.pid)), time.monotonic()
            if line is not None:
                on_line(line)
            elif child.poll() is not None:  # a process that left the session may still hold the output open
                break
        code = child.wait()
        result.seek(0)
        outcome, exit_code = (result.read() or f"failed {code}").split()  # nothing if it was killed or DVC failed
    if code != 0:
        raise StageFailed(stage, int(exit_code), time.monotonic() - start)
    return Step(stage, outcome, time.monotonic() - start, peak)


def _lines(output: int) -> Iterator[str | None]:
    """Lines as they come, None if none has come for `POLL` seconds; ends with the output."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    rest, chunk = "", None
    while chunk != b"":
        if not select.select([output], [], [], POLL)[0]:
            yield None
            continue
        chunk = os.read(output, 2**16)
        *lines, rest = (rest + decoder.decode(chunk, final=not chunk)).split("\n")
        yield from lines
    if rest:
        yield rest


def _peak_memory(session: int) -> int:
    """Peak resident bytes of the largest process. (`wait4` would report our own if that is larger.)"""
    peaks = [0]
    for process in _running(session, descendants=True):
        with contextlib.suppress(OSError):  # it has ended
            peaks += map(int, re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()))
    return 1024 * max(peaks)


def _runs(process: psutil.Process) -> bool:
    """False for a zombie, too: in a container it may stay for as long as the init lets it."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _running(session: int, descendants: bool = False) -> set[psutil.Process]:
    """The processes of a session that run, with `descendants` also those in other sessions, as the ranks of a training are."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):  # it has ended
            if os.getsid(process.pid) == session and _runs(process):
                found |= {process, *(process.children(recursive=True) if descendants else ())}
    return found


def _end(session: int, lines: Iterator[str | None], on_line: Callable[[str], object]) -> None:
    """Stop what still runs, and pass on what it says meanwhile, such as the checkpoint that it has reached."""
    stopping = threading.Thread(target=_stop, args=(session,))
    stopping.start()
    for line in lines:
        if line is not None:
            on_line(line)
        elif not stopping.is_alive():
            break
    stopping.join()


def _forget(root: Path, child: "subprocess.Popen[bytes]") -> None:
    """A process that was killed has left what DVC wrote down of it; one that ended by itself has not."""
    if child.wait() < 0:
        with contextlib.suppress(InputError):  # a record that cannot be read: the next stage says so
            forget(root, child.pid)


def _stop(session: int) -> None:
    """End all processes, gently first. The leader may be gone while others are not; one that only now starts is told too."""
    for number, grace in GRACE:
        told, deadline = set[psutil.Process](), time.monotonic() + grace
        while time.monotonic() < deadline:
            running = _running(session, descendants=number == signal.SIGKILL)
            for process in running - told:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
            told |= running
            if not any(map(_runs, told)):
                break
            time.sleep(0.05)
