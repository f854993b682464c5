"""The worktrees in which scheduled runs work: one for each slot, at a stable path, over the checkout's DVC cache.

A stable path, because DVC's database of hashes is keyed by path: a new one would read every image again every night.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from ldm.base import clock
from ldm.base.errors import InputError, reason
from ldm.base.files import locked
from ldm.base.paths import DECISION, INGEST_LOCK, LATENT_STORE, METRICS, REPORT, SAMPLES, SHARD_CACHE, TRACKING, WORK
from ldm.config import load_settings
from ldm.versioning.branches import WORKTREES
from ldm.versioning.git import COLLECTION, RUNS, commit, commit_of, git, is_ancestor, move_branch, newest_run
from ldm.versioning.repository import open_repository

SLOTS = ".ldm/slots"  # locked files, one a slot, and one for git
SHARED = (WORK, LATENT_STORE, TRACKING, SHARD_CACHE)  # are the checkout's own; the lock of each training is in its folder
CONFLICT = f"changed on the branch and by ingest; `git merge {COLLECTION}` in the checkout, and choose there"
RESULTS = ("dvc.lock", METRICS, SAMPLES, REPORT, DECISION)  # of a run, in its commit
LOCK_SECONDS = 60.0  # after which git, which moves a branch within milliseconds, was killed
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
        _unlock(top, folder)
        git(top, "checkout", "--quiet", "--force", "--detach", head)
        git(top, "clean", "--quiet", "--force", "-d")
    _share(root, folder)
    _take_collection(folder)
    if last := newest_run(root, slot):
        results = git(folder, "ls-tree", "-r", "--name-only", last, "--", *RESULTS).splitlines()
        if results:
            git(folder, "restore", f"--source={last}", "--worktree", "--", *results)
    return folder


def _unlock(top: Path, folder: Path) -> None:
    """Remove the locks of programs that were killed: of git, and of DVC, whose process number may be another's by now."""
    for lock in Path(git(top, "rev-parse", "--absolute-git-dir")).glob("*.lock"):
        lock.unlink()  # nobody else works here
    for lock in Path(git(top, "rev-parse", "--path-format=absolute", "--git-common-dir"), RUNS).rglob("*.lock"):
        if clock.now().timestamp() - lock.stat().st_mtime > LOCK_SECONDS:
            lock.unlink()
    if not any(Path(place).is_relative_to(top) for place in _working_folders()):
        (folder / ".dvc/tmp/rwlock").unlink(missing_ok=True)


def _working_folders() -> Iterator[str]:
    """Of all processes of this user, of which a stage may have outlived its run by seconds."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            yield process.cwd()


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


def _take_collection(folder: Path) -> None:
    """Put the newest collection beside the code and settings of HEAD, and its files in place.

    Of the branch `runs/collection`, only the pointer of the collection and the .gitignore beside it count: the rest of it is what
    the branch once was.
    """
    paths = _pointer_paths(folder)
    while True:
        line = commit_of(folder, COLLECTION)
        if line and not is_ancestor(folder, line, "HEAD"):
            _merge_line(folder, line, paths)
        if not (line or git(folder, "ls-files", "--", *paths[:1])):
            break  # DVC does not version the collection
        if move_branch(folder, COLLECTION, git(folder, "rev-parse", "HEAD"), line):  # which always names what the last run took
            break
    with open_repository(folder) as repo:
        if pointers := [stage.path for stage in repo.index.stages if not stage.cmd]:
            with contextlib.suppress(Exception):  # not in the cache
                repo.checkout(pointers, force=True)
                return
            repo.pull(pointers, force=True)


def _pointer_paths(folder: Path) -> list[str]:
    """The collection's pointer, which DVC makes, and what keeps git off its files."""
    path = Path(load_settings(folder).data.path)
    return [f"{path}.dvc", str(path.parent / ".gitignore")]


def _merge_line(folder: Path, line: str, paths: list[str]) -> None:
    """Merge what `line`, a commit of the branch `runs/collection`, has done to the collection, and commit that."""
    head = git(folder, "rev-parse", "HEAD")
    if not (base := git(folder, "merge-base", head, line, check=False)):
        raise InputError(
            f"{COLLECTION}: has no commit in common with the branch; merge it there, or delete it and what it ingested"
        )
    for name in git(folder, "diff", "--name-only", "--relative", base, line, "--", *paths).splitlines():
        _merge(folder, name, base, line)
    made = commit(folder, "Collection: with the changes of the branch", [head, line], paths)
    trees = {git(folder, "rev-parse", f"{one}^{{tree}}") for one in (made, line)}
    if len(trees) == 1 and is_ancestor(folder, head, line):
        git(folder, "reset", "--quiet", "--soft", line)  # the branch has nothing new


def _merge(folder: Path, name: str, base: str, line: str) -> None:
    """Merge one file that the branch `runs/collection` has changed into the worktree; a pointer as DVC does."""
    texts = {commit: git(folder, "show", f"{commit}:./{name}", check=False) for commit in (base, line)}
    (path := folder / name).parent.mkdir(parents=True, exist_ok=True)
    ours = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if ours == texts[line]:
        return
    if ours == texts[base]:
        path.write_text(f"{texts[line]}\n", encoding="utf-8")
    elif path.suffix == ".dvc" and ours and texts[base]:
        try:
            _merge_pointers(folder, path, texts[base], texts[line])
        except InputError as error:
            raise InputError(f"{name}: {CONFLICT} ({error})") from None
    elif path.name == ".gitignore":
        path.write_text("\n".join(dict.fromkeys([*ours.splitlines(), *texts[line].splitlines()])) + "\n", encoding="utf-8")
    else:
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
    """Commit the pointer of a collection that has changed in the worktree, on the branch `runs/collection`; pushed data first.

    What another run has published there meanwhile is merged, and its files are put in place.
    """
    paths, head = [pointer, str(Path(pointer).parent / ".gitignore")], git(folder, "rev-parse", "HEAD")
    push(folder, pointer)
    if commit(folder, message, [head], paths) == head:
        return
    while True:
        line = commit_of(folder, COLLECTION)
        if line and not is_ancestor(folder, line, "HEAD"):
            _merge_line(folder, line, paths)
            with open_repository(folder) as repo:
                repo.checkout([str(folder / pointer)], force=True)
            push(folder, pointer)
        if move_branch(folder, COLLECTION, git(folder, "rev-parse", "HEAD"), line):
            return


def push(folder: Path, *targets: str) -> None:
    """`dvc push` to the default remote, if there is one: a commit must not name data that nobody else can get."""
    from dvc.config import NoRemoteError

    with open_repository(folder) as repo, contextlib.suppress(NoRemoteError):
        try:
            repo.cloud.get_remote_odb(None)
            repo.push(targets=[str(folder / target) for target in targets] or None)
        except NoRemoteError:
            raise
        except Exception as error:  # each kind of storage has its own
            raise InputError(
                f"`dvc push` failed ({reason(error)}); mend the remote, and the next run goes on from here"
            ) from None


def publish_run(folder: Path, slot: str, day: str, message: str) -> str:
    """Commit the results of a run that is done on a new branch runs/SLOT/DAY (DAY-2, …); returns its name."""
    commit(folder, message, [git(folder, "rev-parse", "HEAD")], RESULTS)
    taken = git(folder, "for-each-ref", "--format=%(refname:short)", f"{RUNS}/{slot}/").splitlines()
    names = itertools.chain([f"runs/{slot}/{day}"], (f"runs/{slot}/{day}-{number}" for number in itertools.count(2)))
    name = next(name for name in names if name not in taken)
    git(folder, "branch", name, "HEAD")
    return name


def publish_settings(folder: Path, message: str) -> None:
    """Commit params.yaml as the run has changed it, so that the commit that a model names is what made it."""
    commit(folder, message, [git(folder, "rev-parse", "HEAD")], ["params.yaml"])
