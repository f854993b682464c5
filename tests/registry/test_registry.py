"""Registering, looking up, gating and serving a tiny model in a real MLflow store."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from tiny import careless_numerics, exact, set_params
from typer.testing import CliRunner

from ldm.base.errors import InputError
from ldm.base.files import folder_hash
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic
from ldm.cli import app
from ldm.config import load_settings
from ldm.data.reader import open_shards
from ldm.data.shards import write_shards
from ldm.diffusion.options import Recipe
from ldm.evaluation.bounds import image_bounds
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL, VQModel
from ldm.nets.text.minilm import MiniLM
from ldm.nets.unet import UNet
from ldm.registry import versions
from ldm.registry.lineage import log_results, numbers, pipeline_run
from ldm.registry.registration import Registered, compare, gate_and_promote, promote, register, rollback
from ldm.registry.versions import Unreachable, connect, describe, downloaded, find, kept, load, lookup, overview

ROOT = Path(__file__).resolve().parents[2]
LEVELS = 4
SAMPLING = {
    "sampler": {"kind": "euler"}, "schedule": "karras", "steps": 2, "guidance": 1.0, "guidance_interval": None,
    "guidance_rescale": 0.0,
}  # fmt: skip


def tiny_model(seed: int, log_scale: float) -> LatentDiffusion:
    """An untrained system for 8x8 grey images; its bound depends mostly on the likelihood's scale."""
    torch.manual_seed(seed)
    text = MiniLM(max_tokens=8)
    encoder = text.build()
    autoencoder = AutoencoderKL(1, 1, 4, [8, 8], layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False)
    unet = UNet(4, 4, [8, 8], 1, ["none", "cross"], encoder.width, 2, norm_num_groups=4)
    recipe = Recipe(
        diffusion={"prediction": "v", "noise": {"kind": "cosine"}},
        autoencoder="untrained",
        preprocessing={"image_size": 8, "channels": 1, "resize_filter": "box", "fit": "cover"},
        latent_mean=[0.0] * 4,
        latent_std=[1.0] * 4,
        text={"options": text.model_dump(), "sha256": encoder.sha256},
        sampling=SAMPLING,
    )
    return LatentDiffusion(autoencoder, DiscretizedLogistic(log_scale=log_scale).build(), unet, recipe)


def write_outs(root: Path, model: LatentDiffusion, image: str = "8x8x1, box") -> None:
    """What `evaluate` leaves behind, as far as the registry reads it."""
    model.save(root / "models/ldm")
    test = open_shards(root / "data/shards", "test")
    metrics: dict[str, float | str] = {"test_images": len(test), "image": image}
    if isinstance(model.autoencoder, VQModel):
        bounds = pd.DataFrame({"key": test.captions.key, "reconstruction": -100.0, "rate": 10.0, "dims": 64})
    else:
        bounds = image_bounds(model, test, levels=LEVELS, seed=0, progress=print)
        metrics |= {"bits_per_dim": 3.0, "bits_per_dim_se": 0.1}
    bounds.to_csv(root / "reports/bounds.csv", index=False)
    (root / "reports/metrics.json").write_text(json.dumps(metrics))
    (root / "reports/report.html").write_text("<p>report</p>")
    (root / "dvc.lock").write_text("schema: '2.0'")


@pytest.fixture(scope="module")
def models() -> dict[str, LatentDiffusion]:
    return {"poor": tiny_model(0, 2.0), "good": tiny_model(1, -0.5)}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings, shards of 60 random images, an empty registry database (its migrations take seconds)."""
    root = tmp_path_factory.mktemp("registry")
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["data"] |= {"image_size": 8, "resize_filter": "box", "test_fraction": 0.4}
    settings["autoencoder"]["block_out_channels"] = [8, 8]
    settings["evaluate"]["bound_levels"] = LEVELS
    settings["registry"]["level"] = 0.05
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    (root / "dvc.yaml").touch()
    images, rng = root / "images", np.random.default_rng(0)
    images.mkdir()
    for number in range(60):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text("noise")
    data = load_settings(root).data.model_dump(exclude={"source", "path"})
    write_shards(images, root / "data/shards", **data)
    (root / "reports").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        connect(create=True)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = Path(shutil.copytree(template, tmp_path / "root"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(root)
    return root


def aliases(root: Path) -> dict[str, int]:
    return {alias: found.version for found in find({}) for alias in found.aliases}


def page(root: Path) -> str:
    """The words of the decision's page."""
    return re.sub("<[^>]*>", "", (root / "reports/decision.html").read_text())


def test_the_same_files_are_registered_once(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["poor"])
    first = register(root)
    assert first == Registered(1, created=True)
    (root / "dvc.lock").write_text("schema: '2.0'  # another commit, the same weights")
    assert register(root) == Registered(1, created=False)
    write_outs(root, models["good"])
    assert register(root) == Registered(2, created=True)
    assert aliases(root) == {"challenger": 2}

    version = lookup("models:/ldm/1")
    assert {"ldm.model", "ldm.dvc_lock", "ldm.data_index", "ldm.evaluation", "ldm.image"} <= version.tags.keys()
    assert json.loads(version.tags["ldm.evaluation"])["bound_levels"] == LEVELS
    assert [found.version for found in find({"ldm.model": version.tags["ldm.model"]})] == [1]
    assert [(found.version, found.tags["ldm.image"]) for found in find({})] == [(2, "8x8x1, box"), (1, "8x8x1, box")]
    import mlflow.artifacts

    files = mlflow.artifacts.list_artifacts("models:/ldm/1/lineage")
    assert {Path(file.path).name for file in files} == {"dvc.lock", "params.yaml", "metrics.json", "report.html"}


def test_a_metric_is_one_point_of_the_run_and_of_the_model(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["poor"])
    expected, client = numbers(root / "reports/metrics.json"), connect()
    for created in (True, False):  # the second finds the version of the first
        with pipeline_run(root, {}) as run:
            log_results(run, root)
            assert register(root, run.id).created == created
        found = {key: [(point.step, point.value) for point in client.get_metric_history(run.id, key)] for key in expected}
        assert found == {key: [(0, value)] for key, value in expected.items()}
        outputs = client.get_run(run.id).outputs.model_outputs
        assert len(outputs) == created
        for output in outputs:
            metrics = client.get_logged_model(output.model_id).metrics
            assert {metric.key: metric.value for metric in metrics} == expected and len(metrics) == len(expected)
            assert {metric.run_id for metric in metrics} == {run.id}


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_project_keeps_its_models(
    how: str, root: Path, models: dict[str, LatentDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it goes: they load, also in an application after one of our commands, and new ones are registered there."""
    import mlflow.pyfunc

    write_outs(root, models["poor"])
    register(root)
    gate_and_promote(root, 1)
    new, stored = root.parent / "a new place", folder_hash(root)
    (shutil.copytree if how == "copied" else shutil.move)(root, new)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # as in an application
    monkeypatch.chdir(new)
    assert load("models:/ldm@champion").recipe == models["poor"].recipe
    frame = pd.DataFrame({"prompt": ["noise"]})
    assert len(mlflow.pyfunc.load_model("models:/ldm@champion").predict(frame)) == 1
    write_outs(new, models["good"])
    assert register(new) == Registered(2, created=True) and gate_and_promote(new, 2).promote
    assert all(str(found.folder).startswith(f"{new}/mlruns/ldm/models/") for found in find({}))
    assert folder_hash(root) == stored if how == "copied" else not root.exists()


def test_the_gate_lets_the_better_model_through_and_decides_once(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["poor"])
    register(root)
    decision = gate_and_promote(root, 1)
    assert decision.promote and decision.reason == "no champion yet"
    assert "already" in gate_and_promote(root, 1).reason

    write_outs(root, models["good"])
    register(root)
    decision = gate_and_promote(root, 2)
    assert decision.promote and decision.lower > 0
    assert aliases(root) == {"champion": 2, "previous": 1, "challenger": 2}
    assert "version 2" in page(root)
    expected = pd.read_csv(root / "reports/bounds.csv").nats.mean() - _bounds(root, models["poor"]).nats.mean()
    assert decision.mean == pytest.approx(expected, rel=1e-5)

    assert rollback() == 1
    assert aliases(root) == {"champion": 1, "previous": 2, "challenger": 2}
    again = gate_and_promote(root, 2)  # the next night, nothing changed: what was rolled back stays so
    assert not again.promote and "was champion before" in again.reason
    assert aliases(root)["champion"] == 1
    assert "ldm version 2 does not become champion" in page(root) and "Version 2 was champion before version 1" in page(root)
    gate_and_promote(root, 1)
    assert "ldm version 1 becomes champion" in page(root) and "no champion yet" in page(root)


def test_the_gate_keeps_a_worse_model_out_until_someone_says_so(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["good"])
    register(root)
    gate_and_promote(root, 1)
    write_outs(root, models["poor"])
    register(root)
    decision = gate_and_promote(root, 2)
    assert not decision.promote and decision.mean < 0
    assert aliases(root) == {"champion": 1, "challenger": 2}
    known = page(root)
    assert "ldm version 2 does not become champion" in known and "Image by image" in known
    (root / "reports/decision.html").write_text("of another version")
    assert "decided before against version 1" in gate_and_promote(root, 2).reason
    assert page(root) == known
    promote(2)
    gate_and_promote(root, 2)
    assert "ldm version 2 stays champion" in page(root) and "Version 2 is the champion already." in page(root)
    assert aliases(root) == {"champion": 2, "previous": 1, "challenger": 2}
    promote(2)  # again changes nothing: previous stays
    assert aliases(root)["previous"] == 1


def test_why_a_version_was_promoted_or_not_can_be_read(
    root: Path, models: dict[str, LatentDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_outs(root, models["good"])
    register(root)
    assert overview(lookup("models:/ldm/1"))["gate"] == "" and describe(lookup("models:/ldm/1"))["gate"] == "no decision yet"
    gate_and_promote(root, 1)
    write_outs(root, models["poor"])
    register(root)
    decision = gate_and_promote(root, 2)
    write_outs(root, tiny_model(2, 0.0), image="16x16x3, lanczos")
    register(root)
    gate_and_promote(root, 3)

    gain = f"{decision.mean:+.3g} ± {decision.se:.2g} nats"
    rejected = f"not promoted: {gain} against version 1"
    outcomes = ["not promoted: not comparable", rejected, "promoted: no champion yet"]
    assert [overview(version)["gate"] for version in find({})] == outcomes
    facts = describe(lookup("models:/ldm/2"))
    assert facts["gate"] == f"not promoted: {decision.reason}"
    assert facts["improvement"] == f"{gain} per image over models:/ldm/1, on {decision.n} test images"
    assert "ldm version 2 does not become champion" in Path(facts["decision page"]).read_text()
    assert describe(lookup("models:/ldm/3"))["gate"].startswith("not promoted: not comparable: its images are 16x16x3")

    monkeypatch.setattr(versions, "REVISION", "of another MLflow")  # so that nothing is known to lie on this machine
    place = describe(lookup("models:/ldm/2"))["decision page"]
    command, artifact = place.strip("`").rsplit(" ", 1)
    assert command == "mlflow artifacts download --artifact-uri"
    import mlflow.artifacts

    assert "ldm version 2" in Path(mlflow.artifacts.download_artifacts(artifact)).read_text()

    (root / "dvc.yaml").touch()  # so that this is a project
    shown = CliRunner().invoke(app, ["registry", "show", "2"], catch_exceptions=False).output.splitlines()
    assert f"gate            not promoted: {decision.reason}" in shown
    listed = CliRunner().invoke(app, ["registry", "list"], catch_exceptions=False).output.splitlines()
    assert "gate" in listed[0].split() and rejected in listed[2]


def test_what_changed_since_the_last_repro_is_not_registered(root: Path, models: dict[str, LatentDiffusion]) -> None:
    """A version's stored settings and metrics are those that made it."""
    write_outs(root, models["poor"])
    settings = yaml.safe_load((root / "params.yaml").read_text())
    metrics = root / "reports/metrics.json"
    out = {"path": "reports/metrics.json", "md5": hashlib.md5(metrics.read_bytes()).hexdigest()}
    stage = {"params": {"params.yaml": {"train_unet.lr": settings["train_unet"]["lr"]}}, "outs": [out, {"path": "models/ldm"}]}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"evaluate": stage}}))
    settings["train_unet"]["lr"] *= 2
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match=r"params\.yaml: train_unet\.lr changed since stage evaluate ran"):
        register(root)
    settings["train_unet"]["lr"] /= 2
    (root / "params.yaml").write_text(yaml.safe_dump(settings))
    metrics.write_text(metrics.read_text() + " ")
    with pytest.raises(InputError, match=r"metrics\.json: changed since stage evaluate wrote it"):
        register(root)
    assert find({}) == []


def test_small_numbers_are_numbers_as_dvc_writes_them(root: Path, models: dict[str, LatentDiffusion]) -> None:
    """DVC writes 1.0e-7 as 1e-07, which other readers of YAML take for a string."""
    write_outs(root, models["poor"])
    set_params(root, {"train_vae": {"lr": 1.0e-7}})
    lock = root / "dvc.lock"
    lock.write_text(
        "stages:\n  train_vae:\n    params:\n      params.yaml:\n        train_vae.lr: 1e-07\n    outs:\n    - path: models/ldm\n"
    )
    assert register(root).created
    lock.write_text(lock.read_text().replace("1e-07", "2e-07"))
    with pytest.raises(InputError, match=r"train_vae\.lr changed"):
        register(root)


def test_a_posterior_that_is_no_longer_asked_for_stops_nothing(root: Path, models: dict[str, LatentDiffusion]) -> None:
    """DVC leaves in dvc.lock what a stage was last run with, after the stage has gone from the list in params.yaml."""
    write_outs(root, models["poor"])
    outs, deps = [{"path": "models/posterior/sgld"}], [{"path": "models/ldm"}]
    stage = {"params": {"params.yaml": {"seed": -1, "posterior": {"draws": 3}}}, "outs": outs, "deps": deps}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"sample_posterior@sgld": stage}}))
    assert register(root).created


def test_a_version_names_the_checkpoint_that_was_adopted(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["poor"])
    (root / "models/unet").mkdir(parents=True, exist_ok=True)
    step = {"reached": 1200, "code": "abcdef0123", "changed": ["ldm.training.fit"]}
    (root / "models/unet/adopted.json").write_text(json.dumps({"stage": "train_unet", "adopted": [step]}))
    made = lookup(f"models:/ldm/{register(root).version}")
    assert made.tags["ldm.adopted"] == "train_unet: up to 1,200 by code abcdef01, then ldm.training.fit changed"


def test_an_alias_lost_to_a_kill_is_set_by_the_next_run(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["poor"])
    register(root)
    from mlflow.tracking import MlflowClient

    MlflowClient().delete_registered_model_alias("ldm", "challenger")
    assert aliases(root) == {}
    register(root)
    assert aliases(root) == {"challenger": 1}


def test_a_champion_that_someone_replaced_does_not_come_back_by_itself(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["poor"])
    gate_and_promote(root, register(root).version)
    write_outs(root, models["good"])
    assert gate_and_promote(root, register(root).version).promote
    promote(1)
    again = gate_and_promote(root, register(root).version)
    assert not again.promote and "was champion before version 1" in again.reason
    assert aliases(root)["champion"] == 1


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_champion_is_measured_under_the_numerics_of_the_challengers_stage(
    deterministic: bool, root: Path, models: dict[str, LatentDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_params(root, {"deterministic": deterministic})
    write_outs(root, models["good"])
    register(root)
    bound, found = LatentDiffusion.bound, []
    with careless_numerics() as read:
        monkeypatch.setattr(LatentDiffusion, "bound", lambda *given, **named: found.append(read()) or bound(*given, **named))
        nats = compare(root, lookup("models:/ldm/1"))
    assert len(found) == 2 and set(map(str, found)) == {str(exact(deterministic))}  # a part of one image, and the others
    assert np.allclose(nats.challenger, nats.champion, rtol=1e-6) and len(nats) == 20  # they are the same model


def test_models_of_other_images_are_not_compared(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["poor"])
    register(root)
    gate_and_promote(root, 1)
    write_outs(root, models["good"], image="16x16x3, lanczos")
    register(root)
    decision = gate_and_promote(root, 2)
    assert not decision.promote
    assert "16x16x3, lanczos" in decision.reason and "8x8x1, box" in decision.reason
    assert aliases(root)["champion"] == 1


def test_a_vq_model_is_promoted_by_hand_alone(root: Path, models: dict[str, LatentDiffusion]) -> None:
    """It has no bound that the gate could compare, be it challenger or champion."""
    good = models["good"]
    codes = VQModel(1, 1, 4, [8, 8], norm_num_groups=4, mid_block_add_attention=False)
    write_outs(root, LatentDiffusion(codes, good.likelihood, good.unet, good.recipe))
    register(root)
    decision = gate_and_promote(root, 1)
    assert not decision.promote and "not comparable: version 1 has a VQ autoencoder" in decision.reason
    assert "`ldm registry promote 1`" in decision.reason and decision.reason[1:].replace("`", "") in page(root)
    assert aliases(root) == {"challenger": 1}

    promote(1)
    assert isinstance(load("models:/ldm@champion").autoencoder, VQModel)
    write_outs(root, good)
    register(root)
    decision = gate_and_promote(root, 2)
    assert not decision.promote and "version 1 has a VQ autoencoder" in decision.reason
    assert aliases(root) == {"champion": 1, "challenger": 2}

    (root / "dvc.yaml").touch()  # so that this is a project
    listed = CliRunner().invoke(app, ["registry", "list"], catch_exceptions=False).output.splitlines()
    assert [line.split()[0] for line in listed] == ["version", "2", "1"]
    assert " 3.0000 " in listed[1] and " none " in listed[2]


def test_a_bound_that_is_no_number_is_none_of_a_vq_model(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["good"])
    bounds, metrics = pd.read_csv(root / "reports/bounds.csv"), json.loads((root / "reports/metrics.json").read_text())
    bounds.assign(nats=float("nan")).to_csv(root / "reports/bounds.csv", index=False)
    (root / "reports/metrics.json").write_text(json.dumps(metrics | {"bits_per_dim": float("nan")}))
    register(root)
    decision = gate_and_promote(root, 1)
    assert not decision.promote and "VQ" not in decision.reason and "finite" in decision.reason


@pytest.mark.parametrize("linked", [False, True], ids=["files", "links into DVC's cache"])
def test_what_is_loaded_is_what_was_registered(linked: bool, root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["good"])
    for number, path in enumerate(sorted((root / "models/ldm").rglob("*.*")) if linked else ()):
        path.rename(root / f"{number}")
        path.symlink_to(root / f"{number}")
    register(root)
    promote(1)
    loaded = load("models:/ldm@champion")
    prompts = ["noise", "more noise"]
    torch.testing.assert_close(loaded.sample(prompts, seed=3), models["good"].sample(prompts, seed=3), rtol=0, atol=0)


def test_files_on_this_machine_are_read_where_they_lie(
    root: Path, models: dict[str, LatentDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_outs(root, models["good"])
    register(root)
    version = lookup("models:/ldm/1")
    with downloaded(version.uri) as folder:
        assert folder.is_relative_to(root / "mlruns")
        known = folder_hash(folder)
    assert known == folder_hash(root / "models/ldm") and folder.is_dir()
    lock = kept(version, "dvc.lock")
    assert lock == (root / "dvc.lock").read_text()

    monkeypatch.setattr(versions, "REVISION", "of another MLflow")  # so that MLflow is asked
    version = lookup("models:/ldm/1")
    assert version.folder is None and kept(version, "dvc.lock") == lock and kept(version, "lost") is None
    with downloaded(version.uri) as copy:
        assert not copy.is_relative_to(root) and folder_hash(copy) == known
    assert not copy.exists()


def test_the_command_line_draws_from_the_champion_without_mlflow(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["good"])
    register(root)
    promote(1)
    (root / "dvc.yaml").touch()  # so that this is a project
    arguments = ["sample", "--prompt", "noise", "-n", "2", "--out", "two"]
    code = f"import sys; from ldm.cli import app; app({arguments}, standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["loading models:/ldm@champion …", "drawing 2 images …"]
    assert not {"mlflow", "sqlalchemy", "pandas", "transformers"} & set(done.stdout.split())
    images = models["good"].sample(["noise"] * 2)
    written = [np.asarray(Image.open(root / f"two/{i:04d}.png")) for i in range(2)]
    np.testing.assert_array_equal(written, images[:, 0])


def test_the_served_model_gives_pngs_and_the_same_bytes_for_a_seed(
    root: Path, models: dict[str, LatentDiffusion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    write_outs(root, models["good"])
    register(root)
    promote(1)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow's own default, in the project's folder
    import mlflow.pyfunc

    served = mlflow.pyfunc.load_model("models:/ldm@champion")
    prompts = pd.DataFrame({"prompt": ["noise", "more noise"]})
    images = served.predict(prompts)
    assert list(images.columns) == ["prompt", "seed", "png"] and list(images.prompt) == list(prompts.prompt)
    for blob in images.png:
        assert Image.open(io.BytesIO(blob)).size == (8, 8)
    assert list(served.predict(prompts).png) == list(images.png)
    assert list(served.predict(prompts, params={"seed": 1}).png) != list(images.png)
    assert list(served.predict(prompts, params={"steps": 3, "guidance": 2.0, "sampler.kind": "heun"}).png) != list(images.png)

    seeded = pd.DataFrame({"prompt": ["noise"] * 3, "seed": [5, 6, 5]})
    several = served.predict(seeded)
    alone = served.predict(pd.DataFrame({"prompt": ["noise"], "seed": [6]}))
    assert list(several.seed) == [5, 6, 5] and several.png[1] == alone.png[0]


def test_what_is_not_there_is_named_with_what_to_do(root: Path, models: dict[str, LatentDiffusion]) -> None:
    for call, says in (
        (lambda: load("models:/ldm@champion"), "alias 'champion'; `ldm run`"),
        (lambda: lookup("models:/ldm@best"), "alias 'best'; `ldm registry list`"),
        (lambda: lookup("models:/ldm/7"), "no version 7"),
        (lambda: lookup("ldm@champion"), "not a model: write models:/NAME@ALIAS"),
        (lambda: promote(7), "no version 7"),
        (rollback, "nothing to roll back to"),
        (lambda: register(root), r"models/ldm: not found; `dvc repro`"),
    ):
        with pytest.raises(InputError, match=says):
            call()
    assert find({}) == []


def test_a_model_that_is_none_of_ours_is_named(root: Path, models: dict[str, LatentDiffusion]) -> None:
    write_outs(root, models["good"])
    register(root)
    shutil.rmtree(next((root / "mlruns").rglob("artifacts/ldm")))
    with pytest.raises(InputError, match="models:/ldm/1: the registry has no artifacts/ldm of it, which `ldm run` stores"):
        load("models:/ldm/1")


def test_a_store_that_is_not_there_is_not_made_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(InputError, match="no registry there yet"):
        lookup("models:/ldm@champion")
    assert not (tmp_path / "mlflow.db").exists()


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"http://127.0.0.1:9"):
        lookup("models:/ldm@champion")


def _bounds(root: Path, model: LatentDiffusion) -> pd.DataFrame:
    return image_bounds(model, open_shards(root / "data/shards", "test"), levels=LEVELS, seed=0, progress=print)
