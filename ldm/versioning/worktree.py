"""The worktrees in which scheduled runs work: one for each slot, at a stable path, over the checkout's DVC cache.

A stable path, because DVC's database of hashes is keyed by path: a new one would read every image again every night.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ldm.base.errors import InputError
from ldm.base.files import locked
from ldm.base.paths import INGEST_LOCK, LATENT_STORE, SHARD_CACHE, TRACKING, WORK
from ldm.versioning.branches import WORKTREES
from ldm.versioning.git import COLLECTION, commit, commit_of, git, is_ancestor, newest_run
from ldm.versioning.repository import open_repository

SLOTS = ".ldm/slots"  # locked files, one a slot, and one for git
SHARED = (WORK, LATENT_STORE, TRACKING, SHARD_CACHE)  # are the checkout's own; the lock of each training is in its folder
CONFLICT = f"changed on the branch and by ingest; `git merge {COLLECTION}` in the checkout, and choose there"
LINKS = "reflink,hardlink,copy"  # how DVC puts files there, where the user has not said it: a copy of all is never needed


def prepare(root: Path, slot: str, branch: str) -> Path:
    """Make a slot's worktree a fresh clone of `branch` with the newest collection; returns the project's folder in it.

    What stages made there before stays: it is ignored by git, and DVC checks it. `dvc.lock` and results in git are those of the
    slot's last run, so that DVC knows what is up to date.
    """
    head = commit_of(root, branch)
    if head is None:
        raise InputError(
            f"{root}: no commit on branch {branch!r}, which scheduled runs take code and settings from; commit there"
        )
    top = root / WORKTREES / slot
    folder = top / git(root, "rev-parse", "--show-prefix")
    top.parent.mkdir(parents=True, exist_ok=True)
    (root / SLOTS).mkdir(exist_ok=True)
    with locked(root / SLOTS / "lock"):  # two slots would register their worktrees in the same files of git
        git(root, "worktree", "prune")
        is_worktree = top.is_dir() and git(top, "rev-parse", "--show-toplevel", check=False) == str(top)
        if not is_worktree:
            shutil.rmtree(top, ignore_errors=True)
            git(root, "worktree", "add", "--quiet", "--force", "--detach", str(top), head)
        for lock in Path(git(top, "rev-parse", "--absolute-git-dir")).glob("*.lock"):
            lock.unlink()  # of a git that was killed: nobody else works here
        git(top, "checkout", "--quiet", "--force", "--detach", head)
        git(top, "clean", "--quiet", "--force", "-d")
    _share(root, folder)
    _take_collection(root, folder, head)
    if last := newest_run(root, slot):
        changed = git(folder, "diff", "--name-only", "--relative", f"{last}~1", last).splitlines()
        git(folder, "restore", f"--source={last}", "--worktree", "--", *(name for name in changed if name != "params.yaml"))
    return folder


def _share(root: Path, folder: Path) -> None:
    """Let the worktree use the checkout's DVC cache and remotes, checkpoints, stores and records."""
    with open_repository(root) as repo:
        cache, kinds = repo.cache.local.path.removesuffix("/files/md5"), repo.config["cache"].get("type")
    settings, own = root / ".dvc/config.local", folder / ".dvc/config.local"
    shutil.copyfile(settings, own) if settings.is_file() else own.unlink(missing_ok=True)
    with open_repository(folder) as repo, repo.config.edit("local") as local:
        local["cache"]["dir"] = cache
        if not kinds:
            local["cache"]["type"] = LINKS
    (root / INGEST_LOCK).touch()
    for name in SHARED:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in (*SHARED, INGEST_LOCK):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).is_symlink():
            os.symlink(root / name, folder / name)


def _take_collection(root: Path, folder: Path, head: str) -> None:
    """Put the newest collection beside the code and settings of `head`, and its files in place."""
    line = commit_of(root, COLLECTION)
    if line and is_ancestor(folder, head, line):
        git(folder, "checkout", "--quiet", "--force", "--detach", line)
    elif line and not is_ancestor(folder, line, head):  # else it was merged into the branch, which may have changed it since
        base = git(folder, "merge-base", head, line)
        changed = git(folder, "diff", "--name-only", "--relative", base, line).splitlines()
        for name in changed:
            _merge(folder, name, base, line)
        made = commit(folder, "Collection: with the changes of the branch", [head, line], changed)
        git(folder, "update-ref", f"refs/heads/{COLLECTION}", made, line)
    with open_repository(folder) as repo:
        if pointers := [stage.path for stage in repo.index.stages if not stage.cmd]:
            with contextlib.suppress(Exception):  # not in the cache
                repo.checkout(pointers, force=True)
                return
            repo.pull(pointers, force=True)


def _merge(folder: Path, name: str, base: str, line: str) -> None:
    """Merge one file that the branch `runs/collection` has changed into the worktree; a pointer as DVC does."""
    texts = {commit: git(folder, "show", f"{commit}:./{name}", check=False) for commit in (base, line)}
    path = folder / name
    ours = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if ours == texts[base]:
        path.write_text(f"{texts[line]}\n", encoding="utf-8")
    elif path.suffix == ".dvc" and ours and texts[base]:
        try:
            _merge_pointers(folder, path, texts[base], texts[line])
        except InputError as error:
            raise InputError(f"{name}: {CONFLICT} ({error})") from None
    elif path.name == ".gitignore":
        path.write_text("\n".join(dict.fromkeys([*ours.splitlines(), *texts[line].splitlines()])) + "\n", encoding="utf-8")
    elif ours != texts[line]:
        raise InputError(f"{name}: {CONFLICT}")


def _merge_pointers(folder: Path, path: Path, base: str, line: str) -> None:
    """As DVC's driver for `git merge` does."""
    from dvc.dvcfile import load_file

    with _beside(path, base) as ancestor, _beside(path, line) as theirs, open_repository(folder) as repo:
        ours, *others = (load_file(repo, str(pointer), verify=False) for pointer in (path, ancestor, theirs))
        ours.merge(*others, allowed=["add", "remove", "change"])


@contextlib.contextmanager
def _beside(path: Path, text: str) -> Iterator[Path]:
    """A version of a pointer in a file of its own."""
    other = path.with_name(f"{len(text)}-{abs(hash(text))}.dvc")
    other.write_text(f"{text}\n", encoding="utf-8")
    try:
        yield other
    finally:
        other.unlink()


def publish_collection(folder: Path, pointer: str, message: str) -> None:
    """Commit the pointer of a collection that has changed in the worktree, on the branch `runs/collection`; pushed data first."""
    push(folder, pointer)
    ignores = Path(pointer).parent / ".gitignore"
    head = git(folder, "rev-parse", "HEAD")
    if (made := commit(folder, message, [head], [pointer, str(ignores)])) != head:
        git(folder, "update-ref", f"refs/heads/{COLLECTION}", made)


def push(folder: Path, *targets: str) -> None:
    """`dvc push` to the default remote, if there is one: a commit must not name data that nobody else can get."""
    from dvc.config import NoRemoteError

    with open_repository(folder) as repo, contextlib.suppress(NoRemoteError):
        repo.cloud.get_remote_odb(None)
        repo.push(targets=list(targets) or None)


def publish_run(folder: Path, slot: str, day: str, paths: tuple[str, ...], message: str) -> str:
    """Commit the results of a run that is done on a new branch runs/SLOT/DAY (DAY-2, …); returns its name."""
    push(folder)
    commit(folder, message, [git(folder, "rev-parse", "HEAD")], paths)
    taken = git(folder, "for-each-ref", "--format=%(refname:short)", f"refs/heads/runs/{slot}/").splitlines()
    names = itertools.chain([f"runs/{slot}/{day}"], (f"runs/{slot}/{day}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if name not in taken)
    git(folder, "branch", name, "HEAD")
    return name


def publish_settings(folder: Path, message: str) -> None:
    """Commit params.yaml as the run has changed it, so that the commit that a model names is what made it."""
    commit(folder, message, [git(folder, "rev-parse", "HEAD")], ["params.yaml"])
