"""Look-ups in MLflow's registry: of an SQLite file without MLflow, whose import takes 2 s, of any other store by its client."""

import contextlib
import json
import math
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.base.errors import InputError, reason
from ldm.base.paths import DECISION
from ldm.base.project import find_root
from ldm.registry import locations
from ldm.registry.tracking import mlflow_client, short_patience, use_default_store

if TYPE_CHECKING:
    import torch

    from ldm.model import LatentDiffusion

SYSTEM, LINEAGE = "artifacts/ldm", "lineage"  # folders of a version's files
HASH, IMAGE, GATE, BITS = "ldm.model", "ldm.image", "ldm.gate", "ldm.bits_per_dim"  # tags
NO_BOUND = "none"  # `BITS` of a VQ model
DIGITS = 12  # of a hash in a URI, at least
REVISION = "dc11669786a5"  # of MLflow's tables: the newest migration of 3.17
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
    lost: Path | None = field(default=None, compare=False)  # where they should lie on this machine, and do not

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def pinned(self) -> str:
        """Its URI with its hash, which a stage takes: in another registry, or one made anew, it names nothing else."""
        return f"{self.uri}@{self.tags[HASH][:DIGITS]}"


class Unreachable(InputError):
    """The registry's server does not answer; it may do so later."""


class NotStored(InputError):
    """The registry has the version, but not this file of it."""


def lookup(uri: str) -> Version:
    """The version behind `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/NAME/VERSION@HASH` (`Version.pinned`)."""
    match = re.fullmatch(rf"models:/([^/@]+)(?:@([^/@]+)|/(\d+)(?:@([0-9a-f]{{{DIGITS},64}}))?)", uri)
    if not match:
        raise InputError(f"{uri!r} is not a model: write models:/NAME@ALIAS or models:/NAME/VERSION, e.g. models:/ldm@champion")
    name, alias, number, digits = match.groups()
    for version in find({}, name):
        if version.version == int(number) if number else alias in version.aliases:
            if not (found := version.tags.get(HASH, "")).startswith(digits or ""):
                here = f"version {number} of this registry has the hash {found[:DIGITS] or 'none'}"
                raise InputError(f"{uri}: {here}: another registry was meant, or it was made anew; name a version of this one")
            return version
    missing, hint = f"version {number}", "`ldm registry list` shows what there is"
    if alias:
        missing = f"version with the alias {alias!r}"
        hint = "`ldm run` makes one, `ldm registry promote VERSION` chooses one by hand" if alias == "champion" else hint
    raise InputError(f"model {name!r} has no {missing}; {hint}")


def by_alias(name: str, alias: str) -> Version | None:
    return next((version for version in find({}, name) if alias in version.aliases), None)


def find(tags: Mapping[str, str], name: str = "ldm") -> list[Version]:
    """Versions that carry all these tags (e.g. `{"ldm.git_commit": "…"}`), newest first; maybe none."""
    if "MLFLOW_TRACKING_URI" not in os.environ:  # in an application; MLflow itself misreads folders with blanks or umlauts
        with contextlib.suppress(InputError):
            use_default_store(find_root())
    if (versions := read_sqlite(name)) is None:
        versions, client, query = [], connect(), f"name = '{name}'"
        aliases = [alias for model in client.search_registered_models(query) for alias in sorted(model.aliases.items())]
        for found in client.search_model_versions(query, order_by=["version_number DESC"]):  # at most 10,000
            names = tuple(alias for alias, number in aliases if int(number) == int(found.version))
            created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
            versions.append(Version(name, int(found.version), names, created, found.run_id, dict(found.tags)))
    return [version for version in versions if tags.items() <= version.tags.items()]


def read_sqlite(name: str) -> list[Version] | None:
    """The versions of a model in an SQLite file, newest first, as MLflow's client gives them; None where only it can tell."""
    database = locations.database_file(os.environ.get("MLFLOW_TRACKING_URI", ""))
    refused = not name.strip() or name.startswith(".") or "/" in name or ":" in name  # by MLflow, which says why
    if not database or refused or any(map(os.environ.get, ELSEWHERE)):
        return None
    locations.settle(database)  # for MLflow, in an application that loads a model; here, `locations.current` finds it either way
    address = f"{database.as_uri()}?mode=ro"
    try:
        with contextlib.closing(
            sqlite3.connect(address, uri=True, timeout=locations.BUSY_SECONDS, isolation_level=None)
        ) as store:
            store.execute("BEGIN")  # all queries see one state
            revisions = store.execute("SELECT version_num FROM alembic_version").fetchall()
            others = store.execute("SELECT 1 FROM registered_models WHERE workspace != 'default'").fetchall()
            rows = store.execute(VERSIONS, (name,)).fetchall()
    except sqlite3.Error:  # not there, not a database, damaged, still locked: the client says it better
        return None
    versions = []
    for version, stamp, run_id, location, source, aliases, tags in rows:
        created = datetime.fromtimestamp(stamp / 1000, UTC)
        place = locations.current(location or source, database)
        folder, lost = (place, None) if place is None or os.path.isdir(place) else (None, place)
        names, known = tuple(sorted(json.loads(aliases))), json.loads(tags)
        versions.append(Version(name, version, names, created, run_id, known, folder, lost))
    is_prompt = any(version.tags.get("mlflow.prompt.is_prompt") == "true" for version in versions)
    # MLflow refuses other workspaces; its searches leave out prompts
    return None if revisions != [(REVISION,)] or others or is_prompt else versions


def load(uri: str, device: "torch.device | str" = "cpu") -> "LatentDiffusion":
    """Load the model behind a `models:/…` URI."""
    from ldm.model import LatentDiffusion

    with downloaded(uri) as folder:
        return LatentDiffusion.load(folder, device=device)


def downloaded(uri: str, part: str = "") -> contextlib.AbstractContextManager[Path]:
    """The folder of the saved model behind a `models:/…` URI, or a file or folder in it: the store's own, or a temporary copy.

    Only read it.
    """
    return _files(lookup(uri), f"{SYSTEM}/{part}".rstrip("/"))


def kept(version: Version, file: str) -> str | None:
    """The text of a file that is stored with a version, e.g. "dvc.lock"; None where the store no longer has it."""
    with contextlib.suppress(NotStored), _files(version, f"{LINEAGE}/{file}") as path:
        return path.read_text(encoding="utf-8")
    return None


@contextlib.contextmanager
def _files(version: Version, path: str) -> Iterator[Path]:
    """A file or folder of a version: where it lies on this machine, or a temporary copy."""
    if version.folder and (version.folder / path).exists():
        yield version.folder / path
        return
    connect()
    import mlflow.artifacts

    with tempfile.TemporaryDirectory() as folder:
        try:
            copy = mlflow.artifacts.download_artifacts(f"{version.uri}/{path}", dst_path=folder)
        except (mlflow.MlflowException, OSError) as error:
            why = str(error).strip().splitlines()[-1]
            raise NotStored(f"{version.uri}: the registry has no {path} of it, which `ldm run` stores ({why})") from error
        yield Path(copy)


def tag(version: Version, key: str, value: str) -> None:
    """Set a tag of a version."""
    connect().set_model_version_tag(version.name, str(version.version), key, value)


def connect(*, create: bool = False) -> Any:
    """MLflow's client. A store that is not there, or does not answer, is an `InputError`."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    database = uri.removeprefix("sqlite:///")
    if database != uri and not create and not Path(database).exists():
        raise InputError(f"{uri}: no registry there yet; `ldm run` makes one, or set MLFLOW_TRACKING_URI")
    try:
        with short_patience():
            client = mlflow_client()
            status = _status(uri) if uri.startswith(("http://", "https://")) else 200
            if status == 200:
                client.search_registered_models(max_results=1)
    except Exception as error:  # each kind of store has its own
        if uri.startswith(("http://", "https://")):
            raise Unreachable(f"MLFLOW_TRACKING_URI {uri}: does not answer ({reason(error)})") from None
        raise InputError(f"MLFLOW_TRACKING_URI {uri}: cannot be used ({reason(error)}); mend it, or unset it") from None
    if status in (401, 403):
        hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        raise InputError(f"MLFLOW_TRACKING_URI {uri}: refuses the login (status {status}); {hint}")
    if status in (404, 405):
        raise InputError(f"MLFLOW_TRACKING_URI {uri}: no MLflow server (status {status}); mend the address, or unset it")
    if status != 200:
        raise Unreachable(f"MLFLOW_TRACKING_URI {uri}: answers with status {status}")
    return client


def _status(uri: str) -> int:
    """What a server answers to a request of MLflow, whose own errors do not always say it."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    path = "/api/2.0/mlflow/registered-models/search"
    return int(
        http_request(get_default_host_creds(uri), path, "GET", params={"max_results": 1}, raise_on_status=False).status_code
    )


def overview(version: Version) -> dict[str, str]:
    """A version as a row of the table of versions."""
    tags, created = version.tags, f"{version.created:%Y-%m-%d %H:%M}"
    row = {"version": str(version.version), "aliases": ", ".join(version.aliases), "created": created}
    row["bits_per_dim"] = tags[BITS] if tags[BITS] == NO_BOUND else f"{float(tags[BITS]):.4f}"
    return row | {"gate": _gate(version)[0], "image": tags[IMAGE], "git_commit": tags.get("ldm.git_commit", "")[:8]}


def describe(version: Version) -> dict[str, str]:
    """All about a version in words: where it came from, what the gate said and why, how it was evaluated."""
    created = f"{version.created:%Y-%m-%d %H:%M} UTC"
    facts = {"version": version.uri, "aliases": ", ".join(version.aliases), "created": created, "run": version.run_id or ""}
    tags = {key.removeprefix("ldm."): value for key, value in sorted(version.tags.items()) if key != GATE}
    return facts | _gate(version)[1] | tags


def _gate(version: Version) -> tuple[str, dict[str, str]]:
    """What the gate decided about a version: in short, and in full with the place of its page."""
    if GATE not in version.tags:
        return "", {"gate": "no decision yet"}
    gate = json.loads(version.tags[GATE])
    outcome = "promoted" if gate["promote"] else "not promoted"
    short, words = f"{outcome}: {re.split('[:;]', gate['reason'])[0]}", {"gate": f"{outcome}: {gate['reason']}"}
    if math.isfinite(gate["mean"]):
        gain = f"{gate['mean']:+.3g} ± {gate['se']:.2g} nats"
        short = f"{outcome}: {gain} against version {gate['champion']}"
        words["improvement"] = f"{gain} per image over models:/{version.name}/{gate['champion']}, on {gate['n']} test images"
    if version.run_id:
        name = Path(DECISION).name
        words["decision page"] = f"`mlflow artifacts download --artifact-uri runs:/{version.run_id}/{name}`"
        # beside the version's files, in EXPERIMENT/models/MODEL/artifacts, MLflow keeps those of its run
        page = version.folder / f"../../../{version.run_id}/artifacts/{name}" if version.folder else None
        if page and page.is_file():
            words["decision page"] = str(page.resolve())
    return short, words
