"""Purge an image that was removed from the collection: old copies in DVC's cache and remote, and all that was made of them.

The key of a shard's sample is sha256(file)[:16] + sha256(file_name)[:8], so a shard tells which images it holds; the manifest of
latents names the sha256 of their shards. Shards are deleted last: they lead to all the rest, also after a purge that was killed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pandas as pd
import yaml

from ldm.base.errors import InputError
from ldm.base.files import content_hash, file_hash, locked
from ldm.base.options import value_at
from ldm.base.paths import INGEST_LOCK, LATENTS, SHARDS, SOURCE
from ldm.collection.leftovers import unnamed_latents
from ldm.collection.places import LEFTOVER, PLACES, Place
from ldm.collection.places import UNTOUCHED as UNTOUCHED
from ldm.config import load_settings
from ldm.data.images import SUFFIXES
from ldm.data.reader import SPLITS
from ldm.data.remote import PART
from ldm.registry import tracking
from ldm.registry import versions as registry
from ldm.versioning.branches import find_checkouts
from ldm.versioning.cache import named_now
from ldm.versioning.repository import held, open_repository

TAG = "ldm.purged"  # of a version: hashes (first 16 digits) of images that it saw and that were purged since
DIGEST = 16  # hexadecimal digits of the file's hash, with which a sample's key of 24 begins


@dataclass(frozen=True)
class Purged:
    """What was found of an image, and deleted unless it was a dry run."""

    names: tuple[str, ...]  # under which its bytes were stored
    digests: tuple[str, ...]  # sha256 of its files, the first 16 digits
    copies: pd.DataFrame  # in the order of deletion: kind, place ("cache", "remote", "data", ".ldm"), name (md5 or path), size
    notes: tuple[str, ...]
    versions: pd.DataFrame  # models that saw it, or may have: version, aliases, splits, seen

    def lines(self) -> list[str]:
        """The report without the versions, for people."""
        title = f"{', '.join(self.names) or 'image'} (sha256 {', '.join(f'{digest}…' for digest in self.digests)})"
        groups = self.copies.groupby(["place", "kind"], sort=False)["size"]
        return [title, *(f"{place:<8}{kind:<10}{len(of):>6} files{sum(of):>16,} bytes" for (place, kind), of in groups)]


class _Objects:
    """The objects of DVC's cache and of a remote by md5; an object that both have is read from the cache."""

    def __init__(self, cache: Any, remote: Any | None) -> None:
        self.stores = {"cache": cache} | ({"remote": remote} if remote is not None else {})
        self.places: dict[str, list[str]] = {}
        for place, store in self.stores.items():
            for md5 in filter(re.compile(r"[0-9a-f]{32}(\.dir)?").fullmatch, set(store.all())):
                self.places.setdefault(md5, []).append(place)
        self.folders = [self.listing(md5) for md5 in self.places if md5.endswith(".dir")]
        self.files = {(path, md5) for folder in self.folders for path, md5 in folder.items() if md5 in self.places}

    def open(self, md5: str) -> Any:
        store = self.stores[self.places[md5][0]]
        return store.fs.open(store.oid_to_path(md5), "rb")

    def sha256(self, md5: str) -> str:
        with self.open(md5) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def matches(self, md5: str, digests: tuple[str, ...]) -> bool:
        """Whether the sha256 of a file, or of a tar's member, begins with one of `digests`."""
        with contextlib.suppress(tarfile.TarError), self.open(md5) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            return any(content_hash(part.read()).startswith(digests) for member in tar if (part := tar.extractfile(member)))
        return self.sha256(md5).startswith(digests)  # it is no tar

    def json(self, md5: str) -> Any:
        """Empty if there is no such object, or it is damaged."""
        try:
            with self.open(md5) as file:
                return json.load(file)
        except (KeyError, ValueError):
            return {}

    def listing(self, md5: str) -> dict[str, str]:
        """The md5 of each file of a folder by its path; empty if the listing is gone."""
        return {entry["relpath"]: entry["md5"] for entry in self.json(md5)}

    def tars(self) -> dict[str, dict[str, str]]:
        """The samples of each tar, none for other files. What only the remote has is opened, by a request, if it may be one."""
        others = {md5 for name, md5 in self.files if not name.endswith(".tar") and "cache" not in self.places[md5]}
        found = {}
        for md5 in self.places.keys() - others:
            with self.open(md5) as file:
                found[md5] = _samples(file)
        return found


def purge(root: Path, image: str, *, remote: str | None = None, dry_run: bool = False) -> Purged:
    """Delete what is left of an image that is no longer in the collection.

    `image` is its `file_name` in the collection, which means all contents that a shard held under that name, or the sha256 of
    its file, which means all its names. `remote` is a DVC remote, else the default one. Model versions that saw the image get
    a tag (`TAG`) first. Raises `InputError` while the image is in the collection or in what the pipeline made of it.
    """
    from dvc.config import NoRemoteError
    from dvc_data.hashfile.db import get_index

    root, store, notes = root.resolve(), None, list[str]()
    tracking.use_default_store(root)
    try:
        with open_repository(root) as repo:
            try:
                store = repo.cloud.get_remote_odb(remote)
            except NoRemoteError:
                if remote:
                    raise
                known = ", ".join(repo.config["remote"])
                notes += [f"no default remote: not looked at are {known}; name one with --remote"] if known else []
            with contextlib.nullcontext() if dry_run else _alone(root, repo):
                objects = _Objects(repo.cache.local, store)
                names, digests, kinds, unclear = _find(root, repo, objects, image)
                versions = _versions(root, objects, kinds["shard"], digests, tag=not dry_run)
                copies = _copies(root, objects, kinds, digests)
                for place, name in () if dry_run else zip(copies.place, copies.name, strict=True):
                    with contextlib.suppress(FileNotFoundError):
                        if place in objects.stores:
                            objects.stores[place].delete(name)
                        else:
                            Path(name).unlink()
                for folder in () if dry_run else _found(root, LEFTOVER, Place.found):  # folders' names may be captions
                    shutil.rmtree(folder, ignore_errors=True)
                if store is not None and not dry_run:  # DVC remembers what it pushed, and would not push it again
                    with contextlib.closing(get_index(store)) as index:
                        index.clear()
    except OSError as error:
        raise InputError(f"{image}: {error}; mend that and purge again") from None
    notes += [f"not purged: files of that name that no shard holds, with sha256 {unclear}"] * bool(unclear)
    return Purged(tuple(sorted(names)), tuple(sorted(digests)), copies, tuple(notes), versions)


@contextlib.contextmanager
def _alone(root: Path, repo: Any) -> Iterator[None]:
    """While no stage and no ingest works here or in a worktree, all of which share the latents' store."""
    ingest = root / INGEST_LOCK
    with contextlib.ExitStack() as stack:
        if ingest.exists():
            stack.enter_context(locked(ingest))
        for checkout in find_checkouts(root):
            other = repo if checkout == root else stack.enter_context(open_repository(checkout))
            stack.enter_context(held(other, *(checkout / path for path in (SOURCE, SHARDS, LATENTS))))
        yield


def _find(root: Path, repo: Any, objects: _Objects, image: str) -> tuple[set[str], set[str], dict[str, set[str]], str]:
    """Names and digests of the image, the md5 of its objects by kind, and the sha256 of other files of its name."""
    by_name = not re.fullmatch("[0-9a-f]{64}", image)
    collection = load_settings(root).data.path
    again = f"delete it from {collection} (with `dvc add`, if DVC versions that), run the pipeline (`ldm run`), then purge"
    if by_name and (root / collection / image).exists():
        raise InputError(f"{root / collection / image}: still there; {again}")
    samples = [(md5, key[:DIGEST], name) for md5, found in objects.tars().items() for key, name in found.items()]
    digests = {digest for _, digest, name in samples if name == image} if by_name else {image[:DIGEST]}
    shards = {md5 for md5, digest, _ in samples if digest in digests}
    names = {name for _, digest, name in samples if digest in digests}
    # Equal files have one md5, so one name leads to all copies; if no name is known, every image is hashed.
    paths = names | {name[: name.index(".tar/") + 4] for name in names if ".tar/" in name}
    named = {md5 for path, md5 in objects.files if any(path == name or path.endswith(f"/{name}") for name in paths)}
    if digests and not names:
        named = {md5 for path, md5 in objects.files if Path(path).suffix.lower() in SUFFIXES}
    originals = {md5 for md5 in named if objects.matches(md5, tuple(digests) if by_name else (image,))}
    hashes, latents = {objects.sha256(md5) for md5 in shards}, set()
    for folder in objects.folders:  # of every autoencoder
        for file in objects.json(folder.get("manifest.json", "")).get("files", []):
            if file.get("shard_sha256") in hashes:
                latents.add(folder[file["name"]])

    current: dict[str, str] = {}  # what dvc.lock and the .dvc files name now: md5 -> path in the project
    for out in repo.index.outs:
        md5, path = out.hash_info.value if out.hash_info else "", out.fs_path.removeprefix(f"{root}/")
        files = objects.listing(md5) if md5.endswith(".dir") else {"": md5}
        current |= {file: f"{path}/{name}".rstrip("/") for name, file in files.items()}
    present = [current[md5] for md5 in (*originals, *shards, *latents) if md5 in current]
    present += [str(path) for path in (root / SHARDS).glob("*.tar") if _holds(path, digests)]
    if present:
        raise InputError(f"{image}: still in {present[0]}; {again}")
    for worktree in find_checkouts(root)[1:]:
        inside = {
            file
            for md5 in named_now([worktree])
            for file in (md5, *(objects.listing(md5) if md5.endswith(".dir") else {}).values())
        }
        if inside & {*originals, *shards, *latents}:
            follow = f"its next scheduled run takes it out, or `git worktree remove --force {worktree}`"
            raise InputError(f"{image}: still in what {worktree} names; {follow}")
    others = {md5 for path, md5 in objects.files if path == image} - originals if by_name else set()
    unclear = ", ".join(sorted(map(objects.sha256, others - current.keys())))
    if unclear and not (shards or originals):
        raise InputError(f"{image}: in no shard; files of that name have sha256 {unclear}: purge by the one that is meant")
    if not (shards or originals or any(_is_left(path, digests) for path in _found(root, LEFTOVER, Place.files))):
        nothing = f"nothing, or nothing left, of it in DVC's {' or '.join(objects.stores)}"
        raise InputError(f"{image}: {nothing}; a name is the whole path within data.path, as in data/shards")
    captions = {md5 for path, md5 in objects.files if _is_beside(path, names)} - current.keys()
    found = {"latents": latents & objects.places.keys(), "caption": captions, "image": originals, "shard": shards}
    return names, digests, found, unclear


def _copies(root: Path, objects: _Objects, kinds: dict[str, set[str]], digests: set[str]) -> pd.DataFrame:
    """The files to delete in their order, shards last. Of the latents' store goes what no checkout has in data/latents."""
    unnamed = unnamed_latents(root, find_checkouts(root))
    chosen: dict[str, Callable[[Path], bool]] = {  # not all files of a place
        "download": lambda path: path.suffix == PART or _holds(path, digests),
        "store": unnamed.__contains__,
        "objects": lambda path: False,  # those of `kinds`
    }
    copies = []
    for kind in dict.fromkeys(place.holds for place in PLACES if place.fate == "deleted"):
        for path in filter(chosen.get(kind, lambda path: True), _found(root, kind, Place.files)):
            place = ".ldm" if path.is_relative_to(root / ".ldm") else "data"
            copies.append((kind, place, str(path), path.lstat().st_size))
    for kind, found in kinds.items():
        for name, store in objects.stores.items():
            for md5 in sorted(md5 for md5 in found if name in objects.places[md5]):
                copies.append((kind, name, md5, store.fs.info(store.oid_to_path(md5))["size"]))
    return pd.DataFrame(copies, columns=["kind", "place", "name", "size"])


def _found(root: Path, kind: str, of: Callable[[Place, Path, PurePosixPath], list[Path]]) -> list[Path]:
    """What there is of the places of a kind."""
    collection = PurePosixPath(os.path.relpath(root / load_settings(root).data.path, root))
    return [path for place in PLACES if place.holds == kind for path in of(place, root, collection)]


def _is_left(path: Path, digests: set[str]) -> bool:
    """Whether a leftover is the image, or a shard that holds it."""
    return path.is_file() and (_holds(path, digests) or file_hash(path)[:DIGEST] in digests)


def _is_beside(path: str, names: set[str]) -> bool:
    """Whether a file's name is that of an image but for the suffix: its caption, in a file of its own."""
    stem, _, suffix = path.rpartition(".")
    stems = {name.rpartition(".")[0] for name in names}
    return f".{suffix.lower()}" not in SUFFIXES and any(stem == one or stem.endswith(f"/{one}") for one in stems)


def _holds(path: Path, digests: set[str]) -> bool:
    with path.open("rb") as file:
        return any(key[:DIGEST] in digests for key in _samples(file))


def _samples(file: IO[bytes]) -> dict[str, str]:
    """The key of each sample of a tar and its `file_name`, empty if its JSON has none. A damaged tar ends where the damage is."""
    found = {}
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, _, part = member.name.partition(".")
            if part == "json" and re.fullmatch("[0-9a-f]{24}", key):
                found[key] = ""
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    found[key] = json.loads(tar.extractfile(member).read())["file_name"]  # type: ignore[union-attr]
    return found


def _versions(root: Path, objects: _Objects, shards: set[str], digests: set[str], tag: bool) -> pd.DataFrame:
    """Registered versions that saw the image, or started from the weights of one, which get a tag; or where it is unknown."""
    try:
        registered = registry.find({}, load_settings(root).registry.name)
    except registry.Unreachable:
        raise
    except InputError:  # there is no registry yet
        registered = []
    rows, trained = [], set[str]()
    for version in reversed(registered):  # the oldest first, from which others may have started
        lock = yaml.safe_load(registry.kept(version, "dvc.lock") or "") or {}
        outs = [out for stage in lock.get("stages", {}).values() for out in stage.get("outs", [])]
        listing = next((objects.listing(out["md5"]) for out in outs if out["path"] == SHARDS), {})
        seen = {path.split("-")[0] for path, md5 in listing.items() if md5 in shards}
        purged = set(filter(None, version.tags.get(TAG, "").split(",")))
        origin = next(iter(sorted(_origins(version) & trained)), None)
        if "train" in seen or origin:
            trained.add(version.uri)
        if seen or origin or purged & digests:  # the latter by a purge that was killed
            otherwise = "only evaluated on" if seen else "recorded"
            how = "trained on" if "train" in seen else f"started from {origin}" if origin else otherwise
            if tag:
                registry.tag(version, TAG, ",".join(sorted(purged | digests)))
        elif listing:
            continue
        else:
            how = "unknown"
        rows.append((str(version.version), ", ".join(version.aliases), ", ".join(filter(seen.__contains__, SPLITS)), how))
    return pd.DataFrame(rows[::-1], columns=["version", "aliases", "splits", "seen"])


def _origins(version: registry.Version) -> set[str]:
    """What a version took weights from, as its settings name it, without a hash."""
    params = yaml.safe_load(registry.kept(version, "params.yaml") or "") or {}
    named = (value_at(params, key, None) for key in ("autoencoder.pretrained", "train_unet.init"))
    return {name.partition("@")[0] for name in named if name}
