"""Purge an image that was removed from the collection: old copies in DVC's cache and remote, and all that was made of them.

Everything is found by content. The key of a shard's sample is sha256(file)[:16] + sha256(file_name)[:8], so the names in a tar
tell which images it holds; the manifest of latents names the sha256 of each file's shard; an original is known by its
hash. Shards are deleted last, since they lead to all the rest: the same call finishes a purge that was killed.
"""

import contextlib
import hashlib
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pandas as pd
import yaml

from ldm.base.errors import InputError
from ldm.base.hashing import file_hash
from ldm.base.paths import LATENT_STORE, LATENTS, SHARD_CACHE, SHARDS
from ldm.config import load_settings
from ldm.data.images import SUFFIXES
from ldm.data.reader import SPLITS
from ldm.registry import tracking
from ldm.registry import versions as registry
from ldm.versioning.repository import held, open_repository

TAG = "ldm.purged"  # of a version: hashes (first 16 digits) of images that it saw and that were purged since
DIGEST = 16  # hexadecimal digits of the file's hash, with which a sample's key of 24 begins
KINDS = ("leftover", "download", "store", "latents", "image", "shard")  # in the order of their deletion
UNTOUCHED = "trained weights, reports and sample pictures; file names in git's history and DVC's listings"


@dataclass(frozen=True)
class Copy:
    """A file that holds the image or something made of it."""

    kind: str  # one of KINDS
    place: str  # "cache", "remote", "data" or ".ldm"
    name: str  # the object's md5, or a path
    size: int  # bytes


@dataclass(frozen=True)
class Purged:
    """What was found of an image, and deleted unless it was a dry run."""

    names: tuple[str, ...]  # under which its bytes were stored
    digests: tuple[str, ...]  # sha256 of its files, the first 16 digits
    shards: frozenset[str]  # md5 of tars that held it
    copies: tuple[Copy, ...]
    notes: tuple[str, ...]
    versions: pd.DataFrame  # models that saw it, or may have: version, aliases, splits, seen

    def lines(self) -> list[str]:
        """The report without the versions, for people."""
        sizes: dict[tuple[str, str], list[int]] = defaultdict(list)
        for copy in self.copies:
            sizes[copy.place, copy.kind].append(copy.size)
        title = f"{', '.join(self.names) or 'image'} (sha256 {', '.join(f'{digest}…' for digest in self.digests)})"
        return [title, *(f"{place:<8}{kind:<10}{len(of):>6} files{sum(of):>16,} bytes" for (place, kind), of in sizes.items())]


class _Objects:
    """The objects of DVC's cache and of a remote by md5; an object that both have is read from the cache."""

    def __init__(self, cache: Any, remote: Any | None) -> None:
        self.stores = {"cache": cache} | ({} if remote is None else {"remote": remote})
        self.places: dict[str, list[str]] = {}
        for place, store in self.stores.items():
            for md5 in set(store.all()):
                if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", md5):
                    self.places.setdefault(md5, []).append(place)
        folders = [self.listing(md5) or {} for md5 in self.places if md5.endswith(".dir")]
        self.files = {(path, md5) for folder in folders for path, md5 in folder.items() if md5 in self.places}
        self.latents = [folder for folder in folders if "manifest.json" in folder]

    @contextlib.contextmanager
    def open(self, md5: str) -> Iterator[IO[bytes]]:
        store = self.stores[self.places[md5][0]]
        with store.fs.open(store.oid_to_path(md5), "rb") as file:
            yield file

    def copies(self, kind: str, md5: str) -> Iterator[Copy]:
        for place in self.places[md5]:
            store = self.stores[place]
            yield Copy(kind, place, md5, store.fs.info(store.oid_to_path(md5))["size"])

    def sha256(self, md5: str) -> str:
        with self.open(md5) as file:
            return _sha256(file)

    def matches(self, md5: str, digests: tuple[str, ...]) -> bool:
        """Whether the sha256 of a file, or of a tar's member, begins with one of `digests`."""
        if not self.is_tar(md5):
            return self.sha256(md5).startswith(digests)
        with self.open(md5) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            return any(_sha256(part).startswith(digests) for member in tar if (part := tar.extractfile(member)))

    def json(self, md5: str) -> Any:
        """None if there is no such object, or it is damaged."""
        try:
            with self.open(md5) as file:
                return json.loads(file.read())
        except (KeyError, ValueError):
            return None

    def listing(self, md5: str) -> dict[str, str] | None:
        """The md5 of each file of a folder by its path; None if the listing is gone."""
        entries = self.json(md5)
        return None if entries is None else {entry["relpath"]: entry["md5"] for entry in entries}

    def tars(self) -> dict[str, dict[str, str]]:
        """The samples of each tar. An object that only the remote has is opened, by a request, if it may be a tar."""
        only_remote = {md5 for md5, places in self.places.items() if "cache" not in places}
        others = {md5 for name, md5 in self.files if not name.endswith(".tar")} if only_remote else set()
        found = {}
        for md5 in self.places.keys() - (only_remote & others):
            if not md5.endswith(".dir") and self.is_tar(md5):
                with self.open(md5) as file:
                    found[md5] = _samples(file, seekable="cache" in self.places[md5])
        return found

    def is_tar(self, md5: str) -> bool:
        with self.open(md5) as file:
            return file.read(262)[257:] == b"ustar"


def purge(root: Path, image: str, *, remote: str | None = None, dry_run: bool = False) -> Purged:
    """Delete what is left of an image that is no longer in the collection.

    `image` is its `file_name` in the collection, which means all contents that a shard held under that name, or the sha256 of
    its file, which means all its names. `remote` is a DVC remote, else the default one. Model versions that saw the image get
    a tag (`TAG`) first. Latents and shards that held it are deleted with the other images in them, which have newer copies.

    Raises `InputError` while the image is in the collection or in what the pipeline made of it, and if nothing is left of it.
    """
    root = root.resolve()
    tracking.use_default_store(root)
    try:
        with open_repository(root) as repo:
            store, notes = _remote(repo, remote)
            with contextlib.nullcontext() if dry_run else held(repo, root / SHARDS, root / LATENTS):
                objects = _Objects(repo.cache.local, store)
                found = _find(root, repo, objects, image)
                versions = _versions(root, objects, found)
                if not dry_run:
                    for version, row in versions:
                        if row["seen"] != "unknown":
                            registry.tag(version, TAG, ",".join(sorted({*_purged_before(version), *found.digests})))
                    _delete(objects, found.copies)
    except OSError as error:
        raise InputError(f"{image}: {error}; mend that and purge again") from None
    table = pd.DataFrame([row for _, row in versions], columns=["version", "aliases", "splits", "seen"])
    return replace(found, versions=table, notes=(*notes, *found.notes))


def _remote(repo: Any, name: str | None) -> tuple[Any | None, list[str]]:
    """The objects of a remote, or a note that no remote is searched."""
    from dvc.config import NoRemoteError

    try:
        return repo.cloud.get_remote_odb(name), []
    except NoRemoteError:
        if name:
            raise
        known = ", ".join(repo.config["remote"])
        return None, [f"no default remote: not looked at are {known}; name one with --remote"] if known else []


def _find(root: Path, repo: Any, objects: _Objects, image: str) -> Purged:
    by_name = not re.fullmatch("[0-9a-f]{64}", image)
    collection = load_settings(root).data.path
    again = f"delete it from {collection} (with `dvc add`, if DVC versions that), run the pipeline (`ldm run`), then purge"
    if by_name and (root / collection / image).exists():
        raise InputError(f"{root / collection / image}: still there; {again}")
    samples = [(md5, key[:DIGEST], name) for md5, found in objects.tars().items() for key, name in found.items()]
    digests = {digest for _, digest, name in samples if name == image} if by_name else {image[:DIGEST]}
    shards = {md5 for md5, digest, _ in samples if digest in digests}
    names = {name for _, digest, name in samples if digest in digests}
    originals = _originals(objects, names, digests if by_name else {image})
    latents = _latents(objects, {objects.sha256(md5) for md5 in shards})
    others = {md5 for path, md5 in objects.files if path == image} - originals if by_name else set()

    current = _current(root, repo, objects, {*originals, *shards, *latents, *others})
    present = [current[md5] for md5 in (*originals, *shards, *latents) if md5 in current]
    present += [str(path) for path in (root / SHARDS).glob("*.tar") if _holds(path, digests)]
    if present:
        raise InputError(f"{image}: still in {present[0]}; {again}")
    unclear = ", ".join(sorted(map(objects.sha256, others - current.keys())))
    if not (shards or originals):
        if unclear:
            raise InputError(f"{image}: in no shard; files of that name have sha256 {unclear}: purge by the one that is meant")
        nothing = f"nothing, or nothing left, of it in DVC's {' or '.join(objects.stores)}"
        raise InputError(f"{image}: {nothing}; a name is the whole path within data.path, as in data/shards")
    by_kind = {"latents": latents, "image": originals, "shard": shards}
    copies = [copy for kind, found in by_kind.items() for md5 in sorted(found) for copy in objects.copies(kind, md5)]
    copies = sorted([*copies, *_local_files(root, digests)], key=lambda copy: (KINDS.index(copy.kind), copy.place))
    notes = (f"not purged: files of that name that no shard holds, with sha256 {unclear}",) if unclear else ()
    return Purged(tuple(sorted(names)), tuple(sorted(digests)), frozenset(shards), tuple(copies), notes, pd.DataFrame())


def _originals(objects: _Objects, names: set[str], digests: set[str]) -> set[str]:
    """md5 of files whose sha256 begins with one of `digests`, and of tars with such a member.

    Equal files have one md5, so one name leads to all copies; if no name is known, every image is hashed.
    """
    paths = names | {name[: name.index(".tar/") + 4] for name in names if ".tar/" in name}
    named = {md5 for path, md5 in objects.files if any(path == name or path.endswith(f"/{name}") for name in paths)}
    if digests and not names:
        named = {md5 for path, md5 in objects.files if Path(path).suffix.lower() in SUFFIXES}
    return {md5 for md5 in named if objects.matches(md5, tuple(digests))}


def _latents(objects: _Objects, shards: set[str]) -> set[str]:
    """md5 of the latents of these shards (sha256), of every autoencoder that encoded them."""
    found = set()
    for folder in objects.latents:
        manifest = objects.json(folder["manifest.json"]) or {}
        found |= {folder[file["name"]] for file in manifest.get("files", []) if file.get("shard_sha256") in shards}
    return found & objects.places.keys()


def _current(root: Path, repo: Any, objects: _Objects, wanted: set[str]) -> dict[str, str]:
    """The wanted objects to which dvc.lock and the .dvc files refer now: md5 -> path in the project."""
    found: dict[str, str] = {}
    for out in repo.index.outs:
        md5, path = out.hash_info.value if out.hash_info else "", out.fs_path.removeprefix(f"{root}/")
        files = objects.listing(md5) or {} if md5.endswith(".dir") else {"": md5}
        found |= {file: f"{path}/{name}".rstrip("/") for name, file in files.items() if file in wanted}
    return found


def _local_files(root: Path, digests: set[str]) -> Iterator[Copy]:
    """Downloads that hold the image, leftovers of killed stages, and files of the latents' store that are not in data/latents.

    The store only saves work, and after a kill nothing may name a file in it any more.
    """
    downloads, store, latents = root / SHARD_CACHE, root / LATENT_STORE, root / LATENTS
    for path in sorted(downloads.glob("*")):
        if path.is_file() and _holds(path, digests):
            yield Copy("download", ".ldm", str(path), path.stat().st_size)
    for path in sorted(left for suffix in ("partial", "replaced") for left in (root / "data").glob(f"*.{suffix}/*")):
        yield Copy("leftover", "data", str(path), path.stat().st_size)
    linked = {file_hash(path) for path in latents.glob("*.safetensors")}
    for path in sorted(store.glob("*")):
        if path.stem.rpartition("-")[2] not in linked:  # KEY-SHA256.safetensors
            yield Copy("store", ".ldm", str(path), path.stat().st_size)


def _holds(path: Path, digests: set[str]) -> bool:
    with path.open("rb") as file:
        return any(key[:DIGEST] in digests for key in _samples(file, seekable=True))


def _samples(file: IO[bytes], seekable: bool) -> dict[str, str]:
    """The key of each sample of a tar and its `file_name`, empty if its JSON has none. A damaged tar ends where the damage is."""
    found = {}
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:" if seekable else "r|") as tar:
        for member in tar:
            key, _, part = member.name.partition(".")
            if part == "json" and re.fullmatch("[0-9a-f]{24}", key):
                found[key] = ""
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    found[key] = json.loads(tar.extractfile(member).read())["file_name"]  # type: ignore[union-attr]
    return found


def _sha256(file: IO[bytes]) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _versions(root: Path, objects: _Objects, found: Purged) -> list[tuple[registry.Version, dict[str, str]]]:
    """Registered versions that saw the image, or of which that is unknown, each with its row of the table."""
    try:
        registered = registry.find({}, load_settings(root).registry.name)
    except registry.Unreachable:
        raise
    except InputError:  # there is no registry yet
        registered = []
    rows = []
    for version in registered:
        lock = yaml.safe_load(registry.kept(version, "dvc.lock") or "") or {}
        outs = [out for stage in lock.get("stages", {}).values() for out in stage.get("outs", [])]
        listing = next((objects.listing(out["md5"]) for out in outs if out["path"] == SHARDS), None)
        seen = {path.split("-")[0] for path, md5 in (listing or {}).items() if md5 in found.shards}
        recorded = _purged_before(version) & set(found.digests)  # by a purge that was killed
        if seen or recorded or listing is None:
            how = "trained on" if "train" in seen else "only evaluated on" if seen else "recorded" if recorded else "unknown"
            splits = ", ".join(split for split in SPLITS if split in seen)
            row = {"version": str(version.version), "aliases": ", ".join(version.aliases), "splits": splits, "seen": how}
            rows.append((version, row))
    return rows


def _purged_before(version: registry.Version) -> set[str]:
    return set(filter(None, version.tags.get(TAG, "").split(",")))


def _delete(objects: _Objects, copies: tuple[Copy, ...]) -> None:
    from dvc_data.hashfile.db import get_index

    for copy in copies:
        with contextlib.suppress(FileNotFoundError):
            if copy.place in (".ldm", "data"):
                Path(copy.name).unlink()
            else:
                objects.stores[copy.place].delete(copy.name)
    if "remote" in objects.stores:  # DVC remembers what it pushed, and would not push it again
        with contextlib.closing(get_index(objects.stores["remote"])) as index:
            index.clear()
