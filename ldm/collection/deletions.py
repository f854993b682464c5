"""Images that were deleted from the collection, as git's history and DVC's listings tell, and their purge after some days.

Nothing is noted down: what is still somewhere goes if no listing has it that was current lately. So what could not go is found
again the next time.
"""

import contextlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ldm.base import clock
from ldm.base.errors import InputError, reason
from ldm.collection.batches import is_image
from ldm.collection.purge import Purged, purge
from ldm.config import load_settings
from ldm.registry import tracking
from ldm.versioning import branches, cache
from ldm.versioning.git import COLLECTION, commit_of, git
from ldm.versioning.repository import open_repository

DAYS = 7  # in which a deletion can be taken back
SHARE = 0.5  # of the collection, which is purged at once
Listings = dict[str, dict[str, str]]  # for each version of the collection, by its md5: the md5 of each file by its name


@dataclass
class Outcome:
    purged: Purged | None = None
    left: dict[str, str] = field(default_factory=dict)  # what could not go, and why
    listings: frozenset[str] = frozenset()  # md5 of listings that have to stay for the next time, as they name what could not go

    @property
    def digests(self) -> tuple[str, ...]:
        return self.purged.digests if self.purged else ()

    def lines(self) -> list[str]:
        """The report, for people."""
        purged = self.purged
        versions = [f"version {row.version}: {row.seen}" for row in purged.versions.itertuples()] if purged else []
        found = [*purged.lines(), *purged.notes, *versions] if purged else []
        return [*found, *(f"left: {name}: {why}" for name, why in self.left.items())]


def purge_deleted(root: Path, days: float = DAYS, share: float = SHARE) -> Outcome:
    """Purge every image that the collection once had, and did not have in the last `days` days.

    The collection is that on the branch runs/collection, or without scheduled runs on the branch that is checked out. What other
    branches, tags and stashes have that were not merged there was not deleted, and stays. Nothing goes if more than a `share` of
    the collection would: a folder that was not there was perhaps versioned so.
    """
    root = root.resolve()
    tracking.use_default_store(root)
    try:
        return _purge_deleted(root, days, share)
    except InputError as error:
        return Outcome(left={"the collection": str(error)})


def _purge_deleted(root: Path, days: float, share: float) -> Outcome:
    recent = recent_listings(root, days)
    if not recent:
        return Outcome()
    spared = cache.named(branches.contents_at(root, branches.unmerged(root, str(_tip(root))), _pointer(root)))
    with open_repository(root) as repo:
        place = cache.local_cache(repo)
        now = {md5: name for listing in recent for name, md5 in _files(place, listing).items()}
        elsewhere = [_files(place, listing) for listing in spared if cache.path_of(place, listing).exists()]
        kept = now.keys() | {md5 for files in elsewhere for md5 in files.values()}
        older = _older(root, place, recent)
        names = {md5: name for files in older.values() for name, md5 in files.items() if is_image(name) and md5 not in kept}
        here = {md5 for md5 in names if cache.path_of(place, md5).exists()}
        there, silent = _in_remote(repo, names.keys() - here) if names else (set[str](), "")
    outcome = Outcome(left={"the remote": silent} if silent else {})
    if found := sorted(here | there):
        total = len(found) + sum(map(is_image, now.values()))
        try:
            if not place.resolve().is_relative_to(root):
                by_hand = "`ldm data purge` does it by hand"
                raise InputError(f"DVC's cache lies outside of the project, in {place}, where others may use it; {by_hand}")
            if len(found) > share * total:
                meant = "if that is meant, run `collect` with `purge_share: 1`; else take the deletion back"
                raise InputError(f"{len(found)} of {total} images were deleted; {meant}")
            outcome.purged = purge(root, *found, spared=kept)
            outcome.left |= {names[md5]: why for md5, why in outcome.purged.refused.items()}
        except InputError as error:
            outcome.left |= {names[md5]: str(error).removeprefix(f"{md5}: ") for md5 in found}
    if outcome.left:
        outcome.listings = frozenset(md5 for md5, files in older.items() if not names.keys().isdisjoint(files.values()))
    return outcome


def recent_listings(root: Path, days: float = DAYS) -> set[str]:
    """The md5 of each version of the collection that was current in the last days; none if DVC does not version it."""
    pointer, tip = _pointer(root), _tip(root)
    if not tip or not branches.contents_at(root, [tip], pointer):
        return set()
    since = branches.current_since(root, tip, clock.now() - timedelta(days=days))
    return cache.named(branches.contents_at(root, since, pointer))


def common_listing(root: Path) -> set[str]:
    """The md5 of what the collection was where the branch that is checked out and runs/collection parted: to merge takes that."""
    base = git(root, "merge-base", "HEAD", COLLECTION, check=False)
    return cache.named(branches.contents_at(root, [base] if base else [], _pointer(root)))


def _pointer(root: Path) -> str:
    return f"{load_settings(root).data.path}.dvc"


def _tip(root: Path) -> str | None:
    return commit_of(root, COLLECTION) or commit_of(root, "HEAD")


def _older(root: Path, place: Path, recent: set[str]) -> Listings:
    """Earlier versions of the collection, of its own history, if they are still here."""
    pointer = _pointer(root)
    listings = cache.named(branches.contents_at(root, branches.commits_of(root, str(_tip(root)), pointer), pointer))
    return {md5: _files(place, md5) for md5 in listings - recent if cache.path_of(place, md5).exists()}


def _files(place: Path, listing: str) -> dict[str, str]:
    """The md5 of each file in a version of the collection, by its name; of a file that is no folder, nothing."""
    try:
        found = json.loads(cache.path_of(place, listing).read_bytes()) if listing.endswith(".dir") else []
        return {entry["relpath"]: entry["md5"] for entry in found}
    except (OSError, ValueError, TypeError, KeyError):
        path = cache.path_of(place, listing)
        raise InputError(f"{path}: missing or damaged, and lists the collection; `dvc fetch` may bring it back") from None


def _in_remote(repo: Any, files: Collection[str]) -> tuple[set[str], str]:
    """Those that the default remote has, and why it does not answer."""
    from dvc.config import NoRemoteError

    try:
        store = repo.cloud.get_remote_odb(None)
        with contextlib.suppress(FileNotFoundError):  # nothing was pushed yet
            store.fs.ls(store.path)  # to ask for a file is to hear that it is missing, also from a server that is away
        return set(store.list_oids_exists(sorted(files))), ""
    except NoRemoteError:
        return set(), ""
    except Exception as error:  # each kind of storage has its own
        return set(), f"does not answer ({reason(error)}), and may have images that were deleted"
