"""The project's DVC repository: opened in this process, and held against stages that run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.errors import InputError


@contextlib.contextmanager
def open_repository(root: Path) -> Iterator[Any]:
    """DVC's own `Repo`; what it refuses is an `InputError`."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            yield repo
    except DvcException as error:
        raise InputError(f"{root}: DVC says: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def held(repo: Any, *paths: Path) -> Iterator[None]:
    """For as long as it lasts, no stage starts; `InputError` where one that reads or writes `paths` runs now."""
    from dvc.lock import LockError
    from dvc.rwlock import RWLOCK_FILE, rwlock

    try:
        files, record = [str(path) for path in paths], Path(repo.tmp_dir, RWLOCK_FILE)
        with repo.lock:
            if record.is_file() and not record.stat().st_size:
                record.unlink()  # a kill came between DVC's opening and writing it, and DVC would stumble over it for ever
            with rwlock(repo.tmp_dir, repo.fs, "ldm", [], files, repo.config["core"]["hardlink_lock"]):
                yield
    except LockError as error:
        reason = " ".join(str(error).split()).partition(" If there are no processes")[0]
        raise InputError(f"a stage works here, or DVC itself: {reason}; try again when it has ended") from None
