"""Which commits stay, and what files hold there, in a real repository."""

import random
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ldm.base import clock
from ldm.base.errors import InputError
from ldm.versioning.branches import (
    commits_to_keep,
    contents_at,
    current_since,
    delete,
    find_checkouts,
    run_branches,
    stray_worktrees,
    texts_at,
)
from ldm.versioning.cache import named, named_now, names_objects
from ldm.versioning.git import commit as make_commit

RUNS = ("2026-01-09", "2026-01-10", "2026-01-10-2", "2026-01-10-10")  # oldest first


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def commit(root: Path, content: str) -> str:
    """A commit on no branch, whose dvc.lock holds that."""
    git(root, "checkout", "--quiet", "--detach")
    (root / "dvc.lock").write_text(content)
    git(root, "add", "dvc.lock")
    git(root, "commit", "--quiet", "--message", content)
    return git(root, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository, with DVC's folder."""
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc/config").touch()
    git(root, "init", "--quiet", "--initial-branch", "main")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "project")
    return root


def test_the_newest_run_of_a_day_is_that_with_the_highest_number(repository: Path) -> None:
    for name in (*RUNS[::-1], "mine", "2026-01-11-rc", "2026-1-1"):
        git(repository, "branch", f"runs/nightly/{name}")
    git(repository, "branch", "runs/collection")
    git(repository, "branch", "runs/rebuild/2026-01-11")
    git(repository, "checkout", "--quiet", "-b", "runs/nightly/2026-01-12")  # the user looks at it
    assert [branch.name for branch in run_branches(repository) if branch.slot == "nightly"] == [
        f"runs/nightly/{name}" for name in RUNS[::-1]
    ]
    assert {branch.slot for branch in run_branches(repository)} == {"nightly", "rebuild"}


def test_a_branch_that_has_moved_is_not_deleted(repository: Path) -> None:
    git(repository, "branch", "runs/nightly/2026-01-01")
    (branch,) = run_branches(repository)
    moved = commit(repository, "moved")
    git(repository, "branch", "--force", "runs/nightly/2026-01-01", moved)
    with pytest.raises(InputError, match="update-ref"):
        delete(repository, branch)
    (branch,) = run_branches(repository)
    assert branch.commit == moved
    delete(repository, branch)
    assert run_branches(repository) == []


def test_commits_that_anything_of_the_user_names_stay(repository: Path) -> None:
    git(repository, "branch", "topic", commit(repository, "a branch"))
    git(repository, "tag", "light", commit(repository, "a tag"))
    git(repository, "tag", "--annotate", "--message", "heavy", "heavy", commit(repository, "an annotated tag"))
    git(repository, "update-ref", "refs/exps/ab/cd/one", commit(repository, "an experiment of DVC"))
    git(repository, "branch", "runs/nightly/2026-01-01", commit(repository, "a run that goes"))
    git(repository, "branch", "runs/nightly/2026-01-02", commit(repository, "a run that stays"))
    git(repository, "update-ref", "refs/remotes/origin/main", commit(repository, "a branch elsewhere"))
    git(repository, "worktree", "add", "--quiet", "--detach", str(repository / "worktree"), commit(repository, "a worktree"))
    git(repository, "tag", "key", git(repository, "hash-object", "-w", "dvc.lock"))  # of a file
    for text in ("an older stash", "a stash"):
        (repository / "dvc.lock").write_text(text)
        git(repository, "stash")
    (repository / "sub").mkdir()
    (repository / "sub/dvc.lock").write_text("untracked in a stash")
    git(repository, "stash", "--include-untracked")
    git(repository, "checkout", "--quiet", commit(repository, "here"))
    going = [branch for branch in run_branches(repository) if branch.name.endswith("01")]
    texts = texts_at(repository, commits_to_keep(repository, going), names_objects)
    assert texts == {
        "a branch", "a tag", "an annotated tag", "an experiment of DVC", "a run that stays", "a worktree", "a stash", "here",
        "an older stash", "untracked in a stash",
    }  # fmt: skip


def test_a_new_repository_has_no_commits(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    assert commits_to_keep(tmp_path, ()) == set() and texts_at(tmp_path, (), names_objects) == set()
    assert find_checkouts(tmp_path) == [tmp_path] and stray_worktrees(tmp_path) == ([], [])


def test_a_project_may_lie_in_a_folder_of_the_repository(repository: Path) -> None:
    inner = repository / "sub/ün ter"
    (inner / ".dvc").mkdir(parents=True)
    (inner / ".dvc/config").touch()
    (inner / "dvc.lock").write_text("inner")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "inner")
    (repository / "dvc.lock").write_text("outer")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "outer")
    git(repository, "worktree", "add", "--quiet", "--detach", str(repository.parent / "other"), "main")
    other = repository.parent / "other/sub/ün ter"
    assert find_checkouts(inner) == [inner, other]
    assert texts_at(inner, commits_to_keep(inner, ()), names_objects) == {"inner"}
    with pytest.raises(InputError, match=r"a worktree of .*; run this in"):
        find_checkouts(other)


@pytest.mark.parametrize("form", ["md5: {}", "md5: {}.dir", "md5: '{}'", '{{"md5": "{}"}}', "{{md5: {}, path: a}}"])
def test_an_md5_is_found_however_it_is_written(form: str, repository: Path) -> None:
    md5, text = "0123456789abcdef" * 2, form.format("0123456789abcdef" * 2)
    assert named([f"outs:\n- {text}\n  size: 3\n"]) == {md5 + ".dir" * (".dir" in form)}
    (repository / "data/raw").mkdir(parents=True)
    (repository / "data/raw/mine.dvc").write_text(f"outs:\n- {text}\n")
    assert len(named_now([repository])) == 1


@pytest.mark.parametrize("seed", range(3))
def test_what_a_branch_named_lately_is_found_through_merges(seed: int, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `prepare` and ingest move runs/collection: on from itself, from a merge with main, or from main that has merged it."""
    rng, first, named_on, texts = random.Random(seed), datetime(2026, 1, 1, tzinfo=UTC), list[str](), dict[str, str]()

    def make(text: str, parents: list[str]) -> str:
        (repository / "data.dvc").write_text(text)
        made = make_commit(repository, text, parents, ["data.dvc"])
        texts[made] = text
        return made

    main = git(repository, "rev-parse", "HEAD")
    monkeypatch.setattr(clock, "now", lambda: first - timedelta(days=1))
    tip = make("collection", [main])
    for day in range(12):
        monkeypatch.setattr(clock, "now", lambda day=day: first + timedelta(days=day))
        how = rng.choice(["nothing", "on main", "ingest", "ingest after a merge", "main merges"])
        if how == "on main":
            main = make(f"main {day}", [main])
        elif how == "main merges":
            main = make(f"merged {day}", [main, tip])
            tip = make(f"collection {day}", [main])
        elif how != "nothing":
            tip = make(f"collection {day}", [main, tip] if "merge" in how else [tip])
        named_on.append(tip)
    git(repository, "branch", "runs/collection", tip)
    for day in range(12):
        found = current_since(repository, "runs/collection", first + timedelta(days=day, hours=1))
        assert found & set(named_on) == set(named_on[day:])
    assert contents_at(repository, [*named_on, "0" * 40], "data.dvc") == {texts[one] for one in named_on}
