"""DVC's repository: opening it, locking its stages, reading dvc.lock and params.yaml."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.base.errors import InputError


@contextlib.contextmanager
def open_repository(root: Path, wait: bool = False) -> Iterator[Any]:
    """DVC's `Repo`; DVC's errors become `InputError`. With `wait`, wait for a lock that another process holds."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)  # the pipeline's own lines say what runs
    try:
        with Repo(str(root), _wait_for_lock=wait) as repo:
            yield repo
    except DvcException as error:
        raise InputError(f"{root}: DVC says: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def held(repo: Any, *paths: Path) -> Iterator[None]:
    """Let no stage start meanwhile; `InputError` if a stage that reads or writes `paths` is running."""
    from dvc.lock import LockError
    from dvc.rwlock import RWLOCK_FILE, rwlock

    files, record = [str(path) for path in paths], Path(repo.tmp_dir, RWLOCK_FILE)
    try:
        with repo.lock:
            if record.is_file() and not record.stat().st_size:
                record.unlink()  # DVC was killed between creating and writing it, and cannot read an empty one
            with rwlock(repo.tmp_dir, repo.fs, "ldm", [], files, repo.config["core"]["hardlink_lock"]):
                yield
    except LockError as error:
        reason = " ".join(str(error).split()).partition(" If there are no processes")[0]
        raise InputError(f"a stage works here, or DVC itself: {reason}; try again when it has ended") from None


def locked_makers(root: Path, out: str) -> dict[str, dict[str, Any]]:
    """The dvc.lock entries of the stage that made `out` and of its ancestors, by stage name."""
    from dvc.utils.serialize import load_yaml  # DVC writes 1.0e-7 as 1e-07, which other readers take for a string

    entries = load_yaml(str(root / "dvc.lock")).get("stages", {})
    makers = {made["path"]: name for name, entry in entries.items() for made in entry.get("outs", [])}
    found: dict[str, dict[str, Any]] = {}
    wanted = [out]
    for path in wanted:  # it grows
        name = makers.get(path)
        if name and name not in found:
            found[name] = entry = entries[name]
            wanted += [needed["path"] for needed in entry.get("deps", [])] + list(entry.get("params", {}))
    return found


def read_params(root: Path) -> Any:
    """params.yaml as DVC reads it."""
    from dvc.utils.serialize import load_yaml

    return load_yaml(str(root / "params.yaml"))
