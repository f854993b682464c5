"""git, as a program: without the user's hooks, and with an author where none is configured."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ldm.base import clock
from ldm.base.errors import InputError

QUIET = ("-c", "core.hooksPath=/dev/null", "-c", "advice.detachedHead=false", "-c", "core.quotePath=false")
NOBODY = {"NAME": "ldm-pipeline", "EMAIL": "ldm-pipeline@localhost"}  # writes commits where git knows no user
COLLECTION = "runs/collection"  # branch whose commits have the pointer of the collection that the last scheduled run took
RUNS = "refs/heads/runs"  # below it a branch for each finished run: runs/SLOT/DATE


def output(
    root: Path, *arguments: str, given: bytes | None = None, check: bool = True, env: Mapping[str, str] = MappingProxyType({})
) -> bytes:  # fmt: skip
    """What a git command prints, which reads `given`; `InputError` if it fails, or nothing if `check` is false."""
    try:
        command = ["git", *QUIET, *arguments]
        done = subprocess.run(command, cwd=root, input=given or b"", capture_output=True, env={**os.environ, **env})
    except FileNotFoundError:
        raise InputError("git is not installed, and a scheduled run works in a git worktree; install git") from None
    if done.returncode and check:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).decode(errors="replace").split())
        raise InputError(f"{root}: `git {' '.join(arguments)}` failed ({said or done.returncode}); mend that and run again")
    return done.stdout if not done.returncode else b""


def git(root: Path, *arguments: str, check: bool = True) -> str:
    """`output` as text, without the blank space around it."""
    return output(root, *arguments, check=check).decode(errors="replace").strip()


def commit_of(root: Path, name: str) -> str | None:
    """The hash of the commit that a branch or another name stands for."""
    return git(root, "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}", check=False) or None


def move_branch(root: Path, name: str, to: str, old: str | None) -> bool:
    """Let a branch be the commit `to` if it is still `old` (None: if there is no such branch); whether it was."""
    try:
        git(root, "update-ref", f"refs/heads/{name}", to, old or "0" * len(to))
    except InputError:
        return False
    return True


def is_ancestor(root: Path, commit: str, of: str) -> bool:
    return git(root, "merge-base", commit, of, check=False) == commit


def commit(root: Path, message: str, parents: Sequence[str], paths: Sequence[str] = ()) -> str:
    """Commit what is staged, and `paths` even if they are ignored, in the worktree at `root`, whose HEAD then is that commit.

    The hash of the commit, or of the one parent if nothing differs from it.
    """
    there = [path for path in paths if (root / path).exists()]
    if there:
        git(root, "add", "--force", "--", *there)
    tree = git(root, "write-tree")
    if len(parents) == 1 and git(root, "rev-parse", f"{parents[0]}^{{tree}}") == tree:
        return parents[0]
    for role in ("AUTHOR", "COMMITTER"):
        if not git(root, "config", "user.email", check=False):
            for what, value in NOBODY.items():
                os.environ.setdefault(f"GIT_{role}_{what}", value)
    dates = {f"GIT_{role}_DATE": f"@{clock.now().timestamp():.0f} +0000" for role in ("AUTHOR", "COMMITTER")}
    told = [f"-p{parent}" for parent in parents]
    made = output(root, "commit-tree", tree, *told, "-m", message, env=dates).decode().strip()
    git(root, "reset", "--quiet", "--soft", made)
    return made


def newest_run(root: Path, slot: str) -> str | None:
    """The branch of the last finished run of a slot."""
    order = ("--sort=-version:refname", "--sort=-committerdate")  # the last one counts first
    return git(root, "for-each-ref", *order, "--count=1", "--format=%(refname:short)", f"{RUNS}/{slot}/") or None
