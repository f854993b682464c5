"""Where the files of MLflow's store lie now. Beside SQLite, MLflow writes down absolute paths: a project that was moved or
copied would read and write the folder that it came from."""

import contextlib
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterator
from os.path import exists  # false also where nobody may look; `Path.exists` raises there
from pathlib import Path
from urllib.parse import unquote, urlsplit

FOLDER = "mlruns"
COLUMNS = (  # of MLflow's tables, that hold locations
    ("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"), ("model_versions", "source"),
)  # fmt: skip
BUSY_SECONDS = 5.0  # a writer holds the file for as long as a commit takes


def database_file(uri: str) -> Path | None:
    """The file of an SQLite store's address; None for another store."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") and "?" not in uri else None


def local_path(location: str | None) -> Path | None:
    """The path that a path or URI names, read as MLflow reads it; None where it is not on this machine."""
    parts = urlsplit(location or "models:/")
    if parts.scheme not in ("", "file") or parts.netloc:
        return None
    return Path(unquote(parts.path if parts.scheme else str(location)))


def current(location: str | None, database: Path) -> Path | None:
    """The path that a location in a database means now; None where it is not on this machine."""
    path = local_path(location)
    if path and (parts := _split(path)) and _moved(parts[0], [parts[1]], database):
        return database.parent / FOLDER / parts[1]
    return path


def settle(database: Path) -> None:
    """Write into a project's own database where what it stores lies now. One that cannot be written, or is none, stays as it is.

    A database that stands in no project is shared: what it names may lie on other machines.
    """
    if not (database.parent / "dvc.yaml").is_file():
        return
    with contextlib.suppress(sqlite3.Error), _opened(database) as store:
        stored = [
            (table, column, location)
            for table, column in COLUMNS
            for (location,) in store.execute(f"SELECT DISTINCT {column} FROM {table}")
        ]
        found, roots = {}, defaultdict[Path, list[Path]](list)
        for _, _, location in stored:
            if (path := local_path(location)) and (parts := _split(path)):
                found[location] = parts
                roots[parts[0]].append(parts[1])
        moved = {root for root, rests in roots.items() if _moved(root, rests, database)}
        changes = [
            ((database.parent / FOLDER / found[location][1]).as_uri(), location, table, column)
            for table, column, location in stored
            if location in found and found[location][0] in moved
        ]
        with store:  # all or nothing
            for now, before, table, column in changes:
                store.execute(f"UPDATE {table} SET {column} = ? WHERE {column} = ?", (now, before))


@contextlib.contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    address = f"{database.as_uri()}?mode=rw"  # which makes no file
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as store:
        yield store


def _split(path: Path) -> tuple[Path, Path] | None:
    """ROOT/mlruns/REST as ROOT and REST."""
    root, found, rest = path.as_posix().rpartition(f"/{FOLDER}/")
    return (Path(root or "/"), Path(rest)) if found and rest and path.is_absolute() else None


def _moved(root: Path, rests: Collection[Path], database: Path) -> bool:
    """Whether what a database places into `root`/mlruns, at `rests`, belongs into the mlruns beside it now."""
    here, there = database.parent / FOLDER, root / FOLDER
    if root == database.parent or (exists(here) and exists(there) and here.samefile(there)):
        return False
    if any(exists(here / rest) for rest in rests if len(rest.parts) > 1):  # of a run or model; their ids are unique
        return True
    if any(
        exists(there / rest) or "models" in rest.parts for rest in rests if len(rest.parts) > 1
    ):  # it lies elsewhere, perhaps on an absent disk
        return False
    return not exists(root) or exists(root / database.name)  # nothing was stored before the project was moved or copied
