"""Purge an image that was removed from the collection: its old copies in DVC's cache and remote, and what was made of them.

Everything is found by content. A shard's sample has the key sha256(file)[:16] + sha256(file_name)[:8], so the headers of
a tar say which images it holds; a latents file's manifest names the sha256 of its shard; an original is known by its hash.
Shards go last, because they lead to all the rest: a purge that was killed is finished by the same call.
"""

import contextlib
import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pandas as pd
import yaml

from ldm.base.errors import InputError
from ldm.base.hashing import content_hash, file_hash
from ldm.base.paths import LATENT_STORE, LATENTS, SHARD_CACHE, SHARDS
from ldm.config import load_settings
from ldm.data.images import SUFFIXES
from ldm.data.reader import SPLITS
from ldm.registry import tracking
from ldm.registry import versions as registry
from ldm.versioning.repository import held, open_repository

TAG = "ldm.purged"  # of a version: hashes (first 16 digits) of images that it saw and that were purged since
DIGEST, NAME = 16, 8  # hexadecimal digits in a sample's key: of the file's hash, of its name's
KINDS = ("leftover", "download", "store", "latents", "image", "shard")  # in the order of their deletion
UNTOUCHED = "trained weights, reports and sample pictures; file names in git's history and DVC's listings"

Entry = tuple[str, str]  # of a folder that DVC versions: relative path, md5


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
    copies: tuple[Copy, ...]
    versions: pd.DataFrame  # models that saw it, or of which that is unknown: version, aliases, splits, seen
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """The report without the versions, for people."""
        count, size = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        for copy in self.copies:
            count[copy.place, copy.kind] += 1
            size[copy.place, copy.kind] += copy.size
        title = f"{', '.join(self.names) or 'image'} (sha256 {', '.join(f'{digest}…' for digest in self.digests)})"
        return [title, *(f"{place:<8}{kind:<10}{n:>6} files{size[place, kind]:>16,} bytes" for (place, kind), n in count.items())]


class _Objects:
    """The objects of DVC's cache and of a remote by md5, read from wherever they are, the cache first."""

    def __init__(self, cache: Any, remote: Any | None) -> None:
        self.stores = {"cache": cache} | ({} if remote is None else {"remote": remote})
        self.places: dict[str, list[str]] = {}
        for place, store in self.stores.items():
            for md5 in set(store.all()):
                if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", md5):
                    self.places.setdefault(md5, []).append(place)
        self.files: set[Entry] = set()  # of all folders, in all their versions
        self.latents: list[dict[str, str]] = []  # folders with a manifest.json: md5 by relative path
        for md5 in self.places:
            listing = self.listing(md5) or [] if md5.endswith(".dir") else []
            self.files.update(listing)
            if any(path == "manifest.json" for path, _ in listing):
                self.latents.append(dict(listing))

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

    def json(self, md5: str) -> Any:
        """None where there is no such object, or it is damaged."""
        try:
            with self.open(md5) as file:
                return json.loads(file.read())
        except (KeyError, ValueError):
            return None

    def listing(self, md5: str) -> list[Entry] | None:
        """The files of a folder; None where its listing is gone."""
        entries = self.json(md5)
        return None if entries is None else [(entry["relpath"], entry["md5"]) for entry in entries]

    def tars(self) -> dict[str, set[str]]:
        """Every tar with the keys of its samples. On the remote only what may be one is looked at: opening takes a request."""
        only_remote = [md5 for md5, places in self.places.items() if "cache" not in places]
        other: set[str] = set()
        if only_remote:
            other = {md5 for name, md5 in self.files if not name.endswith(".tar")}
        found = {}
        for md5 in self.places.keys() - {md5 for md5 in only_remote if md5 in other}:
            if not md5.endswith(".dir") and self.is_tar(md5):
                found[md5] = {key for key, _ in self.samples(md5)}
        return found

    def is_tar(self, md5: str) -> bool:
        with self.open(md5) as file:
            return file.read(262)[257:] == b"ustar"

    def samples(self, md5: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
        """Key of each sample, and how to read its JSON."""
        with self.open(md5) as file:
            yield from _samples(file, seekable="cache" in self.places[md5])


def purge(root: Path, image: str, *, remote: str | None = None, dry_run: bool = False) -> Purged:
    """Delete what is left of an image that the collection no longer has.

    `image` is its `file_name` in the collection, then all contents that a shard held under that name are meant, or the sha256
    of its file, whatever its names. `remote` is a DVC remote, the default one otherwise. Model versions that saw it are tagged
    first (`TAG`). A latents file and a shard hold other images too: those of the current collection have newer copies.

    Raises `InputError` while the image is part of the collection or of what the pipeline made, and where nothing is left of it.
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
                            _record(version, found.digests)
                    _delete(objects, found.copies)
    except OSError as error:
        raise InputError(f"{image}: {error}; mend that and purge again") from None
    table = pd.DataFrame([row for _, row in versions], columns=["version", "aliases", "splits", "seen"])
    return Purged(found.names, found.digests, found.copies, table, (*notes, *found.notes))


def _remote(repo: Any, name: str | None) -> tuple[Any | None, list[str]]:
    """The objects of a remote, or a note that none is looked at."""
    from dvc.config import NoRemoteError

    try:
        return repo.cloud.get_remote_odb(name), []
    except NoRemoteError:
        if name:
            raise
        known = ", ".join(repo.config["remote"])
        return None, [f"no default remote: not looked at are {known}; name one with --remote"] if known else []


@dataclass(frozen=True)
class _Found:
    names: tuple[str, ...]
    digests: tuple[str, ...]
    shards: frozenset[str]  # md5 of tars
    copies: tuple[Copy, ...]
    notes: tuple[str, ...]


def _find(root: Path, repo: Any, objects: _Objects, image: str) -> _Found:
    by_name = not re.fullmatch("[0-9a-f]{64}", image)
    collection = load_settings(root).data.path
    again = f"delete it from {collection} (with `dvc add`, if DVC versions that), run the pipeline (`ldm run`), then purge"
    if by_name and (root / collection / image).exists():
        raise InputError(f"{root / collection / image}: still there; {again}")
    tars = objects.tars()
    digests = _digests_of_name(objects, tars, image) if by_name else {image[:DIGEST]}
    shards = {md5 for md5, keys in tars.items() if any(key[:DIGEST] in digests for key in keys)}
    names = {name for md5 in shards for key, name in _names(objects, md5, lambda key: key[:DIGEST] in digests)}
    originals = _originals(objects, names, digests if by_name else {image})
    latents = _latents(objects, {objects.sha256(md5) for md5 in shards})
    others = _files_of_name(objects, image) - originals if by_name else set()

    current = _current(root, repo, objects, {*originals, *shards, *latents, *others})
    present = [current[md5] for md5 in (*originals, *shards, *latents) if md5 in current]
    present += [str(path) for path in (root / SHARDS).glob("*.tar") if _holds(path, digests)]
    if present:
        raise InputError(f"{image}: still in {present[0]}; {again}")
    unclear = ", ".join(sorted(map(objects.sha256, others - current.keys())))
    if not (shards or originals):
        if unclear:
            raise InputError(f"{image}: in no shard; files of that name have sha256 {unclear}: purge by the one that is meant")
        raise InputError(
            f"{image}: nothing, or nothing left, of it in DVC's {' or '.join(objects.stores)}; if it was not purged before: "
            "its name is the whole path within data.path, as in data/shards"
        )
    by_kind = {"latents": latents, "image": originals, "shard": shards}
    copies = [copy for kind, found in by_kind.items() for md5 in sorted(found) for copy in objects.copies(kind, md5)]
    copies += _own_files(root, digests)
    notes = [f"not purged: files of that name that no shard holds, with sha256 {unclear}"] if unclear else []
    order = sorted(copies, key=lambda copy: (KINDS.index(copy.kind), copy.place))
    return _Found(tuple(sorted(names)), tuple(sorted(digests)), frozenset(shards), tuple(order), tuple(notes))


def _digests_of_name(objects: _Objects, tars: dict[str, set[str]], name: str) -> set[str]:
    """Of all contents that a shard holds under this name."""
    of_name = content_hash(name.encode())[:NAME]
    candidates = [md5 for md5, keys in tars.items() if any(key.endswith(of_name) for key in keys)]
    found = (sample for md5 in candidates for sample in _names(objects, md5, lambda key: key.endswith(of_name)))
    return {key[:DIGEST] for key, its_name in found if its_name == name}


def _names(objects: _Objects, md5: str, wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
    """Key and `file_name` of a tar's wanted samples."""
    return [(key, json.loads(read())["file_name"]) for key, read in objects.samples(md5) if wanted(key)]


def _files_of_name(objects: _Objects, name: str) -> set[str]:
    """md5 of every file that a folder holds under exactly this name."""
    return {md5 for path, md5 in objects.files if path == name and md5 in objects.places}


def _originals(objects: _Objects, names: set[str], digests: set[str]) -> set[str]:
    """md5 of files with one of the `digests`, and of tars with such a member.

    Equal bytes have one md5, so that one name leads to all copies; where no name is known, every image is hashed.
    """
    paths = names | {name[: name.index(".tar/") + 4] for name in names if ".tar/" in name}
    files = [(path, md5) for path, md5 in objects.files if md5 in objects.places]
    named = {md5 for path, md5 in files if any(path == name or path.endswith(f"/{name}") for name in paths)}
    found = {md5 for md5 in named if _matches(objects, md5, digests)}
    if not found and not names:
        images = {md5 for path, md5 in files if Path(path).suffix.lower() in SUFFIXES}
        found = {md5 for md5 in images if _matches(objects, md5, digests)}
    return found


def _matches(objects: _Objects, md5: str, digests: set[str]) -> bool:
    starts = tuple(digests)
    if not starts:
        return False
    if objects.is_tar(md5):
        with objects.open(md5) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            return any(_sha256(part).startswith(starts) for member in tar if (part := tar.extractfile(member)))
    return objects.sha256(md5).startswith(starts)


def _latents(objects: _Objects, shards: set[str]) -> set[str]:
    """md5 of the latents of these shards (sha256), of every autoencoder that encoded them."""
    found = set()
    for folder in objects.latents:
        manifest = objects.json(folder["manifest.json"]) or {}
        found |= {folder[file["name"]] for file in manifest.get("files", []) if file.get("shard_sha256") in shards}
    return found & objects.places.keys()


def _current(root: Path, repo: Any, objects: _Objects, wanted: set[str]) -> dict[str, str]:
    """Those of the `wanted` objects to which dvc.lock and the .dvc files refer now: md5 -> path in the project."""
    found: dict[str, str] = {}
    for out in repo.index.outs:
        md5, path = out.hash_info.value if out.hash_info else None, out.fs_path.removeprefix(f"{root}/")
        files = objects.listing(md5) or [] if md5 and md5.endswith(".dir") else [("", md5)]
        found |= {its_md5: f"{path}/{name}".rstrip("/") for name, its_md5 in files if its_md5 in wanted}
    return found


def _own_files(root: Path, digests: set[str]) -> Iterator[Copy]:
    """What killed stages left half-done, downloads that hold the image, files of the latents' store that are not in data/latents.

    The store is only there to save work; a kill may have left a file of a shard in it that nothing names any more.
    """
    downloads, store, latents = root / SHARD_CACHE, root / LATENT_STORE, root / LATENTS
    for path in sorted(downloads.iterdir()) if downloads.is_dir() else []:
        if path.is_file() and _holds(path, digests):
            yield Copy("download", ".ldm", str(path), path.stat().st_size)
    for path in sorted(left for suffix in ("partial", "replaced") for left in (root / "data").glob(f"*.{suffix}/*")):
        yield Copy("leftover", "data", str(path), path.stat().st_size)
    linked = {file_hash(path) for path in latents.glob("*.safetensors")}
    for path in sorted(store.iterdir()) if store.is_dir() else []:
        if path.stem.rpartition("-")[2] not in linked:  # KEY-SHA256.safetensors
            yield Copy("store", ".ldm", str(path), path.stat().st_size)


def _holds(path: Path, digests: set[str]) -> bool:
    with path.open("rb") as file:
        return any(key[:DIGEST] in digests for key, _ in _samples(file, seekable=True))


def _samples(file: IO[bytes], seekable: bool) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Of a tar: key of each sample, and how to read its JSON. A damaged tar ends where the damage is."""
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:" if seekable else "r|") as tar:
        for member in tar:
            key, _, part = member.name.partition(".")
            if part == "json" and re.fullmatch(f"[0-9a-f]{{{DIGEST + NAME}}}", key):
                yield key, lambda member=member: tar.extractfile(member).read()  # type: ignore[misc, union-attr]


def _sha256(file: IO[bytes]) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _versions(root: Path, objects: _Objects, found: _Found) -> list[tuple[registry.Version, dict[str, str]]]:
    """Registered versions that saw the image, or of which that is unknown, with their rows of the table."""
    rows = []
    for version in _registered(root):
        lock = yaml.safe_load(registry.kept(version, "dvc.lock") or "") or {}
        outs = [out for stage in lock.get("stages", {}).values() for out in stage.get("outs", [])]
        listing = next((objects.listing(out["md5"]) for out in outs if out["path"] == SHARDS), None)
        seen = {path.split("-")[0] for path, md5 in listing or [] if md5 in found.shards}
        recorded = set(version.tags.get(TAG, "").split(",")) & set(found.digests)  # by a purge that was killed
        if seen or recorded or listing is None:
            how = "trained on" if "train" in seen else "only evaluated on" if seen else "recorded" if recorded else "unknown"
            splits = ", ".join(split for split in SPLITS if split in seen)
            row = {"version": str(version.version), "aliases": ", ".join(version.aliases), "splits": splits, "seen": how}
            rows.append((version, row))
    return rows


def _registered(root: Path) -> list[registry.Version]:
    try:
        return registry.find({}, load_settings(root).registry.name)
    except registry.Unreachable:
        raise
    except InputError:  # no registry yet
        return []


def _record(version: registry.Version, digests: Iterable[str]) -> None:
    earlier = set(filter(None, version.tags.get(TAG, "").split(",")))
    registry.tag(version, TAG, ",".join(sorted(earlier | set(digests))))


def _delete(objects: _Objects, copies: Iterable[Copy]) -> None:
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
