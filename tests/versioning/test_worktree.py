"""The worktrees of scheduled runs: what is in them, whatever checkout and branch runs/collection have seen of each other."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from inboxes import blob, drop
from tiny import REPOSITORY, set_params

from ldm.base.errors import InputError
from ldm.collection.ingest import Ingested, ingest
from ldm.versioning.git import COLLECTION, commit_of, git, is_ancestor, newest_run
from ldm.versioning.worktree import WORKTREES, prepare, publish_collection, publish_run

MINE, POINTER = "data/raw/mine", "data/raw/mine.dvc"


def dvc(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "--quiet"], cwd=root, check=True)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose collection has the files a and b, committed on its branch main."""
    root = tmp_path_factory.mktemp("worktree") / "project"
    (root / MINE).mkdir(parents=True)
    git(root, "init", "--quiet", "--initial-branch=main")
    dvc(root, "init")
    for name in "ab":
        (root / MINE / name).write_text(name)
    shutil.copy(REPOSITORY / "params.yaml", root)
    set_params(root, {"data": {"path": MINE}})
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / ".gitignore").write_text("/.ldm/\n")
    add(root, "start")
    return root


@pytest.fixture
def root(collected: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(collected, tmp_path / "project", symlinks=True))


def add(root: Path, message: str) -> None:
    dvc(root, "add", MINE)
    git(root, "add", "-A")
    git(root, "commit", "--quiet", "-m", message)


def ingested(folder: Path, name: str) -> None:
    """What ingest does in a worktree."""
    (folder / MINE / name).write_text(name)
    dvc(folder, "add", "--no-relink", MINE)
    publish_collection(folder, POINTER, f"new: {name}")


def test_it_is_what_a_clone_would_be_over_the_checkouts_cache_and_work(root: Path) -> None:
    (root / "params.yaml").write_text("not committed")
    (root / MINE / "c").write_text("not versioned")
    folder = prepare(root, "nightly", "main")
    assert folder == root / WORKTREES / "nightly" and files(folder / MINE) == {"a", "b"}
    assert yaml.safe_load((folder / "params.yaml").read_text())["seed"] == 0
    assert (folder / ".ldm/work").resolve() == root / ".ldm/work"
    (folder / MINE / "x").write_text("x")
    dvc(folder, "add", MINE)
    assert not (folder / ".dvc/cache").exists()
    assert git(root, "status", "--porcelain") == "M params.yaml" and files(root / MINE) == {"a", "b", "c"}


def test_what_a_run_left_there_is_put_right(root: Path) -> None:
    """Also after a git that was killed, and where the folder is no worktree any more."""
    folder = prepare(root, "nightly", "main")
    (folder / "params.yaml").write_text("half")
    (folder / MINE / "a").unlink()
    (folder / "untracked").touch()
    git_folder = Path(git(folder, "rev-parse", "--absolute-git-dir"))
    (git_folder / "index.lock").touch()
    assert prepare(root, "nightly", "main") == folder
    assert (
        files(folder / MINE) == {"a", "b"} and not (folder / "untracked").exists() and git(folder, "status", "--porcelain") == ""
    )
    shutil.rmtree(git_folder)
    assert files(prepare(root, "nightly", "main") / MINE) == {"a", "b"}


def delete_a(root: Path) -> None:
    (root / MINE / "a").unlink()
    add(root, "without a")


def amend(root: Path) -> None:
    prepare(root, "nightly", "main")
    git(root, "commit", "--quiet", "--amend", "-m", "in other words")


def merge(root: Path) -> None:
    git(root, "merge", "--quiet", "--no-edit", COLLECTION)
    dvc(root, "checkout")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((), {"a", "b", "new"}),
        ((delete_a,), {"b", "new"}),  # without having seen what came
        ((merge, delete_a), {"b", "new"}),
        ((merge, delete_a, lambda root: ingested(prepare(root, "nightly", "main"), "newer")), {"b", "new", "newer"}),
        ((lambda root: git(root, "commit", "--quiet", "--allow-empty", "-m", "code"),), {"a", "b", "new"}),
        ((merge, delete_a, amend), {"b", "new"}),
    ],
)  # fmt: skip
def test_the_collection_has_what_came_and_lacks_what_was_deleted(
    steps: tuple[Callable[[Path], object], ...], expected: set[str], root: Path
) -> None:
    ingested(prepare(root, "nightly", "main"), "new")
    for step in steps:
        step(root)
    for slot in ("nightly", "rebuild"):
        folder = prepare(root, slot, "main")
        assert files(folder / MINE) == expected
        assert is_ancestor(folder, str(commit_of(root, "main")), "HEAD")  # its code and settings
        assert git(folder, "status", "--porcelain") == ""
        assert git(root, "rev-parse", f"{COLLECTION}:{POINTER}") == git(folder, "rev-parse", f"HEAD:{POINTER}")
    assert git(root, "status", "--porcelain") == ""


@pytest.mark.parametrize(
    "undo", [("reset", "--quiet", "--hard", "HEAD~1"), ("commit", "--quiet", "--amend", "--allow-empty", "-am", "good")]
)
def test_code_is_the_branchs_also_after_a_commit_was_taken_back(undo: tuple[str, ...], root: Path) -> None:
    """The branch runs/collection still descends from it."""
    (root / "code.py").write_text("good")
    add(root, "good")
    (root / "code.py").write_text("bad")
    add(root, "bad")
    ingested(prepare(root, "nightly", "main"), "new")
    (root / "code.py").write_text("good")
    git(root, *undo)
    for _ in range(2):
        folder = prepare(root, "nightly", "main")
        assert (folder / "code.py").read_text() == "good" and files(folder / MINE) == {"a", "b", "new"}
        git(root, "commit", "--quiet", "--allow-empty", "-m", "next")


def test_a_collection_that_only_ingest_has_made_is_in_every_worktree(root: Path) -> None:
    """Also in a new one, after something else was committed on the branch."""
    git(root, "rm", "--quiet", POINTER)
    git(root, "commit", "--quiet", "-m", "no collection yet")
    folder = prepare(root, "nightly", "main")
    (folder / MINE).mkdir(parents=True)
    ingested(folder, "new")
    git(root, "commit", "--quiet", "--allow-empty", "-m", "code")
    assert files(prepare(root, "rebuild", "main") / MINE) == {"new"}


def test_two_runs_that_ingest_at_once_both_have_what_came(root: Path) -> None:
    one, other = (prepare(root, slot, "main") for slot in ("nightly", "rebuild"))
    ingested(one, "new")
    ingested(other, "newer")
    assert files(other / MINE) == {"a", "b", "new", "newer"}
    assert files(prepare(root, "on-demand", "main") / MINE) == {"a", "b", "new", "newer"}


def test_locks_of_programs_that_were_killed_are_removed(root: Path) -> None:
    """Of DVC, whose process number may be another process's by now; of git, also where it moves branches."""
    folder = prepare(root, "nightly", "main")
    busy = {"write": {str(folder / MINE): {"pid": os.getpid(), "cmd": "dvc repro"}}}
    (folder / ".dvc/tmp/rwlock").write_text(json.dumps(busy))
    (lock := root / ".git/refs/heads/runs/collection.lock").parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.utime(lock, (0, 0))
    ingested(prepare(root, "nightly", "main"), "new")
    assert not lock.exists()


def test_without_ingest_its_branch_has_what_the_last_run_took(root: Path) -> None:
    for change in (lambda root: None, delete_a):
        change(root)
        assert commit_of(root, COLLECTION) != (main := commit_of(root, "main"))
        prepare(root, "nightly", "main")
        assert git(root, "diff", "--name-only", COLLECTION, str(main)) == ""


def test_a_file_that_both_have_changed_is_refused_by_name(root: Path) -> None:
    folder = prepare(root, "nightly", "main")
    ingested(folder, "a")  # whose content is the same
    (folder / MINE / "a").write_text("by ingest")
    dvc(folder, "add", MINE)
    publish_collection(folder, POINTER, "changed")
    (root / MINE / "a").write_text("by hand")
    add(root, "changed, too")
    with pytest.raises(InputError, match=rf"{POINTER}.*git merge {COLLECTION}"):
        prepare(root, "nightly", "main")


def test_a_finished_run_is_a_branch_of_its_own_and_the_next_one_starts_with_its_results(root: Path) -> None:
    for number, name in enumerate(("runs/nightly/2026-11-26", "runs/nightly/2026-11-26-2")):
        folder = prepare(root, "nightly", "main")
        assert (folder / "dvc.lock").exists() == bool(number)
        (folder / "dvc.lock").write_text(f"schema: '2.0'\n# {number}\n")
        assert publish_run(folder, "nightly", "2026-11-26", "a run") == name
        assert newest_run(root, "nightly") == name and git(root, "show", f"{name}:dvc.lock").endswith(str(number))
    assert newest_run(root, "rebuild") is None


@pytest.fixture
def uncaptioned(root: Path) -> Path:
    """The repository, whose collection is empty and takes images without captions."""
    params = (root / "params.yaml").read_text().replace("path: data/raw/source", f"path: {MINE}")
    (root / "params.yaml").write_text(params.replace("captions: auto", "captions: none"))
    for name in "ab":
        (root / MINE / name).unlink()
    add(root, "settings")
    return root


def take(folder: Path, inbox: Path, seed: int, versioned: Callable[[str], object]) -> Ingested:
    inbox.mkdir(exist_ok=True)
    drop(inbox / f"{seed}.png", blob(seed))
    return ingest(folder, inbox, versioned=versioned)


def test_an_ingest_that_dies_before_its_commit_loses_nothing(uncaptioned: Path, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    folder = prepare(uncaptioned, "nightly", "main")

    def die(pointer: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(folder, inbox, 0, die)
    assert (inbox / "0.png").is_file()
    folder = prepare(uncaptioned, "nightly", "main")  # which undoes the batch
    done = ingest(folder, inbox, versioned=lambda pointer: publish_collection(folder, pointer, "new"))
    assert done.moved == ("0.png",) and not (inbox / "0.png").exists()
    kept = [f"{MINE}/{name}" for name in files(prepare(uncaptioned, "rebuild", "main") / MINE) if name.endswith("0.png")]
    assert kept == [f"{done.batch}/0.png"]


def test_what_is_ingested_by_hand_and_by_two_runs_on_one_day_is_all_there(uncaptioned: Path, tmp_path: Path) -> None:
    folders = [prepare(uncaptioned, slot, "main") for slot in ("nightly", "rebuild")]
    for seed, folder in enumerate(folders):
        take(folder, tmp_path / str(seed), seed, lambda pointer, folder=folder: publish_collection(folder, pointer, "new"))
    take(uncaptioned, tmp_path / "by hand", 2, lambda pointer: git(uncaptioned, "add", pointer))
    git(uncaptioned, "commit", "--quiet", "-m", "by hand")
    there = prepare(uncaptioned, "nightly", "main") / MINE
    assert {path.name: path.read_bytes() for path in there.rglob("*.png")} == {f"{seed}.png": blob(seed) for seed in range(3)}
    assert len({path.parent for path in there.rglob("*.png")}) == 3
