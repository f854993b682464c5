"""`ldm gc`: what is needed stays whole, all else goes, whatever runs meanwhile and whenever it is killed."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from dvc.repo import Repo
from kills import run_until_killed
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from tiny import REPOSITORY, set_params, with_soak
from typer.testing import CliRunner

from ldm.base import clock
from ldm.base.errors import InputError
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic
from ldm.cli import app
from ldm.collection.retention import collect_garbage
from ldm.diffusion.options import Recipe
from ldm.model import LatentDiffusion
from ldm.nets.autoencoder import AutoencoderKL
from ldm.nets.text.minilm import MiniLM
from ldm.nets.unet import UNet
from ldm.registry import lineage, registration, tracking
from ldm.registry import versions as registry

MINE = "data/raw/mine"
STAGES = """
stages:
  shard:
    cmd: echo shard
    deps: [data/raw/mine]
    outs: [data/shards]
  evaluate:
    cmd: echo evaluate
    deps: [data/shards]
    outs: [models/ldm, reports/report.html]
    metrics: [reports/metrics.json: {cache: false}]
"""
IGNORED = "/.ldm/\n/mlflow.db*\n/mlruns/\n/data/shards\n/models/\n/reports/*\n/data/raw/mine\n"
OUTS = ("data/shards", "models/ldm", "reports/report.html", "reports/metrics.json")
NIGHTS = 6  # 1 is champion, 2 previous, the last starts from 3
STAYS = {1, 2, 3, NIGHTS}


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def untrained() -> LatentDiffusion:
    torch.manual_seed(0)
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
        sampling=yaml.safe_load((REPOSITORY / "params.yaml").read_text())["sampling"],
    )
    return LatentDiffusion(autoencoder, DiscretizedLogistic().build(), unet, recipe)


def night(root: Path, number: int, model: LatentDiffusion) -> None:
    """A scheduled run: its outs, its version, its run in MLflow, its commit on a branch of its slot."""
    git(root, "checkout", "--quiet", "--detach", "main")
    git(root, "commit", "--quiet", "--allow-empty", "--message", f"merge {number}")
    (root / MINE).mkdir(parents=True, exist_ok=True)
    (root / MINE / f"{number}.png").write_bytes(b"image %d" % number)
    for folder in ("data/shards", "reports"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "data/shards/index.json").write_text(json.dumps({"splits": {"train": [0, 2], "test": [2, 4]}}))
    (root / "data/shards/first.tar").write_bytes(b"the same every night")
    (root / "data/shards/last.tar").write_bytes(b"shard %d" % number)
    model.likelihood = DiscretizedLogistic(log_scale=-float(number)).build()
    model.save(root / "models/ldm")
    (root / "reports/bounds.csv").write_text("key,nats\na,-1.5\n")
    (root / "reports/metrics.json").write_text(json.dumps({"bits_per_dim": 3.0 + number, "image": "8x8x1, box"}))
    (root / "reports/report.html").write_text(f"<p>{number}</p>")
    set_params(root, {"autoencoder": {"pretrained": "models:/ldm/3"}} if number == NIGHTS else {})
    with contextlib.chdir(root), Repo(".") as repo:
        repo.add([MINE])
        repo.commit(force=True)
        for name in ("shard", "evaluate"):
            repo.stage_cache.save(repo.stage.load_one(name=name))
    settings = {"registry": {"name": "ldm"}, "night": number}
    with lineage.pipeline_run(root, settings) as run, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_PARENT_RUN", str(run.id))
        with tracking.stage_run("shard", {}) as stage:
            stage.artifact(root / "reports/report.html")
        lineage.log_results(run, root)
        assert registration.register(root, run.id).version == number
    git(root, "add", "--force", "dvc.lock", "params.yaml", f"{MINE}.dvc", "reports/metrics.json")
    git(root, "commit", "--quiet", "--message", f"night {number}")
    git(root, "branch", f"runs/nightly/2026-01-{number:02d}" if number < NIGHTS else f"runs/nightly/2026-01-{number - 1:02d}-2")


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose nights are over; its `main` has not moved."""
    root = tmp_path_factory.mktemp("history") / "project"
    root.mkdir()
    (root / "dvc.yaml").write_text(STAGES)
    (root / ".gitignore").write_text(IGNORED)
    shutil.copy(REPOSITORY / "params.yaml", root)
    set_params(root, {"data": {"path": MINE}})
    git(root, "init", "--quiet", "--initial-branch", "main")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=root, check=True)
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "project")
    model = untrained()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        for number in range(1, NIGHTS + 1):
            night(root, number, model)
        registration.promote(2)
        registration.promote(1)  # 2 is `previous`
    git(root, "branch", "runs/collection")
    for branch in ("runs/mine", "runs/nightly/mine", "topic"):  # the user's own
        git(root, "branch", branch, "main")
    git(root, "checkout", "--quiet", "main")
    return root


@pytest.fixture
def root(history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, in which we are; it is two months later."""
    root = Path(shutil.copytree(history, tmp_path / "project", symlinks=True))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.chdir(root)
    tracking.mlflow_client()  # which notices that this is a copy
    later(monkeypatch, days=60)
    return root


def later(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    monkeypatch.setattr(clock, "now", lambda: datetime.now(UTC) + timedelta(days=days))


def everything(root: Path) -> dict[str, bytes]:
    """Every file but git's and DVC's own notes, by path; MLflow's database by what it holds."""
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file() and not path.is_symlink()}
    skipped = (".git/", ".dvc/tmp/", "mlflow.db", ".ldm/gc.lock")
    found = {name: path.read_bytes() for name, path in files.items() if not name.startswith(skipped)}
    return found | {f"mlflow {key}": repr(value).encode() for key, value in store().items()} | {"git": branches(root).encode()}


def store() -> dict[str, list[str]]:
    client = MlflowClient()
    runs = client.search_runs(["1"], run_view_type=ViewType.ALL)
    return {
        "versions": sorted(f"{one.version} {one.current_stage}" for one in client.search_model_versions("name = 'ldm'")),
        "runs": sorted(f"{run.info.run_id} {run.info.lifecycle_stage}" for run in runs),
        "models": sorted(one.model_id for one in client.search_logged_models(["1"])),
    }


def branches(root: Path) -> str:
    return git(root, "for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads")


def objects(root: Path) -> set[str]:
    return {path.parent.name + path.name for path in (root / ".dvc/cache/files/md5").glob("*/*")}


def needed(root: Path, number: int) -> set[str]:
    """The objects of a version, read from its dvc.lock."""
    lock = yaml.safe_load(registry.kept(registry.lookup(f"models:/ldm/{number}"), "dvc.lock") or "")
    entries = [entry for stage in lock["stages"].values() for entry in [*stage["deps"], *stage["outs"]]]
    found = {entry["md5"] for entry in entries}
    for md5 in [md5 for md5 in found if md5.endswith(".dir")]:
        listing = json.loads((root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]).read_text())
        found |= {entry["md5"] for entry in listing}
    return found


def check_whole(root: Path, number: int) -> None:
    """The version loads; its outs and its collection can be checked out, byte for byte."""
    version = registry.lookup(f"models:/ldm/{number}")
    lock = registry.kept(version, "dvc.lock") or ""
    (root / "dvc.lock").write_text(lock)
    runs = [line for line in branches(root).split() if line.startswith("runs/nightly/2026")]
    branch = next(run for run in runs if git(root, "rev-parse", f"{run}~1") == version.tags["ldm.git_commit"])
    (root / f"{MINE}.dvc").write_text(git(root, "show", f"{branch}:{MINE}.dvc"))
    metrics = git(root, "show", f"{branch}:reports/metrics.json")  # which git versions
    for out in (*OUTS, MINE):
        shutil.rmtree(root / out, ignore_errors=True)
        (root / out).unlink(missing_ok=True)
    with Repo(".") as repo:
        repo.checkout(force=True)
        (root / "reports/metrics.json").write_text(metrics)
        assert repo.status() == {}
    assert (root / "data/shards/last.tar").read_bytes() == b"shard %d" % number
    assert sorted(path.name for path in (root / MINE).iterdir()) == [f"{one}.png" for one in range(1, number + 1)]
    assert json.loads((root / "reports/metrics.json").read_text())["bits_per_dim"] == 3 + number
    loaded = registry.load(version.uri)
    assert loaded.likelihood.log_scale.item() == -number
    lock_hash = hashlib.sha256(lock.encode()).hexdigest()
    assert version.tags["ldm.dvc_lock"] == lock_hash


def check_collected(root: Path) -> None:
    """What has to stay is whole, and nothing else is there."""
    client, names = MlflowClient(), store()
    assert names["versions"] == [f"{number} None" for number in sorted(STAYS)]
    makers = {client.get_model_version("ldm", str(number)).run_id for number in STAYS}
    runs = client.search_runs(["1"], run_view_type=ViewType.ALL)
    assert {run.info.run_id for run in runs if "mlflow.parentRunId" not in run.data.tags} == makers
    assert len(runs) == 2 * len(STAYS)
    folders = {path.name for path in (root / "mlruns/ldm").iterdir()} - {"models"}
    assert folders <= {run.info.run_id for run in runs}
    assert {path.name for path in (root / "mlruns/ldm/models").iterdir()} == set(names["models"]) and len(names["models"]) == len(
        STAYS
    )
    days = ["01", "02", "03", f"{NIGHTS - 1:02d}-2"]
    assert branches(root).split() == sorted(["main", "topic", "runs/collection", "runs/mine", "runs/nightly/mine",
                                             *(f"runs/nightly/2026-01-{day}" for day in days)])  # fmt: skip
    assert objects(root) == set().union(*(needed(root, number) for number in STAYS))
    entries = [yaml.safe_load(path.read_text()) for path in (root / ".dvc/cache/runs").glob("*/*/*")]
    assert len(entries) == 2 * len(STAYS) and {out["md5"] for entry in entries for out in entry["outs"]} <= objects(root)
    assert not (root / ".dvc/cache/removed").exists()


def test_what_versions_that_stay_need_is_whole_and_all_else_goes(root: Path) -> None:
    before, unnamed = everything(root), objects(root) - set().union(*(needed(root, number) for number in STAYS))
    dry = collect_garbage(root, 1, dry_run=True)
    assert everything(root) == before
    table = collect_garbage(root, 1)
    pd.testing.assert_frame_equal(table, dry)
    counts = table.kind.value_counts().to_dict()
    gone = NIGHTS - len(STAYS)
    assert counts == {"version": gone, "run": 2 * gone, "branch": gone, "object": len(unnamed), "run-cache": 2 * gone}
    assert set(table[table.kind == "object"].name) == unnamed
    after = everything(root)
    freed = sum(len(content) for name, content in before.items() if name not in after and not name.startswith("mlflow "))
    assert table.bytes.sum() == freed > 0
    check_collected(root)
    assert len(collect_garbage(root, 1)) == 0 and everything(root) == after
    for number in STAYS:
        check_whole(root, number)


def test_what_is_a_week_old_or_in_a_run_that_stays_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later(monkeypatch, days=6)
    before = objects(root)
    table = collect_garbage(root, 1)
    assert "version" in set(table.kind) and not {"object", "run-cache"} & set(table.kind) and objects(root) == before
    assert len(collect_garbage(root, NIGHTS)) == 0


def test_what_only_deleted_branches_had_goes_from_git_after_two_weeks(root: Path) -> None:
    """Git by itself would wait for thousands of files."""
    commits = {day: git(root, "rev-parse", f"runs/nightly/2026-01-{day}") for day in ("01", "04")}
    git(root, "reflog", "expire", "--expire=now", "--all")
    for path in (root / ".git/objects").rglob("*"):
        os.utime(path, (time.time() - 15 * 24 * 3600,) * 2)
    collect_garbage(root, 1)
    found = {day: subprocess.run(["git", "cat-file", "-e", commit], cwd=root).returncode for day, commit in commits.items()}
    assert found["01"] == 0 != found["04"]


@pytest.mark.parametrize("place", ["outs in a worktree, uncommitted", "a .dvc file, uncommitted", "another model's version"])
def test_what_is_named_anywhere_stays(place: str, root: Path) -> None:
    """Commits that name it are in tests/versioning/test_branches.py."""
    staying = set().union(*(needed(root, number) for number in STAYS))
    named, unnamed = needed(root, 4) & objects(root) - staying, needed(root, 5) & objects(root) - staying - needed(root, 4)
    assert len(named) > 4 and len(unnamed) > 4
    if place == "outs in a worktree, uncommitted":
        worktree = root / ".ldm/worktrees/rebuild"
        git(root, "worktree", "add", "--quiet", "--detach", str(worktree), "main")
        (worktree / "dvc.lock").write_text(git(root, "show", "runs/nightly/2026-01-04:dvc.lock"))
    elif place == "a .dvc file, uncommitted":
        outs = [{"md5": md5, "path": md5, "hash": "md5"} for md5 in sorted(named)]
        (root / "other.dvc").write_text(yaml.safe_dump({"outs": outs}))
    else:
        MlflowClient().copy_model_version("models:/ldm/4", "prod")
    collect_garbage(root, 1)
    assert named <= objects(root) and not unnamed & objects(root)
    if place == "another model's version":
        registry.load("models:/prod/1")


def test_what_is_not_of_the_last_runs_but_in_use_stays(root: Path) -> None:
    """A version that a worktree starts from, a run that has not ended, and one whose stage has not."""
    client = MlflowClient()
    worktree = root / ".ldm/worktrees/nightly"
    git(root, "worktree", "add", "--quiet", "--detach", str(worktree), "main")
    set_params(worktree, {"autoencoder": {"pretrained": "models:/ldm/4@abc"}})
    running = client.create_run("1", start_time=1, tags={"ldm.stage": "pipeline"})
    half = client.create_run("1", start_time=2, tags={"ldm.stage": "pipeline"})
    stage = client.create_run("1", start_time=3, tags={"ldm.stage": "shard", "mlflow.parentRunId": half.info.run_id})
    other = client.create_run("1", start_time=4, tags={"ldm.stage": "pipeline"})  # of another project, with the same server
    for run, name in ((running, "ldm"), (half, "ldm"), (other, "faces")):
        client.log_param(run.info.run_id, "registry.name", name)
    for run in (half, other):
        client.set_terminated(run.info.run_id)
    table = collect_garbage(root, 1)
    assert list(table[table.kind == "version"].name) == ["models:/ldm/5"]
    left = " ".join(store()["runs"])
    assert all(f"{run.info.run_id} active" in left for run in (running, half, stage, other))
    client.set_terminated(stage.info.run_id, "KILLED")
    table = collect_garbage(root, 1)
    assert {name.split()[-1] for name in table.name} == {half.info.run_id, stage.info.run_id}


def test_a_stored_model_without_a_version_goes_after_a_day(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its registration was killed, or still runs."""
    client = MlflowClient()
    model = client.create_logged_model("1", "ldm")
    other = client.create_logged_model("1", "of the user")
    (root / "MLmodel").write_text("flavors: {}")
    client.log_model_artifact(model.model_id, str(root / "MLmodel"))
    later(monkeypatch, days=0)
    assert len(collect_garbage(root, NIGHTS)) == 0
    later(monkeypatch, days=1.1)
    assert list(collect_garbage(root, NIGHTS).name) == [model.model_id]
    assert not (root / "mlruns/ldm/models" / model.model_id).exists()
    assert other.model_id in store()["models"] and model.model_id not in store()["models"]


# while something runs


@pytest.fixture
def worktree(root: Path) -> Path:
    """Of a scheduled run, beside data that may go."""
    worktree = root / ".ldm/worktrees/nightly"
    git(root, "worktree", "add", "--quiet", "--detach", str(worktree), "runs/nightly/2026-01-03")
    (worktree / ".dvc/tmp").mkdir(parents=True)
    for place, files in ((root, ["here"]), (worktree, ["there"])):
        (place / "data/latents").mkdir(parents=True)
        manifest = {"files": [{"name": f"{name}.safetensors", "sha256": name} for name in files]}
        (place / "data/latents/manifest.json").write_text(json.dumps(manifest))
        (place / "data/shards.partial").mkdir()
        (place / "data/shards.partial/a.tar").write_text("half")
    (root / ".ldm/store/latents").mkdir(parents=True)
    for name in ("here", "there", "nowhere"):
        (root / f".ldm/store/latents/key-{name}.safetensors").write_text(name)
    (root / MINE / ".ingest.partial").mkdir(parents=True)
    (root / MINE / ".ingest.partial/a.png").write_text("half")
    (root / "data/film.partial").write_text("of the user's browser")
    return worktree


def data_left(root: Path) -> set[str]:
    """Of what the fixture has made."""
    places = ["data/*.partial", f"{MINE}/.ingest.partial", ".ldm/worktrees/nightly/data/*.partial", ".ldm/store/latents/*"]
    return {path.name for place in places for path in root.glob(place)}


NEEDED = {"film.partial", "key-here.safetensors", "key-there.safetensors"}


def test_half_written_data_and_latents_that_no_checkout_names_go(
    root: Path, worktree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = collect_garbage(root, 1)
    assert data_left(root) == NEEDED
    assert sorted(table[table.kind.isin(["latents", "leftover"])].name) == [
        ".ldm/store/latents/key-nowhere.safetensors", ".ldm/worktrees/nightly/data/shards.partial",
        f"{MINE}/.ingest.partial", "data/shards.partial",
    ]  # fmt: skip
    (root / ".ldm/store/latents/key-new.safetensors").write_text("of a stage that was just killed")
    later(monkeypatch, days=0.9)
    assert len(collect_garbage(root, 1)) == 0


@pytest.mark.parametrize("where", ["here", "in a worktree"])
@pytest.mark.parametrize("mode", ["write", "read"])
def test_what_a_running_stage_may_use_stays(where: str, mode: str, root: Path, worktree: Path) -> None:
    place = root if where == "here" else worktree
    stage = {"pid": os.getppid(), "cmd": "dvc repro"}
    (place / ".dvc/tmp/rwlock").write_text(
        json.dumps({mode: {str(place / "data/latents"): stage if mode == "write" else [stage]}})
    )
    table = collect_garbage(root, 1)
    if mode == "read":  # a training reads its own copy
        assert data_left(root) == NEEDED
        return
    assert data_left(root) - NEEDED == {"key-nowhere.safetensors", "shards.partial"} | (
        {".ingest.partial"} if where == "here" else set()
    )
    assert (place / "data/shards.partial").exists() and not (
        (root if place == worktree else worktree) / "data/shards.partial"
    ).exists()
    left = table[table.kind == "left"]
    assert list(left.name) == [os.path.relpath(place, root)] and "dvc repro" in left.why.iloc[0]
    assert "object" in set(table.kind)  # the lock of DVC's cache is held for an instant only
    assert list(json.loads((place / ".dvc/tmp/rwlock").read_text())["write"].values()) == [stage]


def test_while_an_ingest_works_its_batch_stays(root: Path, worktree: Path) -> None:
    from ldm.base.files import locked

    with locked(root / ".ldm/ingest.lock"):
        collect_garbage(root, 1)
        assert data_left(root) == NEEDED | {".ingest.partial"}
    collect_garbage(root, 1)
    assert data_left(root) == NEEDED


def test_what_a_stage_records_meanwhile_stays(root: Path, worktree: Path) -> None:
    """It made the same bytes as long ago: `ldm gc` has found that nothing names them, and waits for DVC's lock."""
    named, lock = needed(root, 4) & objects(root), git(root, "show", "runs/nightly/2026-01-04:dvc.lock")
    with contextlib.chdir(worktree), Repo(".") as repo:
        with repo.lock:
            collecting = threading.Thread(target=collect_garbage, args=(root, 1))
            collecting.start()
            while not waits_for_dvc(collecting):
                time.sleep(0.05)
            (worktree / "dvc.lock").write_text(lock)
        collecting.join()
    assert named <= objects(root)


def waits_for_dvc(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    assert thread.is_alive()
    while frame:
        if frame.f_code.co_filename.endswith("dvc/lock.py"):
            return True
        frame = frame.f_back
    return False


def test_while_dvc_itself_works_its_cache_stays(root: Path, worktree: Path) -> None:
    before = objects(root)
    with contextlib.chdir(worktree), Repo(".") as repo, repo.lock:
        table = collect_garbage(root, 1)
    assert objects(root) == before
    assert set(table[table.kind == "left"].name) == {"DVC's cache", os.path.relpath(worktree, root)}
    assert "object" in set(collect_garbage(root, 1).kind) and objects(root) < before


def test_unfinished_trainings_go_after_a_month_unless_one_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.base.files import locked

    for name in ("train_vae/dead", "train_vae/running", "train_unet/dead"):
        folder = root / ".ldm/work" / name
        (folder / "checkpoint/100").mkdir(parents=True)
        (folder / "checkpoint/100/state.safetensors").write_text("weights")
        (folder / "lock").touch()
        (folder / "bad_batch_7.safetensors").write_text("pixels")
        (folder / "work.json.123.partial").write_text("{")
    (root / ".ldm/work/train_unet/dead/lock").unlink()

    def there() -> set[str]:
        return {str(path.relative_to(root / ".ldm/work")) for path in (root / ".ldm/work").rglob("*") if path.is_file()}

    before = there()
    later(monkeypatch, days=0.9)
    collect_garbage(root, 1)
    assert there() == before
    later(monkeypatch, days=29)
    collect_garbage(root, 1)
    assert there() == {name for name in before if not name.endswith(".partial")}
    later(monkeypatch, days=31)
    with locked(root / ".ldm/work/train_vae/running/lock"):
        collect_garbage(root, 1)
    assert there() == {"train_vae/running/checkpoint/100/state.safetensors", "train_vae/running/lock"}
    collect_garbage(root, 1)
    assert there() == set()


def test_worktrees_that_git_does_not_know_go(root: Path, worktree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = root.parent / "of the user"
    for place in ("rebuild", "on-demand"):
        git(root, "worktree", "add", "--quiet", "--detach", str(root / ".ldm/worktrees" / place), "main")
    git(root, "worktree", "add", "--quiet", "--detach", str(outside), "main")
    (root / ".ldm/worktrees/rebuild/.ldm").mkdir()
    (root / ".ldm/worktrees/rebuild/.ldm/store").symlink_to(root / ".ldm/store")
    shutil.rmtree(root / ".git/worktrees/rebuild")
    for gone in (root / ".ldm/worktrees/on-demand", outside):
        shutil.rmtree(gone)
    later(monkeypatch, days=0.9)
    assert list(collect_garbage(root, 1).name[-1:]) == [".ldm/worktrees/on-demand"]
    assert (root / ".ldm/worktrees/rebuild").exists()
    later(monkeypatch, days=2)
    assert ".ldm/worktrees/rebuild" in set(collect_garbage(root, 1).name)
    assert (
        sorted(path.name for path in (root / ".ldm/worktrees").iterdir()) == ["nightly"]
        and (root / ".ldm/store/latents").exists()
    )
    assert git(root, "worktree", "list").count("\n") == 2  # the user's may be on a disk that is absent


# refusals, and what people see


def test_the_command_shows_a_line_for_each_kind_and_reason(root: Path) -> None:
    done = [CliRunner().invoke(app, ["gc", "--keep", "1", *more]) for more in (["--dry-run"], [], [])]
    assert [one.exit_code for one in done] == [0, 0, 0]
    dry, real, again = (one.output.splitlines() for one in done)
    assert dry[:-1] == real[:-1] and dry[-1] == "dry run: nothing was removed" and real[-1] == "removed"
    assert again == ["nothing to remove"]
    assert [line.split()[:2] for line in real[:-1]] == [
        ["kind", "count"], ["branch", "2"], ["version", "2"], ["run", "4"], ["object", "14"], ["run-cache", "4"],
    ]  # fmt: skip
    assert real[2].split("MB")[1].strip() == "no alias, and 1 versions are newer"


def test_a_cache_outside_of_the_project_is_left(root: Path) -> None:
    shutil.move(root / ".dvc/cache", root.parent / "shared")
    with contextlib.chdir(root):
        subprocess.run([sys.executable, "-m", "dvc", "cache", "dir", "--local", str(root.parent / "shared")], check=True)
    files = sorted((root.parent / "shared").rglob("*"))
    table = collect_garbage(root, 1)
    assert table[table.kind == "left"].name.tolist() == ["DVC's cache"] and "outside of the project" in table.why.iloc[-1]
    assert sorted((root.parent / "shared").rglob("*")) == files


def test_files_outside_of_a_copy_are_left(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy without MLflow's files names those of the project that it is a copy of."""
    copy = Path(shutil.copytree(root, root.parent / "copy", symlinks=True, ignore=shutil.ignore_patterns("mlruns")))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy}/mlflow.db")
    monkeypatch.chdir(copy)
    before = {path for path in (root / "mlruns").rglob("*") if path.is_file()}
    collect_garbage(copy, 1)
    assert {path for path in (root / "mlruns").rglob("*") if path.is_file()} == before


def test_a_version_whose_dvc_lock_is_lost_keeps_the_whole_cache(root: Path) -> None:
    folder = registry.lookup("models:/ldm/1").folder
    assert folder
    (folder / "lineage/dvc.lock").unlink()
    before = objects(root)
    table = collect_garbage(root, 1)
    assert objects(root) == before and "models:/ldm/1 has no dvc.lock" in table[table.kind == "left"].why.item()


def test_another_store_than_that_of_the_runs_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(root)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/other.db")
    with pytest.raises(InputError, match=r"other\.db: has no version of 'ldm', but runs were made here; set MLFLOW_TRACKING_URI"):
        collect_garbage(root, 1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    assert everything(root) == before


def test_in_a_worktree_it_is_refused(root: Path, worktree: Path) -> None:
    with pytest.raises(InputError, match=f"nightly: a worktree of {root}; run this in {root}"):
        collect_garbage(worktree, 1)


@pytest.mark.soak
def test_a_store_behind_a_server_is_marked_and_its_owner_deletes_the_rest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    database, uri = f"sqlite:///{root}/mlflow.db", f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--port", port, "--workers", "1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        for _ in range(120):
            with contextlib.suppress(InputError):
                registry.connect()
                break
            time.sleep(0.5)
        files = sorted((root / "mlruns").rglob("*"))
        table = collect_garbage(root, 1)
        assert {"version", "run", "object", "left"} <= set(table.kind) and table[table.kind == "left"].name.tolist() == [uri]
        assert "mlflow gc" in table[table.kind == "left"].why.item() and sorted((root / "mlruns").rglob("*")) == files
        assert len(collect_garbage(root, 1)) == 0
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", database]
    subprocess.run(command, check=True, capture_output=True)
    for folder in (*(root / "mlruns/ldm").iterdir(), *(root / "mlruns/ldm/models").iterdir()):
        with contextlib.suppress(OSError):
            folder.rmdir()  # which MLflow leaves
    check_collected(root)
    for number in STAYS:
        check_whole(root, number)


# kills


def removes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Each step that changes what is there: files, git's references, MLflow's rows."""
    if event == "subprocess.Popen":
        return "update-ref" in str(arguments)
    places = ("/.dvc/cache/", "/mlruns/", "/.ldm/store/")
    return event in ("os.remove", "os.rename", "os.rmdir", "shutil.rmtree") and any(
        place in str(arguments[0]) for place in places
    )


@pytest.mark.parametrize("seed", with_soak(2, 20))
def test_killed_at_any_moment_what_stays_is_whole_and_the_next_call_finishes(seed: int, root: Path, worktree: Path) -> None:
    moment = int(np.random.default_rng(seed).integers(1, 41))
    assert run_until_killed(lambda: collect_garbage(root, 1), removes, moment)[1]
    for number in STAYS:
        assert needed(root, number) <= objects(root)
    collect_garbage(root, 1)
    assert data_left(root) == NEEDED
    git(root, "worktree", "remove", "--force", str(worktree))
    check_collected(root)
    for number in STAYS:
        check_whole(root, number)
