"""Purge images that were removed from the collection: old copies in DVC's cache and remote, and all that was made of them.

A shard tells which images it holds; the manifest of latents names the sha256 of their shards. What leads to all the rest is
deleted last, so that a purge that was killed can be done again: shards if an image was named, else its file.
"""

import contextlib
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import yaml

from ldm.base.errors import InputError
from ldm.base.files import file_hash, locked
from ldm.base.options import value_at
from ldm.base.paths import INGEST_LOCK, LATENTS, SHARDS, SOURCE
from ldm.collection.holders import Holders, find_holders, remove_worktree
from ldm.collection.leftovers import unnamed_latents
from ldm.collection.objects import DIGEST, Objects, images_of
from ldm.collection.places import LEFTOVER, PLACES, Place
from ldm.collection.places import UNTOUCHED as UNTOUCHED
from ldm.collection.traces import Traces, captions, find_traces, is_name
from ldm.config import load_settings
from ldm.data.reader import SPLITS
from ldm.data.remote import PART
from ldm.registry import tracking
from ldm.registry import versions as registry
from ldm.versioning.branches import find_checkouts
from ldm.versioning.repository import held, open_repository

TAG = "ldm.purged"  # of a version: hashes (first 16 digits) of images that it saw and that were purged since
TAGGED = 5000  # hashes in a tag: MLflow limits its length


@dataclass(frozen=True)
class Purged:
    """What was found of images, and deleted unless it was a dry run."""

    names: tuple[str, ...]  # under which their bytes were stored
    digests: tuple[str, ...]  # sha256 of their files, the first 16 digits
    copies: pd.DataFrame  # in the order of deletion: kind, place ("cache", "remote", "data", ".ldm"), name (md5 or path), size
    notes: tuple[str, ...]
    versions: pd.DataFrame  # models that saw one, or may have: version, aliases, splits, seen
    refused: Mapping[str, str]  # why nothing of an image was deleted

    def lines(self) -> list[str]:
        """The report without the versions, for people."""
        title = f"{', '.join(self.names) or 'image'} (sha256 {', '.join(f'{digest}…' for digest in self.digests)})"
        groups = self.copies.groupby(["place", "kind"], sort=False)["size"]
        return [title, *(f"{place:<8}{kind:<10}{len(of):>6} files{sum(of):>16,} bytes" for (place, kind), of in groups)]


def purge(
    root: Path, *images: str, remote: str | None = None, dry_run: bool = False, spared: Collection[str] = frozenset()
) -> Purged:
    """Delete what is left of images that are no longer in the collection, of all of them in one pass.

    An image is called by its `file_name` in the collection, which means all contents that a shard held under that name; by the
    sha256 of its file, which means all its names; or by the md5 of its file, as DVC does. `remote` is a DVC remote, else the
    default one; a remote that does not answer is left out, with a note. Captions whose md5 is in `spared` stay. Model versions
    that saw an image get a tag (`TAG`) first. An image that the collection, or what the pipeline made of it, still holds is
    refused; `InputError` if that is so for each.
    """
    root, notes = root.resolve(), list[str]()
    tracking.use_default_store(root)
    try:
        with open_repository(root) as repo, contextlib.ExitStack() as stack:
            store = _remote(repo, remote, notes)
            alone = {} if dry_run else _alone(root, repo, stack)
            objects = Objects(repo.cache.local, store)
            if objects.silent:
                notes.append(f"the remote does not answer ({objects.silent}): not looked at; purge again when it does")
            traces = find_traces(objects, images)
            holders = find_holders(root, repo, objects, traces, load_settings(root).data.path, stack)
            unclear = _refuse(root, objects, traces, holders)
            if not traces.digests.keys() - traces.refused:
                image, why = next(iter(traces.refused.items()))
                raise InputError(f"{image}: {why}")
            versions = _versions(root, objects, traces, tag=not dry_run)
            copies = _copies(root, objects, _kinds(objects, traces, holders.current.union(spared)), traces.wanted, holders)
            notes += [
                f"{path}: held it, and no run is at work there; removed, its next run makes it anew" for path in holders.stale
            ]
            for worktree in holders.stale if not dry_run else ():
                alone[worktree].close()
                remove_worktree(root, worktree)
            if not dry_run:
                _delete(root, objects, copies)
    except OSError as error:
        raise InputError(f"{', '.join(images)}: {error}; mend that and purge again") from None
    notes += [f"not purged: files of that name that no shard holds, with sha256 {unclear}"] * bool(unclear)
    return Purged(tuple(sorted(traces.names)), tuple(sorted(traces.wanted)), copies, tuple(notes), versions, traces.refused)


def _remote(repo: Any, name: str | None, notes: list[str]) -> Any | None:
    """The remote of that name, or the default one; None if there is none."""
    from dvc.config import NoRemoteError

    try:
        return repo.cloud.get_remote_odb(name)
    except NoRemoteError:
        if name:
            raise
        known = ", ".join(repo.config["remote"])
        notes += [f"no default remote: not looked at are {known}; name one with --remote"] if known else []
        return None


def _alone(root: Path, repo: Any, stack: contextlib.ExitStack) -> dict[Path, contextlib.ExitStack]:
    """Let no stage and no ingest work here or in a worktree, which share the latents' store; the locks of each checkout."""
    ingest = root / INGEST_LOCK
    if ingest.exists():
        stack.enter_context(locked(ingest))
    locks = {}
    for checkout in find_checkouts(root):
        locks[checkout] = stack.enter_context(contextlib.ExitStack())
        other = repo if checkout == root else locks[checkout].enter_context(open_repository(checkout))
        locks[checkout].enter_context(held(other, *(checkout / path for path in (SOURCE, SHARDS, LATENTS))))
    return locks


def _refuse(root: Path, objects: Objects, traces: Traces, holders: Holders) -> str:
    """Refuse images that are held, or of which nothing is left; returns the sha256 of other files of their names."""
    collection, unclear = root / load_settings(root).data.path, set[str]()
    stored = {digest for kind in (traces.images, traces.shards) for digests in kind.values() for digest in digests}
    known = stored if traces.wanted <= stored else stored | _left(root)
    for image, digests in traces.digests.items():
        others = {md5 for path, md5 in objects.files if path == image} if is_name(image) else set()
        hashes = sorted(map(objects.sha256, others - traces.images.keys() - holders.current))
        if is_name(image) and (collection / image).exists():
            traces.refused[image] = f"still there, in {collection}; {holders.advice}"
        elif why := next((holders.refused[digest] for digest in sorted(digests) if digest in holders.refused), None):
            traces.refused[image] = why
        elif hashes and stored.isdisjoint(digests):
            there_are = f"files of that name have sha256 {', '.join(hashes)}"
            traces.refused[image] = f"in no shard; {there_are}: purge by the one that is meant"
        elif known.isdisjoint(digests):
            nothing = f"nothing, or nothing left, of it in DVC's {' or '.join(objects.stores)}"
            traces.refused[image] = f"{nothing}; a name is the whole path within data.path, as in data/shards"
        else:
            unclear |= set(hashes)
    return ", ".join(sorted(unclear))


def _kinds(objects: Objects, traces: Traces, needed: Collection[str]) -> dict[str, set[str]]:
    """The md5 of the objects that go, by kind."""
    wanted, kinds = traces.wanted, {"latents": traces.latents, "image": traces.images, "shard": traces.shards}
    if not any(map(is_name, traces.digests)):
        kinds["image"] = kinds.pop("image")
    found = {
        name: {md5 for md5, digests in kind.items() if digests & wanted} & objects.places.keys() for name, kind in kinds.items()
    }
    texts = captions(objects, traces.names) | {md5 for md5, digests in traces.captions.items() if digests & wanted}
    return {"caption": (texts & objects.places.keys()) - set(needed)} | found


def _copies(
    root: Path, objects: Objects, kinds: Mapping[str, set[str]], digests: set[str], holders: Holders
) -> pd.DataFrame:  # fmt: skip
    """The files to delete, in their order. Of the latents' store goes what no checkout has in data/latents."""
    unnamed = unnamed_latents(root, [path for path in find_checkouts(root) if path not in holders.stale])
    chosen: dict[str, Callable[[Path], bool]] = {  # not all files of a place
        "download": lambda path: path.suffix == PART or not digests.isdisjoint(images_of(path)),
        "store": unnamed.__contains__,
        "objects": lambda path: False,  # those of `kinds`
    }
    copies = []
    for kind in dict.fromkeys(place.holds for place in PLACES if place.fate == "deleted"):
        for path in filter(chosen.get(kind, lambda path: True), _found(root, kind, Place.files)):
            place = ".ldm" if path.is_relative_to(root / ".ldm") else "data"
            copies.append((kind, place, str(path), path.lstat().st_size))
    for kind, found in kinds.items():
        for place in objects.stores:
            for md5 in sorted(md5 for md5 in found if place in objects.places[md5]):
                copies.append((kind, place, md5, objects.size(md5, place)))
    return pd.DataFrame(copies, columns=["kind", "place", "name", "size"])


def _delete(root: Path, objects: Objects, copies: pd.DataFrame) -> None:
    from dvc_data.hashfile.db import get_index

    for place, name in zip(copies.place, copies.name, strict=True):
        with contextlib.suppress(FileNotFoundError):
            if place in objects.stores:
                objects.stores[place].delete(name)
            else:
                Path(name).unlink()
    for folder in _found(root, LEFTOVER, Place.found):  # folders' names may be captions
        shutil.rmtree(folder, ignore_errors=True)
    if "remote" in objects.stores:  # DVC remembers what it pushed, and would not push it again
        with contextlib.closing(get_index(objects.stores["remote"])) as index:
            index.clear()


def _found(root: Path, kind: str, of: Callable[[Place, Path, PurePosixPath], list[Path]]) -> list[Path]:
    """What there is of the places of a kind."""
    collection = PurePosixPath(os.path.relpath(root / load_settings(root).data.path, root))
    return [path for place in PLACES if place.holds == kind for path in of(place, root, collection)]


def _left(root: Path) -> set[str]:
    """The digests of leftovers, and of images in shards among them."""
    found = set[str]()
    for path in filter(Path.is_file, _found(root, LEFTOVER, Place.files)):
        found |= {file_hash(path)[:DIGEST], *images_of(path)}
    return found


def _versions(root: Path, objects: Objects, traces: Traces, tag: bool) -> pd.DataFrame:
    """Registered versions that saw the images, or started from the weights of one, which get a tag; or where it is unknown."""
    try:
        registered = registry.find({}, load_settings(root).registry.name)
    except registry.Unreachable:
        raise
    except InputError:  # there is no registry yet
        registered = []
    rows, trained, wanted = [], dict[str, set[str]](), traces.wanted  # the second: versions that know images, and which
    for version in reversed(registered):  # the oldest first, from which others may have started
        lock = yaml.safe_load(registry.kept(version, "dvc.lock") or "") or {}
        outs = [out for stage in lock.get("stages", {}).values() for out in stage.get("outs", [])]
        listing = next((objects.listing(out["md5"]) for out in outs if out["path"] == SHARDS), {})
        splits = defaultdict[str, set[str]](set)
        for path, md5 in listing.items():
            if found := traces.shards.get(md5, set()) & wanted:
                splits[path.split("-")[0]] |= found
        origin = next(iter(sorted(_origins(version) & trained.keys())), None)
        purged = set(filter(None, version.tags.get(TAG, "").split(",")))
        known = set[str]().union(*splits.values(), trained.get(origin or "", ()))
        if "train" in splits or origin:
            trained[version.uri] = splits.get("train", set()) | trained.get(origin or "", set())
        if known or purged & wanted:  # the latter by a purge that was killed
            otherwise = "only evaluated on" if splits else "recorded"
            how = "trained on" if "train" in splits else f"started from {origin}" if origin else otherwise
            if tag:
                registry.tag(version, TAG, ",".join(sorted(purged | known)[:TAGGED]))
        elif listing:
            continue
        else:
            how = "unknown"
        rows.append((str(version.version), ", ".join(version.aliases), ", ".join(filter(splits.__contains__, SPLITS)), how))
    return pd.DataFrame(rows[::-1], columns=["version", "aliases", "splits", "seen"])


def _origins(version: registry.Version) -> set[str]:
    """What a version took weights from, as its settings name it, without a hash."""
    params = yaml.safe_load(registry.kept(version, "params.yaml") or "") or {}
    named = (value_at(params, key, None) for key in ("autoencoder.pretrained", "train_unet.init"))
    return {name.partition("@")[0] for name in named if name}
