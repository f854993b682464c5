"""Look-ups in an MLflow registry that is an SQLite file, by the standard library alone: importing MLflow takes 2 s.

MLflow's client defines what the answers are. This module knows MLflow's tables at one revision of their schema; of any other
store it knows nothing, and the caller asks the client.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

REVISION = "dc11669786a5"  # of the schema: MLflow 3.17's newest migration
BUSY_SECONDS = 5.0  # a writer holds the file for as long as a commit takes
ELSEWHERE = ("MLFLOW_REGISTRY_URI", "MLFLOW_ENABLE_WORKSPACES", "MLFLOW_WORKSPACE")  # these lead MLflow to other answers

VERSIONS = """
SELECT version, creation_time, run_id, storage_location, source,
    (SELECT json_group_array(alias) FROM registered_model_aliases
     WHERE (workspace, name, version) = (found.workspace, found.name, found.version)),
    (SELECT json_group_object(key, value) FROM model_version_tags
     WHERE (workspace, name, version) = (found.workspace, found.name, found.version))
FROM model_versions AS found
WHERE workspace = 'default' AND name = ? AND current_stage != 'Deleted_Internal' ORDER BY version DESC
"""  # a deleted version's row and tags stay


@dataclass(frozen=True)
class Version:
    """One registered version."""

    name: str
    version: int
    aliases: tuple[str, ...]
    created: datetime
    run_id: str | None
    tags: Mapping[str, str]
    folder: Path | None = None  # of its files, where they lie on this machine and need no download

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def read_versions(name: str) -> list[Version] | None:
    """The versions of a model, newest first; None where only MLflow's client can tell."""
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


def _read(database: sqlite3.Connection, name: str) -> list[Version] | None:
    if database.execute("SELECT version_num FROM alembic_version").fetchall() != [(REVISION,)]:
        return None
    if database.execute("SELECT 1 FROM registered_models WHERE workspace != 'default'").fetchone():
        return None  # MLflow refuses to open it without workspaces
    versions = [
        Version(name, version, tuple(sorted(json.loads(aliases))), datetime.fromtimestamp(created / 1000, UTC), run_id,
                json.loads(tags), _folder(location or source))
        for version, created, run_id, location, source, aliases, tags in database.execute(VERSIONS, (name,))
    ]  # fmt: skip
    is_prompt = any(version.tags.get("mlflow.prompt.is_prompt") == "true" for version in versions)
    return None if is_prompt else versions  # MLflow's searches leave prompts out, its look-ups find them


def _folder(location: str | None) -> Path | None:
    """The folder that a path or URI of artifacts names, read as MLflow reads it; None where that is no folder here."""
    parts = urlsplit(location or "models:/")
    if parts.scheme not in ("", "file") or parts.netloc:
        return None
    folder = Path(unquote(parts.path if parts.scheme else str(location)))
    return folder if folder.is_dir() else None
