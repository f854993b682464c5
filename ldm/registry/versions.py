"""Look-ups in the MLflow registry: a version by URI, alias, number or tags; its files, its model, what the gate said.

A version holds the whole system, with its lineage as tags. `challenger` is the newest version, `champion` the one to use,
`previous` the champion before it. Every function works on the store that `MLFLOW_TRACKING_URI` names. An SQLite store is
read without MLflow (`ldm.registry.local_store`), whose import takes 2 s; any other through MLflow's client.
"""

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.base.errors import InputError
from ldm.base.paths import DECISION
from ldm.registry import local_store
from ldm.registry.mlflow_run import mlflow_client, short_patience

if TYPE_CHECKING:
    import torch

    from ldm.model import LatentDiffusion

SYSTEM, LINEAGE = "artifacts/ldm", "lineage"  # folders of a version's files
HASH, IMAGE, GATE, BITS = "ldm.model", "ldm.image", "ldm.gate", "ldm.bits_per_dim"  # tags
NO_BOUND = "none"  # `BITS` of a VQ model


class Unreachable(InputError):
    """The registry's server does not answer; it may do so later."""


class NotStored(InputError):
    """The registry has the version, but not this file of it."""


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


def lookup(uri: str) -> Version:
    """The version behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if not match:
        raise InputError(f"{uri!r} is not a model: write models:/NAME@ALIAS or models:/NAME/VERSION, e.g. models:/ldm@champion")
    name, alias, number = match.groups()
    versions = find({}, name)
    found = next((one for one in versions if (one.version == int(number) if number else alias in one.aliases)), None)
    if found:
        return found
    hint = "`ldm registry list` shows what there is"
    if number:
        raise InputError(f"model {name!r} has no version {number}; {hint}")
    if alias == "champion":
        hint = "`ldm run` makes one, `ldm registry promote VERSION` chooses one by hand"
    raise InputError(f"{uri}: no version of {name!r} has the alias {alias!r}; {hint}")


def by_alias(name: str, alias: str) -> Version | None:
    return next((version for version in find({}, name) if alias in version.aliases), None)


def find(tags: Mapping[str, str], name: str = "ldm") -> list[Version]:
    """Versions that carry all these tags (e.g. `{"ldm.git_commit": "…"}`), newest first; maybe none."""
    model = local_store.read_model(name)
    if model is None:
        found = _search(connect(), name)
    else:
        found = [_version(version, model.aliases, version.folder) for version in model.versions]
    return [version for version in found if tags.items() <= version.tags.items()]


def load(uri: str, device: "torch.device | str" = "cpu") -> "LatentDiffusion":
    """Load the model behind a `models:/…` URI."""
    from ldm.model import LatentDiffusion

    with downloaded(uri) as folder:
        return LatentDiffusion.load(folder, device=device)


@contextlib.contextmanager
def downloaded(uri: str) -> Iterator[Path]:
    """The folder of the saved model behind a `models:/…` URI: the store's own files, or a temporary copy. Only read it."""
    with _files(lookup(uri), SYSTEM) as folder:
        yield folder


def kept(version: Version, file: str) -> str | None:
    """The text of a file that is stored with a version, e.g. "dvc.lock"; None where the store no longer has it."""
    with contextlib.suppress(NotStored), _files(version, f"{LINEAGE}/{file}") as path:
        return path.read_text(encoding="utf-8")
    return None


def tag(version: Version, key: str, value: str) -> None:
    """Set a tag of a version."""
    connect().set_model_version_tag(version.name, str(version.version), key, value)


def overview(version: Version) -> dict[str, str]:
    """A version as a row of the table of versions."""
    bits = version.tags[BITS]
    return {
        "version": str(version.version),
        "aliases": ", ".join(version.aliases),
        "created": f"{version.created:%Y-%m-%d %H:%M}",
        "bits_per_dim": bits if bits == NO_BOUND else f"{float(bits):.4f}",
        "gate": _gate(version).get("in short", ""),
        "image": version.tags[IMAGE],
        "git_commit": version.tags.get("ldm.git_commit", "")[:8],
    }


def describe(version: Version) -> dict[str, str]:
    """All about a version in words: where it came from, what the gate said and why, how it was evaluated."""
    facts = {
        "version": version.uri,
        "aliases": ", ".join(version.aliases),
        "created": f"{version.created:%Y-%m-%d %H:%M} UTC",
        "run": version.run_id or "",
        "gate": "no decision yet",
    }
    facts |= {name: words for name, words in _gate(version).items() if name != "in short"}
    return facts | {key.removeprefix("ldm."): value for key, value in sorted(version.tags.items()) if key != GATE}


def _gate(version: Version) -> dict[str, str]:
    """What the gate decided about a version and why; nothing before its decision."""
    if GATE not in version.tags:
        return {}
    gate = json.loads(version.tags[GATE])
    outcome = "promoted" if gate["promote"] else "not promoted"
    words = {"gate": f"{outcome}: {gate['reason']}", "in short": f"{outcome}: {re.split('[:;]', gate['reason'])[0]}"}
    if math.isfinite(gate["mean"]):
        gain = f"{gate['mean']:+.3g} ± {gate['se']:.2g} nats"
        words["in short"] = f"{outcome}: {gain} against version {gate['champion']}"
        words["improvement"] = f"{gain} per image over models:/{version.name}/{gate['champion']}, on {gate['n']} test images"
    if version.run_id:
        words["decision page"] = _decision_page(version)
    return words


def _decision_page(version: Version) -> str:
    """Its file, where MLflow keeps it on this machine beside the version's files; else how to download it."""
    name = Path(DECISION).name
    if version.folder:  # EXPERIMENT/models/MODEL/artifacts; a run's are in EXPERIMENT/RUN/artifacts
        page = version.folder / f"../../../{version.run_id}/artifacts/{name}"
        if page.is_file():
            return str(page.resolve())
    return f"`mlflow artifacts download --artifact-uri runs:/{version.run_id}/{name}`"


def connect(*, create: bool = False) -> Any:
    """MLflow's client. A store that is not there, or does not answer, is an `InputError`."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    database = uri.removeprefix("sqlite:///")
    if database != uri and not create and not Path(database).exists():
        raise InputError(f"{uri}: no registry there yet; `ldm run` makes one, or set MLFLOW_TRACKING_URI")
    client = mlflow_client()
    from mlflow.exceptions import MlflowException

    try:
        with short_patience():
            client.search_registered_models(max_results=1)
    except MlflowException as error:
        reason = str(error).splitlines()[0][:200]
        raise Unreachable(f"MLFLOW_TRACKING_URI {uri}: the registry cannot be read ({reason})") from None
    return client


def _search(client: Any, name: str) -> list[Version]:
    """The versions of a model, newest first, through MLflow's client; at most 10,000."""
    query = f"name = '{name}'"
    models = client.search_registered_models(query)
    found = client.search_model_versions(query, order_by=["version_number DESC"])
    return [_version(version, models[0].aliases) for version in found]


def _version(found: Any, aliases: Mapping[str, str], folder: Path | None = None) -> Version:
    names = tuple(sorted(alias for alias, version in aliases.items() if int(version) == int(found.version)))
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return Version(found.name, int(found.version), names, created, found.run_id, dict(found.tags), folder)


@contextlib.contextmanager
def _files(version: Version, path: str) -> Iterator[Path]:
    """A file or folder of a version: where it lies on this machine, or a temporary copy."""
    if version.folder and (version.folder / path).exists():
        yield version.folder / path
        return
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    connect()
    with tempfile.TemporaryDirectory() as folder:
        try:
            copy = mlflow.artifacts.download_artifacts(f"{version.uri}/{path}", dst_path=folder)
        except (MlflowException, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise NotStored(f"{version.uri}: the registry has no {path} of it, which `ldm run` stores ({reason})") from error
        yield Path(copy)
