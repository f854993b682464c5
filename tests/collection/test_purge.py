"""Purge: after it, no file of cache, remote and store holds the image or its latents, and everything else is as it was."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from dvc.repo import Repo
from dvc_data.hashfile.db import HashFileDB
from dvc_objects.fs import MemoryFileSystem
from kills import run_until_killed
from PIL import Image
from purges import DATA, MINE, everything, in_split, noise, objects, register, run_night, write_collection
from tiny import TINY, clone, set_params, with_soak
from typer.testing import CliRunner

from ldm.base.errors import InputError
from ldm.base.files import locked
from ldm.cli import app
from ldm.collection.leftovers import unnamed_latents
from ldm.collection.purge import TAG, purge
from ldm.collection.traces import captions
from ldm.config import load_settings
from ldm.data.images import to_png
from ldm.data.shards import write_shards
from ldm.registry import registration
from ldm.registry.versions import find, kept, lookup
from ldm.stages import code
from ldm.versioning.git import git


@dataclass(frozen=True)
class Removed:
    """An image that the collection had for two nights: its file, its name, and what a shard stores of it."""

    name: str
    blob: bytes
    stored: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.blob).hexdigest()


@dataclass(frozen=True)
class History:
    """A folder with `project`, where both images are gone, and `remote`; `latents` are bytes of files that were made of each."""

    folder: Path
    train: Removed
    test: Removed
    latents: dict[str, set[bytes]]  # by the image's name


def latents_of(root: Path, image: Removed) -> set[bytes]:
    """Files of data/latents whose shard holds the image, by the bytes."""
    names = {path.stem for path in (root / "data/shards").glob("*.tar") if image.stored in path.read_bytes()}
    return {path.read_bytes() for path in (root / "data/latents").glob("*.safetensors") if path.stem in names}


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    folder = tmp_path_factory.mktemp("history")
    root = clone(folder / "project")
    set_params(root, TINY | {"data": DATA})
    (root / ".dvc/config").write_text("[core]\nremote = backup\nanalytics = false\n['remote \"backup\"']\nurl = ../../remote\n")
    scan = Image.open(io.BytesIO(blob := in_split("train", 16, "PNG"))).resize((8, 8), Image.Resampling.BOX)
    train = Removed("monday/000.png", blob, to_png(scan))  # in the first shard, with whose latents the one caption is kept
    blob = in_split("test", 8, "JPEG")
    test = Removed("monday/t.jpg", blob, blob)  # stored as it is
    images = {f"monday/{i:02d}.png": noise(i, 8, "PNG") for i in range(40)}
    images |= {f"tuesday/{i:02d}.png": noise(i, 8, "PNG") for i in range(40, 60)}
    images["tuesday/000.png"] = noise(99, 8, "PNG")  # the same name in another folder is another image
    gone = {train.name: train.blob, "monday/000 a copy.png": train.blob, test.name: test.blob}
    latents: dict[str, set[bytes]] = {train.name: set(), test.name: set()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        (root / "dvc.lock").write_text("schema: '2.0'")  # of version 1 it is unknown what it saw
        register(root, 1)
        for number, (tops, removed, autoencoder) in enumerate(
            [("monday", False, "a"), ("monday tuesday", False, "b"), ("monday tuesday", True, "b")], start=2
        ):
            kept = {name: content for name, content in images.items() if name.split("/")[0] in tops}
            write_collection(root, kept if removed else kept | gone)
            run_night(root, autoencoder)
            register(root, number)
            for image in (train, test):
                latents[image.name] |= set() if removed else latents_of(root, image)
    assert len(latents[train.name]) == 2 and not latents[test.name]
    for path in unnamed_latents(root, [root]):  # as `ldm gc` would
        path.unlink()
    return History(folder, train, test, latents)


@pytest.fixture
def folder(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the history, with leftovers of the image outside DVC, in whose project we are."""
    folder = Path(shutil.copytree(history.folder, tmp_path / "history", symlinks=True))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/project/mlflow.db")
    monkeypatch.chdir(folder / "project")
    (folder / "project/.ldm/shards").mkdir()
    (folder / "project/data/film.zip.partial").write_bytes(b"of the user's browser")
    (folder / "project/data/old.replaced").symlink_to(history.folder)  # nor is a link a leftover of ours
    for path in objects(folder):
        content = path.read_bytes()
        if tarfile.is_tarfile(path):
            (folder / "project/.ldm/shards" / hashlib.sha256(content).hexdigest()).write_bytes(content)
    for content in history.latents[history.train.name]:
        (folder / f"project/.ldm/store/latents/key-{hashlib.sha256(content).hexdigest()}.safetensors").write_bytes(content)
    return folder


def traces(files: dict[str, bytes], image: Removed, latents: set[bytes]) -> set[str]:
    """The files that hold the image, as it was or as a shard stores it, or are its latents."""
    return {name for name, blob in files.items() if image.blob in blob or image.stored in blob or blob in latents}


def check_workspace() -> None:
    """What the current commit names is all there, and unchanged."""
    outs = ["data/shards", "data/latents", MINE]
    before = {out: {path.name: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()} for out in outs}
    with Repo(".") as repo:
        assert repo.status(["shard", "cache_latents", f"{MINE}.dvc"]) == {}
        for out in outs:
            shutil.rmtree(out)
        repo.checkout(["shard", "cache_latents", f"{MINE}.dvc"], force=True)
        assert repo.status(["shard", "cache_latents", f"{MINE}.dvc"]) == {}
    assert {out: {path.name: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()} for out in outs} == before


def tags() -> dict[int, str | None]:
    return {found.version: found.tags.get(TAG) for found in find({})}


def test_by_its_name_in_all_its_copies_and_nothing_else(history: History, folder: Path) -> None:
    image, before = history.train, everything(folder)
    expected = traces(before, image, history.latents[image.name])
    kinds = ("cache/", "remote/", ".ldm/shards/", ".ldm/store/")
    assert all(any(kind in name for name in expected) for kind in kinds) and len(expected) >= 10

    dry = CliRunner().invoke(app, ["data", "purge", image.name, "--dry-run"])
    assert dry.exit_code == 0 and "dry run: nothing was deleted" in dry.output
    assert everything(folder) == before and not any(tags().values())

    done = CliRunner().invoke(app, ["data", "purge", image.name])
    assert done.exit_code == 0, done.exception
    assert done.output.splitlines()[0] == f"monday/000 a copy.png, monday/000.png (sha256 {image.sha256[:16]}…)"
    assert done.output.splitlines()[:-1] == dry.output.splitlines()[:-1]
    rows = [line.split(maxsplit=2) for line in done.output.splitlines() if line.strip()[:1].isdigit()]
    assert rows == [["3", "train", "trained on"], ["2", "train", "trained on"], ["1", "unknown"]]
    for place in ("cache", "remote"):
        found = [path for path in expected if ("remote/" in path) == (place == "remote") and ".ldm" not in path]
        assert sum(int(line.split()[2]) for line in done.output.splitlines() if line.startswith(f"{place} ")) == len(found)

    after = everything(folder)
    assert (folder / "project/data/old.replaced").is_symlink() and any(history.folder.iterdir())
    assert not traces(after, image, history.latents[image.name])
    assert before.keys() - after.keys() == expected
    assert all(before[name] == content for name, content in after.items())
    assert tags() == {4: None, 3: image.sha256[:16], 2: image.sha256[:16], 1: None}
    check_workspace()
    with pytest.raises(InputError, match=r"monday/000\.png: nothing, or nothing left, of it in DVC's cache or remote"):
        purge(Path("."), image.name)


def test_by_its_hash_and_models_that_were_only_evaluated_on_it(history: History, folder: Path) -> None:
    before, image = everything(folder), history.test
    purge(Path("."), history.train.sha256)
    between = everything(folder)
    assert before.keys() - between.keys() == traces(before, history.train, history.latents[history.train.name])
    purged = purge(Path("."), image.sha256)
    assert purged.names == (image.name,) and purged.digests == (image.sha256[:16],)
    assert purged.versions.to_dict("records") == [
        {"version": "3", "aliases": "", "splits": "test", "seen": "only evaluated on"},
        {"version": "2", "aliases": "", "splits": "test", "seen": "only evaluated on"},
        {"version": "1", "aliases": "", "splits": "", "seen": "unknown"},
    ]
    after = everything(folder)
    assert between.keys() - after.keys() == traces(between, image, set())
    assert not traces(after, image, set())
    both = ",".join(sorted([history.train.sha256[:16], image.sha256[:16]]))
    assert tags() == {4: None, 3: both, 2: both, 1: None}
    check_workspace()


@pytest.mark.parametrize("key", ["autoencoder.pretrained", "train_unet.init"])
def test_a_model_that_started_from_one_that_saw_it_is_listed(key: str, history: History, folder: Path) -> None:
    """Version 4 was trained without the image, version 5 after it: through the weights of 3, both know it."""
    registration.register(change_model(folder / "project"))
    for version in find({}):
        if version.version > 3:
            assert version.folder
            params, (section, name) = version.folder / "lineage/params.yaml", key.split(".")
            values = yaml.safe_load(params.read_text())
            values[section][name] = f"models:/ldm/{version.version - 1}" + "@0123456789ab" * (version.version == 4)
            params.write_text(yaml.safe_dump(values))
    purged = purge(Path("."), history.train.name)
    assert list(zip(purged.versions.version, purged.versions.seen, strict=True)) == [
        ("5", "started from models:/ldm/4"),
        ("4", "started from models:/ldm/3"),
        ("3", "trained on"),
        ("2", "trained on"),
        ("1", "unknown"),
    ]
    assert {number for number, digests in tags().items() if digests} == {2, 3, 4, 5}


def change_model(root: Path) -> Path:
    """Another model of the same night."""
    path = root / "models/ldm/model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "number": 5}))
    return root


def test_from_a_remote_when_nothing_is_here(history: History, folder: Path) -> None:
    """A fresh clone: the cache is empty, or has only what is current."""
    image = history.train
    shutil.rmtree(folder / "project/.dvc/cache")
    shutil.rmtree(folder / "project/.ldm/shards")
    before = everything(folder)
    with pytest.raises(InputError, match=r"still in data/raw/mine/monday/00\.png"):
        purge(Path("."), hashlib.sha256(noise(0, 8, "PNG")).hexdigest())
    purged = purge(Path("."), image.name)
    assert set(purged.copies.place) == {"remote", ".ldm"}
    assert list(purged.versions.seen) == ["trained on", "trained on", "unknown"]
    after = everything(folder)
    assert before.keys() - after.keys() == traces(before, image, history.latents[image.name])
    with contextlib.chdir(folder / "project"), Repo(".") as repo:
        repo.fetch()
    check_workspace()


def test_from_a_remote_that_is_no_folder(history: History, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through fsspec, as object storage is."""
    store = HashFileDB(MemoryFileSystem(global_store=False), "/bucket/files/md5", hash_name="md5")
    for path in (folder / "remote/files/md5").rglob("*"):
        if path.is_file():
            store.add_bytes(path.parent.name + path.name, path.read_bytes())
    before = {md5: store.fs.cat_file(store.oid_to_path(md5)) for md5 in store.all()}
    monkeypatch.setattr("dvc.data_cloud.DataCloud.get_remote_odb", lambda cloud, name: store)
    shutil.rmtree(folder / "project/.dvc/cache")
    purge(Path("."), history.train.name)
    after = {md5: store.fs.cat_file(store.oid_to_path(md5)) for md5 in store.all()}
    assert before.keys() - after.keys() == traces(before, history.train, history.latents[history.train.name])


def test_without_a_default_remote_others_are_named(history: History, folder: Path) -> None:
    config = Path(".dvc/config")
    config.write_text(config.read_text().replace("remote = backup\n", ""))
    before = everything(folder)
    purged = purge(Path("."), history.train.name)
    assert purged.notes == ("no default remote: not looked at are backup; name one with --remote",)
    local = {name for name in before if not name.startswith("remote/")}
    assert traces(everything(folder), history.train, set()) == traces(before, history.train, set()) - local
    purge(Path("."), history.train.name, remote="backup")
    assert not traces(everything(folder), history.train, history.latents[history.train.name])
    with pytest.raises(InputError, match="elsewhere"):
        purge(Path("."), history.train.name, remote="elsewhere")


def test_an_image_that_comes_back_is_pushed_again(history: History, folder: Path) -> None:
    """DVC remembers what a remote has; it must not remember what was purged."""
    md5 = hashlib.md5(history.train.blob).hexdigest()
    pushed = folder / "remote/files/md5" / md5[:2] / md5[2:]
    for name in ("again.png", "and again.png"):
        Path(MINE, name).write_bytes(history.train.blob)
        with Repo(".") as repo:
            repo.add([MINE])
            repo.push()
            assert pushed.read_bytes() == history.train.blob
            Path(MINE, name).unlink()
            repo.add([MINE])
        purge(Path("."), history.train.sha256)
        assert not pushed.exists()


# refusals


def still_there(image: Removed) -> None:
    pass


def deleted(image: Removed) -> None:
    Path(MINE, image.name).unlink()


def deleted_and_versioned(image: Removed) -> None:
    deleted(image)
    with Repo(".") as repo:
        repo.add([MINE])


def deleted_and_sharded(image: Removed) -> None:
    deleted_and_versioned(image)
    table = pd.read_csv(Path(MINE, "metadata.csv"), dtype=str)
    table[table.file_name != image.name].to_csv(Path(MINE, "metadata.csv"), index=False)
    data = load_settings(Path(".")).data.model_dump(exclude={"path", "source"})
    write_shards(Path(MINE), Path("data/shards"), **data)
    with Repo(".") as repo:
        repo.add([MINE])
        repo.commit("shard", force=True)


@pytest.mark.parametrize("by", ["name", "sha256"])
@pytest.mark.parametrize(
    ("state", "says"),
    [
        (still_there, "monday/00.png"),
        (deleted, "still in data/raw/mine/monday/00.png"),
        (deleted_and_versioned, "still in data/shards/train-monday-0000"),
        (deleted_and_sharded, "still in data/latents/train-monday-0000"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_part_of_the_current_state_is_refused(state: Any, says: str, by: str, folder: Path) -> None:
    blob = noise(0, 8, "PNG")
    image = Removed("monday/00.png", blob, blob)
    state(image)
    before = everything(folder)
    with pytest.raises(InputError, match=f"{says}.*; delete it from data/raw/mine .*, run the pipeline .*, then purge"):
        purge(Path("."), getattr(image, by))
    assert everything(folder) == before and not any(tags().values())


def test_nothing_is_deleted_while_a_stage_runs(history: History, folder: Path) -> None:
    """It might be about to link a file of the store."""
    stage = {"pid": os.getppid(), "cmd": "dvc repro"}
    Path(".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(folder / "project/data/latents"): stage}}))
    before = everything(folder)
    with pytest.raises(InputError, match=r"a stage works here.*dvc repro; try again when it has ended"):
        purge(Path("."), history.train.name)
    assert everything(folder) == before
    assert len(purge(Path("."), history.train.name, dry_run=True).copies)


@pytest.mark.parametrize(
    ("place", "busy", "says"),
    [
        (".ldm/worktrees/nightly", True, "a run of nightly is at work; purge when it has ended"),
        ("../mine", False, r"take it out there, or `git worktree remove --force .*/mine`"),
    ],
    ids=["of a run", "of the user"],
)
def test_what_a_worktree_holds_is_refused(place: str, busy: bool, says: str, history: History, folder: Path) -> None:
    worktree = add_worktree(folder / "project", place, version=3)
    before, slot = everything(folder), folder / "project/.ldm/slots/nightly.lock"
    slot.parent.mkdir()
    refused = pytest.raises(InputError, match=f"still in what {worktree.resolve()} names; {says}")
    with locked(slot) if busy else contextlib.nullcontext(), refused:
        purge(Path("."), history.train.name)
    assert before.items() <= everything(folder).items()


@pytest.mark.parametrize("holds", ["dvc.lock", "shard", "latents", "original"])
def test_a_worktree_that_holds_it_goes_while_no_run_is_at_work(holds: str, history: History, folder: Path) -> None:
    """A schedule that has not run since, or whose last run failed. What it shares with the checkout stays."""
    image, root, before = history.train, folder / "project", everything(folder)
    worktree = add_worktree(root, ".ldm/worktrees/nightly", version=3 if holds == "dvc.lock" else 4)
    (root / ".ldm/work").mkdir()
    (root / ".ldm/work/state").write_text("a training")
    (worktree / ".ldm").mkdir()
    (worktree / ".ldm/work").symlink_to(root / ".ldm/work")
    found = {path: path.read_bytes() for path in objects(folder)}
    shard = next(path for path, content in found.items() if image.stored in content and tarfile.is_tarfile(path))
    (worktree / "data/shards").mkdir(parents=True)
    (worktree / "data/latents").mkdir()
    if holds == "shard":
        os.link(shard, worktree / "data/shards/train-monday-00000.tar")
    if holds == "latents":
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        (worktree / "data/latents/manifest.json").write_text(json.dumps({"files": [{"sha256": "0", "shard_sha256": digest}]}))
    if holds == "original":
        (worktree / MINE).mkdir(parents=True)
        (worktree / MINE / "renamed.png").write_bytes(image.blob)
    assert purge(root, image.name, dry_run=True).notes[0].startswith(f"{worktree}: held it") and worktree.exists()
    purge(root, image.name)
    assert not worktree.exists() and "nightly" not in git(root, "worktree", "list")
    after = everything(folder)
    assert after["project/.ldm/work/state"] == b"a training"
    assert before.keys() - after.keys() == traces(before, image, history.latents[image.name])


def test_latents_that_a_worktree_names_stay(history: History, folder: Path) -> None:
    """All checkouts share their store."""
    root = folder / "project"
    worktree, store = add_worktree(root, ".ldm/worktrees/nightly", version=4), root / ".ldm/store/latents"
    (store / "key-other.safetensors").write_bytes(b"of an image that stays")
    (worktree / "data/latents").mkdir(parents=True)
    (worktree / "data/latents/manifest.json").write_text(json.dumps({"files": [{"sha256": "other", "shard_sha256": ""}]}))
    stage = {"pid": os.getppid(), "cmd": "dvc repro"}
    (worktree / ".dvc/tmp").mkdir(exist_ok=True)
    (worktree / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {str(worktree / "data/latents"): stage}}))
    with pytest.raises(InputError, match="a stage works here"):
        purge(root, history.train.name)
    (worktree / ".dvc/tmp/rwlock").unlink()
    purge(root, history.train.name)
    current = json.loads((root / "data/latents/manifest.json").read_text())["files"]
    assert {path.stem.rpartition("-")[2] for path in store.iterdir()} == {"other", *(file["sha256"] for file in current)}


def test_what_scheduled_runs_would_take_is_refused(history: History, folder: Path) -> None:
    """The deletion was not committed: the next scheduled run would look for the image."""
    pointer = f"{MINE}.dvc"
    now = Path(pointer).read_text()
    (Path(MINE) / history.train.name).write_bytes(history.train.blob)
    with Repo(".") as repo:
        repo.add([MINE])
    git(Path("."), "add", "--force", pointer)
    git(Path("."), "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "with it")
    git(Path("."), "branch", "runs/collection")
    (Path(MINE) / history.train.name).unlink()
    Path(pointer).write_text(now)
    before = everything(folder)
    with pytest.raises(InputError, match="still in the collection of scheduled runs; commit its deletion, and run a deployment"):
        purge(Path("."), history.train.name)
    assert everything(folder) == before


def add_worktree(root: Path, place: str, version: int) -> Path:
    """A worktree with the dvc.lock of a version: 3 is of a run with the images, 4 of one without."""
    worktree = root / place
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(worktree)], cwd=root, check=True)
    lock = kept(lookup(f"models:/ldm/{version}"), "dvc.lock")
    assert lock
    (worktree / "dvc.lock").write_text(lock)
    return worktree


def test_what_was_never_there_is_said(folder: Path) -> None:
    for image in ("monday/no such.png", "0" * 64):
        with pytest.raises(InputError, match=f"{image}: nothing, or nothing left, of it in DVC's cache or remote"):
            purge(Path("."), image)


def test_what_no_shard_held_is_purged_by_its_hash(folder: Path) -> None:
    """A damaged image, which the stage quarantined."""
    (Path(MINE) / "monday/bad.png").write_bytes(b"no image")
    with Repo(".") as repo:
        repo.add([MINE])
        repo.push()
        (Path(MINE) / "monday/bad.png").unlink()
        repo.add([MINE])
    digest = hashlib.sha256(b"no image").hexdigest()
    with pytest.raises(InputError, match=f"in no shard; files of that name have sha256 {digest}: purge by the one"):
        purge(Path("."), "monday/bad.png")
    before = everything(folder)
    purge(Path("."), digest)
    after = everything(folder)
    assert b"no image" not in after.values()
    assert {before[name] for name in before.keys() - after.keys() if "/.ldm/" not in name} == {b"no image"}


def test_a_replaced_file_of_the_name_is_mentioned(history: History, folder: Path) -> None:
    (Path(MINE) / history.train.name).write_bytes(b"no image")
    with Repo(".") as repo:
        repo.add([MINE])
        (Path(MINE) / history.train.name).unlink()
        repo.add([MINE])
    purged = purge(Path("."), history.train.name)
    digest = hashlib.sha256(b"no image").hexdigest()
    assert purged.notes == (f"not purged: files of that name that no shard holds, with sha256 {digest}",)


def test_an_original_inside_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a collection of WebDataset tars: the old tar goes as a whole."""
    root = clone(tmp_path / "history/project")
    set_params(root, TINY | {"data": DATA})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.chdir(root)
    blob = in_split("train", 16, "PNG")
    for images in (
        {f"{i:02d}": noise(i, 16, "PNG") for i in range(30)} | {"x": blob},
        {f"{i:02d}": noise(i, 16, "PNG") for i in range(30)},
    ):
        Path(MINE, "deep").mkdir(parents=True, exist_ok=True)
        with tarfile.open(Path(MINE, "deep/a.tar"), "w") as tar:
            for key, content in images.items():
                for name, part in ((f"{key}.png", content), (f"{key}.txt", b"noise")):
                    member = tarfile.TarInfo(name)
                    member.size = len(part)
                    tar.addfile(member, io.BytesIO(part))
        write_shards(root / MINE, root / "data/shards", **load_settings(root).data.model_dump(exclude={"path", "source"}))
        code.run(root)
        with Repo(".") as repo:
            repo.add([MINE])
            repo.commit("shard", force=True)
    before = everything(tmp_path / "history")
    purged = purge(root, "deep/a.tar/x.png")
    after = everything(tmp_path / "history")
    assert sorted(purged.copies.kind) == ["image", "shard"]
    assert len(before) - len(after) == 2 and not any(blob in content for content in after.values())


# kills


def deletes(event: str, arguments: tuple[Any, ...]) -> bool:
    return event == "os.remove" and any(place in str(arguments[0]) for place in ("/files/md5/", "/.ldm/"))


def killed_at(image: str, moment: int) -> bool:
    """Purge, killed before a deletion; whether it came that far."""
    return run_until_killed(lambda: purge(Path("."), image), deletes, moment)[1]


@pytest.mark.parametrize("seed", with_soak(2, 12))
def test_killed_and_purged_again_by_the_same_name(seed: int, history: History, folder: Path) -> None:
    image, before = history.train, everything(folder)
    expected = traces(before, image, history.latents[image.name])
    random = np.random.default_rng(seed)
    moment = int(random.integers(1, len(expected)))
    assert killed_at(image.name, moment)
    assert len(before) - len(everything(folder)) == moment - 1
    killed_at(image.name, int(random.integers(1, len(expected) - moment + 2)))
    purge(Path("."), image.name)
    after = everything(folder)
    assert before.keys() - after.keys() == expected and all(before[name] == content for name, content in after.items())
    assert tags() == {4: None, 3: image.sha256[:16], 2: image.sha256[:16], 1: None}
    check_workspace()


def test_captions_are_files_beside_an_image_and_not_what_is_called_like_one_elsewhere() -> None:
    names = ("config.png", "config.txt", "config.jpg", "a/config.png", "a/config.txt", "b/config.txt", "other.txt")
    collection, model = {name: f"md5 of {name}" for name in names}, {"config.json": "json", "weights": "weights"}
    objects: Any = SimpleNamespace(folders=[collection, model], places=dict.fromkeys([*collection.values(), *model.values()]))
    assert captions(objects, {"config.png"}) == {"md5 of config.txt", "md5 of a/config.txt"}
    assert captions(objects, {"a/config.png"}) == {"md5 of a/config.txt"}
