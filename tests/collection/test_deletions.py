"""What the collection no longer has goes by itself, from everywhere; what it has, or had until lately, stays."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dvc.repo import Repo
from kills import run_until_killed
from purges import DATA, MINE, everything, in_split, noise, objects, register, run_night, write_collection
from tiny import TINY, clone, set_params, with_soak

from ldm.base import clock
from ldm.base.files import locked
from ldm.collection import deletions
from ldm.collection.deletions import purge_deleted
from ldm.collection.purge import TAG
from ldm.collection.retention import collect_garbage
from ldm.registry.versions import find
from ldm.versioning.cache import path_of
from ldm.versioning.git import git

NOW = datetime.now(UTC) + timedelta(days=8)  # what the fixture writes is more than a week old
IMAGES = {f"monday/{number:02d}.png": noise(number, 8, "PNG") for number in range(20)}
IMAGES |= {f"tuesday/{number:02d}.png": noise(100 + number, 8, "PNG") for number in range(10)}
GONE = {  # for ten days
    "monday/deleted.png": in_split("train", 16, "PNG"), "monday/tested.png": in_split("test", 8, "JPEG"),
    "monday/replaced.png": noise(50, 8, "PNG"), "tuesday/damaged.png": b"no image",
}  # fmt: skip
LATE = {"monday/late.png": noise(51, 8, "PNG")}  # gone for three days
STAYS = {"monday/twice.png": noise(52, 8, "PNG"), "monday/moved.png": noise(53, 8, "PNG")}  # elsewhere
SECOND = {
    "monday/replaced.png": noise(54, 8, "PNG"), "tuesday/copy.png": STAYS["monday/twice.png"],
    "tuesday/moved.png": STAYS["monday/moved.png"],
}  # fmt: skip


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `project`, whose checkout and `runs/collection` have had three states, and `remote`."""
    folder = tmp_path_factory.mktemp("history")
    root = clone(folder / "project")
    set_params(root, TINY | {"data": DATA})
    (root / ".dvc/config").write_text("[core]\nremote = backup\nanalytics = false\n['remote \"backup\"']\nurl = ../../remote\n")
    (root / "dvc.lock").write_text("schema: '2.0'")
    states = (IMAGES | GONE | LATE | STAYS, IMAGES | SECOND | LATE, IMAGES | SECOND)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        for number, (images, days) in enumerate(zip(states, (20, 10, 3), strict=True), start=1):
            write_collection(root, images)
            run_night(root)
            register(root, number)
            day = NOW - timedelta(days=days)
            for role in ("AUTHOR", "COMMITTER"):
                patch.setenv(f"GIT_{role}_DATE", day.isoformat())
            git(root, "add", "--force", f"{MINE}.dvc", "dvc.lock", "params.yaml", ".dvc/config")
            git(root, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", f"night {number}")
            git(root, "branch", f"runs/nightly/{day:%Y-%m-%d}")
    git(root, "branch", "runs/collection")
    return folder


@pytest.fixture
def folder(history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(shutil.copytree(history, tmp_path / "history", symlinks=True))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/project/mlflow.db")
    monkeypatch.chdir(folder / "project")
    monkeypatch.setattr(clock, "now", lambda: NOW)
    return folder


def left(folder: Path, images: dict[str, bytes]) -> set[str]:
    """The names of those whose bytes are in any file."""
    files = everything(folder).values()
    return {name for name, blob in images.items() if any(blob in content for content in files)}


def no_pass_over_objects(*_: Any) -> None:
    raise AssertionError("all objects are read")


@pytest.mark.parametrize(
    ("days", "gone", "stays"),
    [(7, GONE, LATE | STAYS), (0, GONE | LATE, STAYS), (30, {}, GONE | LATE | STAYS)],
    ids=["a week", "at once", "a month"],
)
def test_what_was_deleted_goes_from_everywhere_after_some_days(
    days: int, gone: dict[str, bytes], stays: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(folder)
    assert left(folder, gone | stays) == {*gone, *stays}
    outcome = purge_deleted(Path("."), days)
    assert outcome.left == {} and outcome.listings == frozenset()
    assert len(outcome.digests) == len(gone)
    assert left(folder, gone) == set() and left(folder, stays) == {*stays}
    assert {number for number, tag in ((one.version, one.tags.get(TAG)) for one in find({})) if tag} == (
        ({1, 2} if days == 0 else {1}) if gone else set()
    )
    after = everything(folder)
    assert after.items() <= before.items()
    with Repo(".") as repo:
        assert repo.status(["shard", "cache_latents", f"{MINE}.dvc"]) == {}
        for out in ("data/shards", "data/latents", MINE):
            shutil.rmtree(out)
        repo.checkout(["shard", "cache_latents", f"{MINE}.dvc"], force=True)
    assert {path.relative_to(MINE).as_posix() for path in Path(MINE).rglob("*.png")} == {*IMAGES, *SECOND}
    monkeypatch.setattr("ldm.collection.purge.Objects", no_pass_over_objects)  # there is nothing to do any more
    assert purge_deleted(Path("."), days) == deletions.Outcome()


def version_collection() -> None:
    with Repo(".") as repo:
        repo.add([MINE])


def commit_all(message: str) -> None:
    version_collection()
    git(Path("."), "add", "--force", f"{MINE}.dvc")
    git(Path("."), "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", message)


@pytest.mark.parametrize("where", ["a branch", "a tag", "a stash", "the branch of ingest, deleted"])
def test_what_was_never_merged_was_not_deleted(where: str, folder: Path) -> None:
    """Nobody deleted it: the collection that counts has just not seen it."""
    root, other = Path("."), {"wednesday/new.png": noise(70, 8, "PNG")}
    git(root, "branch", "main-now")
    git(root, "checkout", "--quiet", "-b", "other")
    write_collection(root, IMAGES | SECOND | other)
    if where == "a stash":
        version_collection()
        for number in range(2):  # the older one, too
            git(root, "stash", "--quiet")
            (root / "params.yaml").write_text((root / "params.yaml").read_text() + f"# {number}\n")
    else:
        commit_all("new")
    git(root, "checkout", "--quiet", "--force", "main-now")
    if where in ("a tag", "the branch of ingest, deleted"):
        git(root, "tag", "new", "other")
        git(root, "branch", "-D", "other")
    if where == "the branch of ingest, deleted":
        git(root, "branch", "--force", "runs/nightly/2026-01-01", "new")
        git(root, "tag", "-d", "new")
        git(root, "branch", "-D", "runs/collection")
    with Repo(".") as repo:
        repo.checkout([f"{MINE}.dvc"], force=True)
    assert purge_deleted(root, 0, share=1).purged is not None  # of GONE and LATE
    assert left(folder, GONE | LATE) == set() and left(folder, other) == {*other}


def test_most_of_the_collection_is_not_purged_unless_that_is_meant(folder: Path) -> None:
    """It may be that only the newest files were in the folder when it was versioned."""
    few = dict([*IMAGES.items()][:12])
    shutil.rmtree(MINE)
    write_collection(Path("."), few)
    commit_all("only these")
    git(Path("."), "branch", "--force", "runs/collection")
    run_night(Path("."))
    outcome = purge_deleted(Path("."), 0)
    assert outcome.purged is None and all(why.endswith("take the deletion back") for why in outcome.left.values())
    assert left(folder, IMAGES) == {*IMAGES}
    assert purge_deleted(Path("."), 0, share=1).left == {}
    assert left(folder, IMAGES) == {*few}


def test_until_then_a_deletion_can_be_taken_back_also_after_a_garbage_collection(folder: Path) -> None:
    """It comes with the listing of that day, which no branch names any more."""
    listing = git(Path("."), "show", f"HEAD~1:{MINE}.dvc")
    git(Path("."), "branch", "-D", f"runs/nightly/{NOW - timedelta(days=10):%Y-%m-%d}")
    collect_garbage(Path("."), keep=1)
    Path(f"{MINE}.dvc").write_text(f"{listing}\n")
    with Repo(".") as repo:
        repo.checkout([f"{MINE}.dvc"], force=True)
    assert Path(MINE, "monday/late.png").read_bytes() == LATE["monday/late.png"]
    git(Path("."), "checkout", "--", f"{MINE}.dvc")
    shutil.rmtree(folder / "remote")
    collect_garbage(Path("."), keep=1, days=0)
    assert left(folder, LATE) == {"monday/late.png"}  # the checkout's own file
    Path(MINE, "monday/late.png").unlink()
    assert left(folder, LATE) == set()


def test_what_a_merge_of_the_branches_needs_is_kept(folder: Path) -> None:
    """The user changes the collection without having merged what came, and a run merges both only after `ldm gc`."""
    git(Path("."), "checkout", "--quiet", "--detach", "HEAD~2")
    base = path_of(Path(".dvc/cache"), git(Path("."), "show", f"HEAD:{MINE}.dvc").partition("md5: ")[2].split()[0])
    Path(MINE, "monday/00.png").unlink()
    with Repo(".") as repo:
        repo.add([MINE])
    git(Path("."), "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--all", "--message", "without one")
    git(Path("."), "branch", "-D", f"runs/nightly/{NOW - timedelta(days=20):%Y-%m-%d}")
    collect_garbage(Path("."), keep=1, days=0)
    assert base.is_file()
    git(Path("."), "checkout", "--quiet", "runs/collection")
    collect_garbage(Path("."), keep=1, days=0)
    assert not base.is_file()


@pytest.mark.parametrize("seed", with_soak(1, 8))
def test_killed_at_any_moment_the_next_one_finishes(seed: int, folder: Path) -> None:
    random = np.random.default_rng(seed)

    def deletes(event: str, arguments: tuple[Any, ...]) -> bool:
        return event == "os.remove" and any(place in str(arguments[0]) for place in ("/files/md5/", "/.ldm/store"))

    assert run_until_killed(lambda: purge_deleted(Path("."), 7), deletes, int(random.integers(1, 12)))[1]
    run_until_killed(lambda: purge_deleted(Path("."), 7), deletes, int(random.integers(1, 12)))
    assert purge_deleted(Path("."), 7).left == {}
    assert left(folder, GONE) == set() and left(folder, LATE | STAYS) == {*LATE, *STAYS}


def test_what_a_remote_has_goes_once_it_answers(folder: Path) -> None:
    config = Path(".dvc/config").read_text()
    Path(".dvc/config").write_text(config.replace("../../remote", "http://127.0.0.1:9/remote"))
    outcome = purge_deleted(Path("."), 7)
    assert len(outcome.digests) == len(GONE) and "remote does not answer" in outcome.purged.notes[0]  # type: ignore[union-attr]
    for _ in range(2):
        assert outcome.left["the remote"].startswith("does not answer (")
        collect_garbage(Path("."), keep=1, listings=outcome.listings)
        outcome = purge_deleted(Path("."), 7)
        assert outcome.purged is None
    Path(".dvc/config").write_text(config)
    assert left(folder, GONE) == {*GONE}
    assert purge_deleted(Path("."), 7).left == {}
    assert left(folder, GONE) == set()


@contextlib.contextmanager
def held_by_the_checkout(root: Path) -> Iterator[None]:
    (root / MINE / "monday/back.png").write_bytes(GONE["monday/deleted.png"])
    yield
    (root / MINE / "monday/back.png").unlink()


@contextlib.contextmanager
def held_by_a_run(root: Path) -> Iterator[None]:
    worktree = root / ".ldm/worktrees/rebuild"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(worktree), "HEAD~2"], cwd=root, check=True)
    (root / ".ldm/slots").mkdir()
    with locked(root / ".ldm/slots/rebuild.lock"):
        yield


@contextlib.contextmanager
def held_by_a_stage(root: Path) -> Iterator[None]:
    stage = {"pid": os.getppid(), "cmd": "dvc repro"}
    record = root / ".dvc/tmp/rwlock"
    record.write_text(json.dumps({"read": {str(root / "data/latents"): [stage]}}))
    yield
    record.unlink()


@pytest.mark.parametrize("held", [held_by_the_checkout, held_by_a_run, held_by_a_stage])
def test_what_is_held_is_named_and_goes_the_next_time(held: Any, folder: Path) -> None:
    root = folder / "project"
    with held(root):
        outcome = purge_deleted(root, 7)
        assert "monday/deleted.png" in outcome.left and outcome.listings
        assert left(folder, GONE) >= {"monday/deleted.png"}
    collect_garbage(root, keep=1, listings=outcome.listings)
    assert purge_deleted(root, 7).left == {}
    assert left(folder, GONE) == set() and not (root / ".ldm/worktrees/rebuild").exists()


def test_a_cache_that_others_may_use_is_left(folder: Path) -> None:
    shutil.move(".dvc/cache", folder / "cache")
    with Repo(".") as repo, repo.config.edit("local") as local:
        local["cache"]["dir"] = str(folder / "cache")
    before = {path: path.read_bytes() for path in (folder / "cache").rglob("*") if path.is_file()}
    outcome = purge_deleted(Path("."), 7)
    assert outcome.purged is None and outcome.left.keys() >= {"monday/deleted.png"}
    assert {path: path.read_bytes() for path in (folder / "cache").rglob("*") if path.is_file()} == before


def test_a_worktree_in_which_no_run_is_at_work_goes_with_it(folder: Path) -> None:
    root = folder / "project"
    with held_by_a_run(root):
        pass
    assert purge_deleted(root, 7).left == {}
    assert not (root / ".ldm/worktrees/rebuild").exists() and left(folder, GONE) == set()


def test_without_scheduled_runs_the_branch_that_is_checked_out_counts(folder: Path) -> None:
    git(Path("."), "branch", "-D", "runs/collection")
    assert purge_deleted(Path("."), 7).left == {}
    assert left(folder, GONE) == set() and left(folder, LATE) == {*LATE}


def test_a_branch_that_no_run_works_on_does_not_count(folder: Path) -> None:
    """Its owner has deleted images there, and runs still take them."""
    git(Path("."), "branch", "--force", "runs/collection", "HEAD~2")
    before = {path: path.read_bytes() for path in objects(folder)}
    assert purge_deleted(Path("."), 7).purged is None
    assert {path: path.read_bytes() for path in objects(folder)} == before


def test_while_it_is_unknown_what_the_collection_had_nothing_goes(folder: Path) -> None:
    md5 = git(Path("."), "show", f"HEAD~1:{MINE}.dvc").partition("md5: ")[2].split()[0]
    Path(".dvc/cache/files/md5", md5[:2], md5[2:]).unlink()
    before = {path: path.read_bytes() for path in objects(folder)}
    outcome = purge_deleted(Path("."), 7)
    assert "missing or damaged, and lists the collection" in outcome.left["the collection"]
    assert {path: path.read_bytes() for path in objects(folder)} == before


def test_a_collection_that_dvc_does_not_version_is_left_alone(folder: Path) -> None:
    set_params(Path("."), {"data": {"path": "data/raw/source"}})
    assert purge_deleted(Path("."), 0) == deletions.Outcome()
    set_params(Path("."), {"data": {"path": MINE}})
    git(Path("."), "rm", "--quiet", "--cached", f"{MINE}.dvc")
    git(Path("."), "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", "another collection")
    git(Path("."), "branch", "--force", "runs/collection")
    before = {path: path.read_bytes() for path in objects(folder)}
    assert purge_deleted(Path("."), 0) == deletions.Outcome()
    assert {path: path.read_bytes() for path in objects(folder)} == before
