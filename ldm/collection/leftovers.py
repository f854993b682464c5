"""What processes have left in a project's folders: latents, half-written files, unfinished trainings, worktrees."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path, PurePosixPath

from ldm.base import clock
from ldm.base.errors import InputError
from ldm.base.files import locked
from ldm.base.paths import INGEST_LOCK, LATENT_STORE, LATENTS, SHARDS, SOURCE, WORK
from ldm.base.sizes import bytes_of
from ldm.collection.places import COLLECTION, LEFTOVER, PLACES
from ldm.config import load_settings
from ldm.versioning.branches import WORKTREES, stray_worktrees
from ldm.versioning.git import git
from ldm.versioning.repository import held, open_repository

DAY, MONTH = timedelta(days=1), timedelta(days=30)
LEFT = "left"  # kind of what is not removed though it might go
Row = tuple[str, str, int, str]  # kind, name, bytes, why


def is_older(path: Path, age: timedelta) -> bool:
    """Whether nothing in a file or folder has changed for so long; False if it is gone."""
    try:
        newest = path.lstat().st_ctime
        if path.is_dir() and not path.is_symlink():
            newest = max(
                (Path(folder, name).lstat().st_ctime for folder, _, names in os.walk(path) for name in names), default=newest
            )
        return clock.now() - clock.at(newest) > age
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """A file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=not path.exists())
    else:
        path.unlink(missing_ok=True)


def unnamed_latents(root: Path, checkouts: Iterable[Path]) -> list[Path]:
    """Files of the store of `root` that `data/latents` of no checkout names."""
    named = set()
    for checkout in checkouts:
        with contextlib.suppress(FileNotFoundError):
            manifest = json.loads((checkout / LATENTS / "manifest.json").read_text(encoding="utf-8"))
            named |= {file["sha256"] for file in manifest["files"]}
    return [path for path in sorted((root / LATENT_STORE).glob("*")) if path.stem.rpartition("-")[2] not in named]  # KEY-SHA256


def clear_data(root: Path, checkouts: list[Path], dry_run: bool) -> list[Row]:
    """Remove half-written data and what of the store nothing names, where no stage writes data and no ingest works."""
    rows, found = list[Row](), list[tuple[str, Path, str]]()
    collection = PurePosixPath(os.path.relpath(root / load_settings(root).data.path, root))
    with contextlib.ExitStack() as stack:
        busy = {} if dry_run else _hold_idle(stack, checkouts)
        ingest = root / INGEST_LOCK
        try:
            if ingest.exists():
                stack.enter_context(locked(ingest, wait=False))
            ingesting = False
        except BlockingIOError:
            ingesting = True
        for checkout in checkouts:
            for place in PLACES if checkout not in busy else ():
                if place.holds == LEFTOVER and not (ingesting and place.pattern.startswith(COLLECTION)):
                    found += [("leftover", path, "half written, over a day ago") for path in place.found(checkout, collection)]
        if not busy:
            found += [("latents", path, "no checkout's data/latents names it") for path in unnamed_latents(root, checkouts)]
        for kind, path, why in found:
            if is_older(path, DAY):
                rows.append((kind, os.path.relpath(path, root), bytes_of(path), why))
                if not dry_run:
                    remove(path)
    return rows + [(LEFT, os.path.relpath(checkout, root), 0, why) for checkout, why in busy.items()]


def clear_work(root: Path, checkouts: list[Path], dry_run: bool) -> list[Row]:
    """Remove unfinished trainings and batches of diverged ones after a month, and half-written files in `.ldm` after a day."""
    found = [("leftover", path, DAY, "half written, over a day ago") for checkout in checkouts for path in _partials(checkout)]
    found += [("bad batch", path, MONTH, "a month old") for path in sorted((root / WORK).glob("*/*/bad_batch_*"))]
    rows = list[Row]()
    for kind, path, age, why in found:
        if is_older(path, age):
            rows.append((kind, os.path.relpath(path, root), bytes_of(path), why))
            if not dry_run:
                remove(path)
    for folder in sorted((root / WORK).glob("*/*/")):
        lock = locked(folder / "lock", wait=False) if (folder / "lock").exists() else contextlib.nullcontext()
        with contextlib.suppress(BlockingIOError, FileNotFoundError), lock:
            if is_older(folder, MONTH):  # asked under the lock: another process may have made the folder anew
                rows.append(("training", os.path.relpath(folder, root), bytes_of(folder), "unfinished, untouched for a month"))
                if not dry_run:
                    remove(folder)
    return rows


def clear_worktrees(root: Path, dry_run: bool) -> list[Row]:
    """Remove folders that git does not know as worktrees, and tell git of worktrees whose folder is gone."""
    folders, lost = stray_worktrees(root)
    folders = [folder for folder in folders if is_older(folder, DAY)]
    rows = [("worktree", os.path.relpath(path, root), bytes_of(path), "unknown to git") for path in folders]
    rows += [("worktree", os.path.relpath(path, root), 0, "its folder is gone") for path in lost]
    if not dry_run:
        for folder in folders:
            remove(folder)
        for path in lost:
            git(root, "worktree", "remove", "--force", str(path))
    return rows


def _hold_idle(stack: contextlib.ExitStack, checkouts: list[Path]) -> dict[Path, str]:
    """Let no stage start in the checkouts; those in which one writes data are left alone, and returned with the reason."""
    busy = {}
    for checkout in checkouts:
        try:
            repo = stack.enter_context(open_repository(checkout))
            stack.enter_context(held(repo, *(checkout / path for path in (SOURCE, SHARDS, LATENTS)), reading=True))
        except InputError as error:
            busy[checkout] = str(error)
    return busy


def _partials(checkout: Path) -> Iterator[Path]:
    """What was half written below `.ldm`, but for other checkouts and what libraries keep."""
    for folder, folders, files in os.walk(checkout / ".ldm"):
        partial = [name for name in folders if name.endswith(".partial")]
        others = {Path(WORKTREES).name, "home"} if Path(folder).parent == checkout else set()
        folders[:] = sorted(set(folders) - {*partial, *others})
        yield from (Path(folder, name) for name in sorted([*partial, *files]) if name.endswith(".partial"))
