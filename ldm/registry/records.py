"""Under the flow a stage records its run in a file, and the flow's process delivers the file to MLflow.

Importing mlflow takes longer than most stages; this way only the flow imports it. A record has one JSON line
`[call, arguments]` for each call of `MlflowRun.send`.
"""

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.base.hashing import file_hash, folder_hash
from ldm.registry.mlflow_run import MlflowRun, WarnOnce

RETRY_SECONDS = 300.0  # wait after a failed delivery, so that a dead server costs seconds, not minutes


class Record:
    """Writes the record of one run, a file in `folder` that is locked while this process lives."""

    id = None

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{time.time_ns()}-{os.getpid()}.jsonl"
        self._file: Any = None
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.with_suffix(".new").open("ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def send(self, call: str, *arguments: Any) -> bool:
        """Append one whole line, or nothing where the disk is full; whether it is written."""
        if self._file is None:
            return False
        if call == "open":
            arguments = ({**arguments[0], "ldm.record": self.path.stem}, *arguments[1:])
        if call == "artifact":
            arguments = (*arguments, _digest(Path(arguments[0])))
        line, size = (json.dumps([call, arguments]) + "\n").encode(), os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) < len(line):
                raise OSError("half a line")
            if call == "open":
                self.path.with_suffix(".new").rename(self.path)  # from here on it may be delivered
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), size)
            return False
        if call == "close":
            self._file.close()
        return True


class Records:
    """Delivers the records in a folder to MLflow. What cannot be delivered stays there for a later run of the flow."""

    EVERY = 5.0  # seconds between deliveries while a stage runs

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[MlflowRun, int]] = {}  # the run of each file, and how many of its lines are delivered
        self._wait_until = 0.0
        self._warn = WarnOnce()

    @contextlib.contextmanager
    def delivering(self) -> Iterator[None]:
        """Deliver while a stage runs, and once more at its end."""
        ended = threading.Event()

        def repeat() -> None:
            while not ended.wait(self.EVERY):
                self.deliver()

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.deliver()

    def deliver(self) -> None:
        """Deliver the new lines of every file. A run whose process ended without closing it was killed."""
        if time.monotonic() < self._wait_until:
            return
        failures = 0
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                failures += not self._deliver(path)
            except Exception as error:  # tracking never fails the work
                self._warn(f"{path} cannot be delivered ({error!r:.200})")
                failures += 1
            if failures == 2:  # the server fails, not one file
                self._wait_until = time.monotonic() + RETRY_SECONDS
                return

    def _deliver(self, path: Path) -> bool:
        """Deliver the new lines of a file, and delete it after the last; False where MLflow failed."""
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ended = True
            except BlockingIOError:  # its process lives
                ended = False
            lines = file.read().decode("utf-8", "replace").split("\n")[:-1]  # the last may be half a line
        kept = f"its record stays in {self.folder} until a later run delivers it"
        run, done = self._known.get(path) or (MlflowRun(self._warn, kept), 0)
        for call, arguments in _parsed(lines[done:], ended):
            if run.id is None and call != "open":
                self._warn(f"{path} does not begin as a record does; it is set aside")
                path.rename(path.with_suffix(".bad"))
                return True
            if not run.send(call, *arguments):
                return False  # the next delivery goes on here; another process begins again, and nothing doubles
            if call == "close":
                self._known.pop(path, None)
                path.unlink()
                return True
            done += 1
            self._known[path] = run, done
        return True


def _parsed(lines: list[str], ended: bool) -> Iterator[tuple[str, list[Any]]]:
    """The calls of a record, "skip" for damaged lines and changed files. The end that a killed process lacks is added."""
    call = ""
    for line in lines:
        try:
            call, arguments = json.loads(line)
        except (ValueError, TypeError):  # a full disk has damaged it
            call, arguments = "skip", []
        if call == "artifact":
            *arguments, digest = arguments
            call = call if _digest(Path(arguments[0])) == digest else "skip"
        yield call, arguments
    if ended and call != "close":
        yield "close", ["KILLED", time.time_ns() // 1_000_000]


def _digest(path: Path) -> str | None:
    """Hash of a file's or folder's content; None where there is none."""
    if not path.exists():
        return None
    return folder_hash(path) if path.is_dir() else file_hash(path)
