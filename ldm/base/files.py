"""Folders and files that are written whole or not at all, locks, hashes; JSON whose bytes depend on the value alone."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """An empty folder to write to, which replaces `out` at the end; after an error or a kill, `out` is the old one, whole."""
    out = out.resolve()  # the folder itself is replaced, not a link to it
    partial, aside = out.with_name(out.name + ".partial"), out.with_name(out.name + ".replaced")
    if aside.exists() and not out.exists():
        os.rename(aside, out)  # a kill came between the two renames below
    for folder in (partial, aside):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with contextlib.suppress(FileNotFoundError):
        os.rename(out, aside)  # two renames, not a removal that may take minutes
    os.rename(partial, out)
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:  # a full disk
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file at `path`, which stays there; raises `BlockingIOError` if another holds it and `wait` is false."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a child that was forked meanwhile would keep the lock


def content_hash(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """One sha256 over the names and contents of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return content_hash("".join(f"{path.relative_to(folder).as_posix()}\0{file_hash(path)}\n" for path in files).encode())


def canonical_json(value: Any) -> str:
    """Indented JSON with sorted keys and a final newline."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1) + "\n"
