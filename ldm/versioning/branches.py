"""Git of a project: its checkouts, the branches that scheduled runs leave, and what files hold at some commits."""

import re
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from ldm.base.errors import InputError
from ldm.versioning.git import output

WORKTREES = ".ldm/worktrees"  # of scheduled runs, one for each slot
RUN = re.compile(r"runs/([^/]+)/(\d{4}-\d\d-\d\d)(?:-(\d+))?")  # runs/SLOT/DAY, then runs/SLOT/DAY-2, …


class RunBranch(NamedTuple):
    """What a scheduled run left: a commit of its dvc.lock, params.yaml, metrics and report."""

    name: str
    slot: str
    when: tuple[str, int]  # the day, and which run of that day
    commit: str
    parents: tuple[str, ...]  # the commit that the run worked at


def find_checkouts(root: Path) -> list[Path]:
    """The project's folder in every worktree that is on this disk and has DVC, first `root`, which has to be in the main one."""
    top = _worktrees(root)
    inside = output(root, "rev-parse", "--show-prefix").decode().strip()
    if not (top[0] / inside).exists() or not (top[0] / inside).samefile(root):
        raise InputError(f"{root}: a worktree of {top[0]}; run this in {top[0] / inside}")
    return [root, *(path / inside for path in top[1:] if (path / inside / ".dvc").is_dir())]


def stray_worktrees(root: Path) -> tuple[list[Path], list[Path]]:
    """Folders in `WORKTREES` that git does not know as worktrees, and worktrees there that git knows and whose folder is gone."""
    place = root / WORKTREES
    folders = sorted(place.iterdir()) if place.is_dir() else []  # before git is asked: it knows a worktree first
    known = [path for path in _worktrees(root) if path.parent == place]
    return [path for path in folders if path not in known], [path for path in known if not path.exists()]


def run_branches(root: Path) -> list[RunBranch]:
    """The branches of scheduled runs, the newest of each slot first; not those that are checked out somewhere."""
    fields = "%(refname:lstrip=2)%00%(objectname)%00%(parent)%00%(worktreepath)"
    found = []
    for line in output(root, "for-each-ref", f"--format={fields}", "refs/heads/runs/").decode().splitlines():
        name, commit, parents, checked_out = line.split("\0")
        if (match := RUN.fullmatch(name)) and not checked_out:
            slot, day, number = match.groups()
            found.append(RunBranch(name, slot, (day, int(number or 1)), commit, tuple(parents.split())))
    return sorted(found, key=lambda branch: branch.when, reverse=True)


def delete(root: Path, branch: RunBranch) -> None:
    """Delete a branch, unless it has moved since it was read."""
    output(root, "update-ref", "-d", f"refs/heads/{branch.name}", branch.commit)


def commits_to_keep(root: Path, going: Collection[RunBranch]) -> set[str]:
    """What branches, tags, stashes and DVC's experiments name, and every worktree's HEAD; not the branches that are `going`."""
    lines = output(root, "for-each-ref", "--format=%(objectname) %(objecttype)%(*objecttype) %(refname)").decode().splitlines()
    without = {f"refs/heads/{branch.name}" for branch in going}
    kept = set()
    for commit, kind, name in (line.split(" ", 2) for line in lines):
        if kind.endswith("commit") and name not in without and not name.startswith(("refs/remotes/", "refs/prefetch/")):
            kept.add(commit)
    for entry in output(root, "log", "--walk-reflogs", "--format=%H %P", "refs/stash", check=False).decode().splitlines():
        stash, _, *others = entry.split()  # the first parent is what was checked out; others were staged, or untracked
        kept |= {stash, *others}
    heads = output(root, "worktree", "list", "--porcelain").decode().splitlines()
    heads = [line.removeprefix("HEAD ") for line in heads if line.startswith("HEAD ")]
    return kept | {head for head in heads if head.strip("0")}  # zeros: a branch without a commit


def unmerged(root: Path, tip: str) -> set[str]:
    """What branches, tags and stashes name that are not in the history of `tip`; branches of runs are no source of anything."""
    lines = output(root, "for-each-ref", "--format=%(objectname) %(refname)", f"--no-merged={tip}").decode().splitlines()
    refs = [line.split(" ", 1) for line in lines]
    return {commit for commit, name in refs if name.startswith(("refs/heads/", "refs/tags/", "refs/stash")) and not is_run(name)}


def is_run(ref: str) -> bool:
    return bool(RUN.fullmatch(ref.removeprefix("refs/heads/")))


def texts_at(root: Path, commits: Collection[str], wanted: Callable[[str], bool]) -> set[str]:
    """What the files whose path is `wanted` hold at these commits."""
    blobs = set()
    for commit in commits:
        for entry in output(root, "ls-tree", "-r", "-z", f"{commit}^{{tree}}").decode(errors="replace").split("\0")[:-1]:
            facts, _, path = entry.partition("\t")
            if wanted(path):
                blobs.add(facts.split()[2])
    return _read(root, blobs)


def contents_at(root: Path, commits: Iterable[str], path: str) -> set[str]:
    """What a file, whose path is relative to `root`, holds at these commits; those that lack it count for nothing."""
    return _read(root, [f"{commit}:./{path}" for commit in commits])


def commits_of(root: Path, name: str, path: str) -> list[str]:
    """Every commit of a branch's history that has changed a file."""
    return output(root, "rev-list", "--full-history", name, "--", path).decode().split()


def current_since(root: Path, name: str, when: datetime) -> set[str]:
    """The commits that a branch may have named at some time since `when`: all that are younger, and the first older ones."""
    dates, parents = dict[str, float](), dict[str, list[str]]()
    for line in output(root, "log", "--format=%H %ct %P", name).decode().splitlines():
        commit, date, *parents[commit] = line.split()
        dates[commit] = float(date)
    found, waiting = set[str](), [*parents][:1]
    for commit in waiting:  # it grows
        if commit not in found:
            found.add(commit)
            waiting += parents[commit] if dates[commit] >= when.timestamp() else []
    return found


def _read(root: Path, names: Collection[str]) -> set[str]:
    """The texts of blobs, each by its hash or as COMMIT:PATH."""
    rest, texts = output(root, "cat-file", "--batch", given="".join(f"{name}\n" for name in names).encode()), set[str]()
    while rest:
        header, _, rest = rest.partition(b"\n")
        if not header.endswith(b" missing"):
            size = int(header.split()[2])
            texts.add(rest[:size].decode(errors="replace"))
            rest = rest[size + 1 :]
    return texts


def _worktrees(root: Path) -> list[Path]:
    lines = output(root, "worktree", "list", "--porcelain").decode().splitlines()
    return [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]
