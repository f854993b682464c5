"""Retention: what accumulates is removed, but for what registered versions and recent runs need.

Names go first and bytes last: a call that is killed leaves nothing broken, and the next one finishes its work.
"""

import contextlib
import os
import re
from collections.abc import Collection, Iterable
from datetime import timedelta
from pathlib import Path

import pandas as pd
import yaml

from ldm.base import clock
from ldm.base.errors import InputError
from ldm.base.files import locked
from ldm.base.sizes import bytes_of
from ldm.collection.deletions import DAYS, common_listing, recent_listings
from ldm.collection.leftovers import DAY, LEFT, Row, clear_data, clear_work, clear_worktrees, is_older
from ldm.config import load_settings
from ldm.registry import tracking
from ldm.registry import versions as registry
from ldm.registry.disposal import Disposal, Store, has_store
from ldm.registry.versions import Version
from ldm.versioning import branches, cache
from ldm.versioning.branches import RunBranch
from ldm.versioning.git import git
from ldm.versioning.repository import held, open_repository

KEEP = 30
WEEK = timedelta(days=7)
COLUMNS = ["kind", "name", "bytes", "why"]


def collect_garbage(
    root: Path, keep: int = KEEP, *, days: float = DAYS, listings: Collection[str] = frozenset(), dry_run: bool = False
) -> pd.DataFrame:  # fmt: skip
    """Remove what neither versions with an alias nor the last `keep` versions and runs need; README.md says what that is.

    In DVC's cache stays what the collection had in the last `days` days, and what its `listings`, which are md5, name. Returns
    what went, or would go in a dry run: kind, name, bytes, why. Rows of the kind "left" are what stays though it might go, such
    as what a stage works on. Waits for another call. Raises `InputError` in a worktree, and if MLflow's store does not answer or
    is not that of the runs.
    """
    root = root.resolve()
    tracking.use_default_store(root)
    checkouts = branches.find_checkouts(root)
    (root / ".ldm").mkdir(exist_ok=True)
    with locked(root / ".ldm/gc.lock"):
        try:
            store = Store() if has_store() else None
            staying, going = _versions(root, checkouts, keep, store)
            gone = _branches(root, keep, staying)
            disposals = _disposals(root, keep, store, staying, going)
            rows = [("branch", branch.name, 0, f"{keep} runs of {branch.slot} are newer") for branch in gone]
            rows += [(one.kind, one.name, one.size, one.why) for one in disposals]
            if not dry_run:
                for one in disposals:
                    one.mark()
                for branch in gone:
                    branches.delete(root, branch)
            listed = recent_listings(root, days).union(common_listing(root), listings)
            rows += _clear_cache(root, checkouts, staying, gone, listed, dry_run)
            rows += clear_data(root, checkouts, dry_run)
            rows += clear_work(root, checkouts, dry_run)
            rows += clear_worktrees(root, dry_run)
            if not dry_run:
                for one in disposals:
                    one.erase()
                when = () if gone else ("--auto",)  # git alone would keep what the branches had until it is thousands of files
                git(root, "-c", "gc.autoDetach=false", "-c", "maintenance.autoDetach=false", "gc", "--quiet", *when)
        except OSError as error:
            raise InputError(f"{root}: {error}; mend that, and run `ldm gc` again") from None
    rows += [(LEFT, name, 0, why) for name, why in dict.fromkeys(store.left if store else ())]
    return pd.DataFrame(rows, columns=COLUMNS)


def summary(table: pd.DataFrame) -> list[dict[str, str]]:
    """A row for each kind and reason, for people; what was left is named."""
    rows = list[dict[str, str]]()
    for (kind, why), group in table.groupby(["kind", "why"], sort=False):
        reason = f"{', '.join(group.name)}: {why}" if kind == LEFT else str(why)
        rows.append({"kind": str(kind), "count": f"{len(group):,}", "size": f"{group.bytes.sum() / 1e6:,.1f} MB", "why": reason})
    return rows


def _versions(root: Path, checkouts: list[Path], keep: int, store: Store | None) -> tuple[list[Version], list[Version]]:
    """Versions that stay, and those that go.

    A version that a checkout or one that stays starts from (`models:/NAME/VERSION` in params.yaml) stays. So do all versions of
    other names that `registry.name` has had in a commit that is still there.
    """
    name, settings = load_settings(root).registry.name, "params.yaml"
    found = registry.find({}, name) if store else []
    chosen = [version for number, version in enumerate(found) if number < keep or version.aliases]
    current = [(checkout / settings).read_text(encoding="utf-8") for checkout in checkouts if (checkout / settings).is_file()]
    pinning = [*current, *(registry.kept(version, settings) or "" for version in chosen)]
    pinned = {int(number) for text in pinning for number in re.findall(rf"models:/{re.escape(name)}/(\d+)", text)}
    pinned |= store.copied(name) if store else set()
    staying = [version for version in found if version in chosen or version.version in pinned]
    if not found and branches.run_branches(root):
        where = os.environ["MLFLOW_TRACKING_URI"]
        raise InputError(f"{where}: has no version of {name!r}, but runs were made here; set MLFLOW_TRACKING_URI as for the runs")
    earlier = branches.texts_at(root, branches.commits_to_keep(root, ()), lambda path: path == settings)
    others = _model_names([*current, *earlier]) - {name}
    protected = [version for other in sorted(others) for version in (registry.find({}, other) if store else ())]
    return staying + protected, [version for version in found if version not in staying]


def _model_names(texts: Iterable[str]) -> set[str]:
    """`registry.name` in each params.yaml."""
    names = set()
    for text in texts:
        with contextlib.suppress(yaml.YAMLError, AttributeError, KeyError, TypeError):  # a damaged one
            names.add(yaml.safe_load(text)["registry"]["name"])
    return names


def _branches(root: Path, keep: int, staying: list[Version]) -> list[RunBranch]:
    """Branches of runs beyond the last `keep` of a slot, unless a version that stays was made at their commit or its parent."""
    makers = {version.tags.get("ldm.git_commit") for version in staying}
    found = branches.run_branches(root)
    recent = {name for slot in {one.slot for one in found} for name in [one.name for one in found if one.slot == slot][:keep]}
    return [one for one in found if one.name not in recent and not makers.intersection((one.commit, *one.parents))]


def _disposals(
    root: Path, keep: int, store: Store | None, staying: list[Version], going: list[Version]
) -> list[Disposal]:  # fmt: skip
    """What of MLflow goes."""
    if store is None:
        return []
    name, makers = load_settings(root).registry.name, {version.run_id for version in staying}
    return [
        *store.versions(going, f"no alias, and {keep} versions are newer"),
        *store.models(name, clock.now() - DAY, "no version has it"),
        *store.runs(name, keep, makers, f"{keep} runs are newer, and no version that stays is from it"),
    ]


def _clear_cache(
    root: Path, checkouts: list[Path], staying: list[Version], gone: list[RunBranch], listed: set[str], dry_run: bool
) -> list[Row]:  # fmt: skip
    """Remove objects of DVC's cache that are a week old and that neither `listed` nor anything else that stays names."""
    with open_repository(root) as repo:
        place = cache.local_cache(repo)
    if not place.resolve().is_relative_to(root):
        return [(LEFT, "DVC's cache", 0, f"it lies outside of the project, in {place}, where others may use it")]
    locks = {version.uri: registry.kept(version, "dvc.lock") for version in staying}
    if unknown := ", ".join(uri for uri, text in locks.items() if text is None):
        return [(LEFT, "DVC's cache", 0, f"{unknown} has no dvc.lock to tell what it needs; restore its files, or delete it")]
    texts = branches.texts_at(root, branches.commits_to_keep(root, gone), cache.names_objects)
    named = cache.named([*texts, *filter(None, locks.values())]) | cache.named_now(checkouts) | listed
    needed = cache.expanded(place, named)
    objects, entries = cache.unneeded(place, needed, lambda path: is_older(path, WEEK))
    with contextlib.ExitStack() as stack:
        if not dry_run and (objects or entries):
            try:  # for an instant: a stage that ends meanwhile has to record its outs
                for checkout in checkouts:
                    stack.enter_context(held(stack.enter_context(open_repository(checkout))))
            except InputError as error:
                return [(LEFT, "DVC's cache", 0, str(error))]
            late = cache.expanded(place, cache.named_now(checkouts) - needed)
            objects = {md5: path for md5, path in objects.items() if md5 not in late}
        rows = _cache_rows(root, place, objects, entries)
        if not dry_run:
            cache.take_out(place, objects, entries)
    if not dry_run:
        cache.delete_removed(place)
    return rows


def _cache_rows(root: Path, place: Path, objects: dict[str, Path], entries: list[Path]) -> list[Row]:
    rows = [
        ("object", md5, bytes_of(path), "no checkout, commit or version that stays names it") for md5, path in objects.items()
    ]
    rows += [("run-cache", path.name, bytes_of(path), "its outs are gone") for path in entries]
    if (left := place / cache.REMOVED).exists():
        rows.append(("leftover", os.path.relpath(left, root), bytes_of(left), "of a call that was killed"))
    return rows
