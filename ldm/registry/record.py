"""The record of one run: a file with a JSON line `[call, arguments]` a call, locked while the process that writes it lives."""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from ldm.base.files import file_hash, folder_hash


class Record:
    """Writes the record of a run, as which other runs can name it before MLflow knows it."""

    id = None

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder.resolve() / f"{time.time_ns()}-{os.getpid()}.jsonl"
        self.reference = f"record:{self.path.stem}"
        self._file = self.path.open("ab", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def send(self, call: str, *arguments: Any) -> None:
        """Append a call; `OSError` if it is not written whole."""
        if call == "artifact":
            path, folder = arguments
            relative = os.path.relpath(Path(path).resolve(), self.path.parent)  # a project may be moved
            arguments = (relative, folder, digest(Path(path)))
        line = f"\n{json.dumps([call, arguments])}".encode()  # newline first: a line cut off by a full disk spoils no other
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"{self.path}: the disk is full")
        finally:
            if call == "close":
                self._file.close()


class Recorded(NamedTuple):
    """What a record holds by now."""

    lines: list[str]  # the last one may be half written
    ended: int | None  # when its process wrote last, in ms; None while that process lives

    @property
    def key(self) -> str | None:
        """Of the training that it is a part of."""
        with contextlib.suppress(ValueError, IndexError):
            return json.loads(self.lines[0])[1][2]
        return None


def read(path: Path) -> Recorded:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            ended: int | None = os.fstat(file.fileno()).st_mtime_ns // 1_000_000
        except BlockingIOError:
            ended = None
        return Recorded(file.read().decode("utf-8", "replace").split("\n")[1:], ended)


def is_open(path: Path) -> bool:
    """Whether a process that lives writes it."""
    return path.is_file() and read(path).ended is None


def digest(path: Path) -> str | None:
    """Hash of a file's or folder's content; None where there is none."""
    if not path.exists():
        return None
    return folder_hash(path) if path.is_dir() else file_hash(path)
