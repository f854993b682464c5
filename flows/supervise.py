"""Run one stage as a child process: pass on its lines, limit its time, leave none of its processes behind.

The child is `python -m ldm.versioning.reproduce STAGE` in a session of its own. Its stdin is a pipe of which only this process
holds the other end. DVC passes it on to the stage, which stops when it closes (`LDM_OWNER_PIPE`), even after `kill -9` of
this process.
"""

import codecs
import contextlib
import io
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from ldm.stages.runtime import BAD_INPUT
from ldm.versioning.reproduce import Status

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
    with tempfile.TemporaryFile("r+") as result, _child(root, stage, env or {}, result.fileno()) as child:
        assert child.stdout
        for line in _lines(child.stdout):
            if timeout is not None and time.monotonic() - start > timeout:
                raise StageFailed(stage, -signal.SIGTERM, f"stage {stage} took more than {timeout:g} s")
            if time.monotonic() > looked + MEMORY_POLL:
                peak, looked = max(peak, _peak_memory(child.pid)), time.monotonic()
            if line is not None:
                on_line(line)
            elif child.poll() is not None:  # a process that left the session may still hold the output open
                break
        code = child.wait()
        result.seek(0)  # it is empty if the child was killed or DVC failed
        outcome, exit_code = (result.read() or f"failed {code}").split()
    if code != 0:
        raise StageFailed(stage, int(exit_code))
    return Step(stage, outcome, time.monotonic() - start, peak)


@contextlib.contextmanager
def _child(root: Path, stage: str, env: Mapping[str, str], result: int) -> Iterator["subprocess.Popen[bytes]"]:
    """The leader of a session, which writes how it ended to the file descriptor `result`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # `python` in dvc.yaml is this one
    ours = {"PATH": path, "LDM_OWNER_PIPE": "1", "LDM_RESULT_FD": str(result), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "ldm.versioning.reproduce", stage],
        cwd=root,
        env={**os.environ, **env, **ours},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(result,),
    ) as process:
        try:
            yield process
        finally:
            _stop(process.pid)


def _lines(output: IO[bytes]) -> Iterator[str | None]:
    """Lines as they come, None if none has come for `POLL` seconds; ends with the output."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    rest, chunk = "", None
    while chunk != b"":
        if not select.select([output], [], [], POLL)[0]:
            yield None
            continue
        chunk = os.read(output.fileno(), 2**16)
        *lines, rest = (rest + decoder.decode(chunk, final=not chunk)).split("\n")
        yield from lines
    if rest:
        yield rest


def _peak_memory(session: int) -> int:
    """Peak resident bytes of the largest process. (`wait4` would report our own if that is larger.)"""
    peak = 0
    for process in _with_descendants(_running(session)):
        with contextlib.suppress(OSError):  # it has ended
            found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)
    return peak


def _runs(process: psutil.Process) -> bool:
    """False for a zombie, too: in a container it may stay for as long as the init lets it."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _running(session: int) -> set[psutil.Process]:
    """The processes of a session that run."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):  # it has ended
            if os.getsid(process.pid) == session and _runs(process):
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
        processes = _running(session)
        if number == signal.SIGKILL:
            processes = _with_descendants(processes)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)
        deadline = time.monotonic() + grace
        while any(map(_runs, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
