"""Look-ups in an MLflow registry that is an SQLite file, by the standard library alone: importing MLflow takes 2 s.

MLflow's client defines what the answers are. This module knows MLflow's tables at one revision of their schema; of any other
store it knows nothing, and the caller asks the client.
"""

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

REVISION = "dc11669786a5"  # of the schema: MLflow 3.17's newest migration
BUSY_SECONDS = 5.0  # a writer holds the file for as long as a commit takes
ELSEWHERE = ("MLFLOW_REGISTRY_URI", "MLFLOW_ENABLE_WORKSPACES", "MLFLOW_WORKSPACE")  # these lead MLflow to other answers


class ModelVersion(NamedTuple):
    """What MLflow's entity of that name says, under its names, and where the version's files lie."""

    name: str
    version: int
    creation_timestamp: int  # ms since 1970
    run_id: str | None
    tags: dict[str, str]
    folder: Path | None  # None: not a folder of this machine


class RegisteredModel(NamedTuple):
    versions: list[ModelVersion]  # newest first
    aliases: dict[str, str]  # alias: version


def read_model(name: str) -> RegisteredModel | None:
    """A registered model, empty where there is none of this name; None where only MLflow's client can tell."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    refused = not name.strip() or name.startswith(".") or "/" in name or ":" in name  # by MLflow, which says why
    if not uri.startswith("sqlite:///") or "?" in uri or refused or any(map(os.environ.get, ELSEWHERE)):
        return None
    place = Path(uri.removeprefix("sqlite:///")).absolute().as_uri() + "?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(place, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN")  # all queries see one state
            return _read(database, name)
    except sqlite3.Error:  # not there, not a database, damaged, still locked: the client says it better
        return None


def _read(database: sqlite3.Connection, name: str) -> RegisteredModel | None:
    if database.execute("SELECT version_num FROM alembic_version").fetchall() != [(REVISION,)]:
        return None
    if database.execute("SELECT 1 FROM registered_models WHERE workspace != 'default'").fetchone():
        return None  # MLflow refuses to open it without workspaces
    of = "WHERE workspace = 'default' AND name = ?"
    aliases = database.execute(f"SELECT alias, version FROM registered_model_aliases {of}", (name,))
    found = RegisteredModel([], {alias: str(version) for alias, version in aliases})
    tags: dict[int, dict[str, str]] = {}
    for version, key, value in database.execute(f"SELECT version, key, value FROM model_version_tags {of}", (name,)):
        tags.setdefault(version, {})[key] = value
        if (key, value) == ("mlflow.prompt.is_prompt", "true"):
            return None  # which searches leave out and look-ups find
    columns = "version, creation_time, run_id, storage_location, source"
    kept = f"{of} AND current_stage != 'Deleted_Internal' ORDER BY version DESC"  # a deleted version's row and tags stay
    for version, created, run_id, location, source in database.execute(f"SELECT {columns} FROM model_versions {kept}", (name,)):
        version_tags, folder = tags.get(version, {}), _folder(location or source)
        found.versions.append(ModelVersion(name, version, created, run_id, version_tags, folder))
    return found


def _folder(location: str | None) -> Path | None:
    """The folder that a path or URI of artifacts names, read as MLflow reads it; None where that is no folder here."""
    parts = urlsplit(location or "models:/")
    if parts.scheme not in ("", "file") or parts.netloc:
        return None
    folder = Path(unquote(parts.path if parts.scheme else str(location)))
    return folder if folder.is_dir() else None
