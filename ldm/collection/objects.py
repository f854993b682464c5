"""The objects of DVC's cache and of a remote: what they are, and which images they hold.

The key of a shard's sample is sha256(file)[:16] + sha256(file_name)[:8], so a shard tells which images it holds.
"""

import contextlib
import hashlib
import json
import re
import tarfile
from pathlib import Path
from typing import IO, Any

from ldm.base.errors import reason
from ldm.base.files import content_hash

DIGEST = 16  # hexadecimal digits of the file's hash, with which a sample's key of 24 begins


class Objects:
    """The objects of DVC's cache and of a remote by md5; an object that both have is read from the cache."""

    def __init__(self, cache: Any, remote: Any | None) -> None:
        self.stores, self.silent = {"cache": cache}, ""  # the latter: why the remote does not answer
        self.places: dict[str, list[str]] = {}
        self._add("cache")
        if remote is not None:
            try:
                self.stores["remote"] = remote
                self._add("remote")
            except Exception as error:  # each kind of storage has its own
                self.silent = reason(error)
                del self.stores["remote"]
        self.folders = [self.listing(md5) for md5 in self.places if md5.endswith(".dir")]
        self.files = {(path, md5) for folder in self.folders for path, md5 in folder.items() if md5 in self.places}

    def _add(self, place: str) -> None:
        for md5 in filter(re.compile(r"[0-9a-f]{32}(\.dir)?").fullmatch, set(self.stores[place].all())):
            self.places.setdefault(md5, []).append(place)

    def open(self, md5: str) -> Any:
        store = self.stores[self.places[md5][0]]
        return store.fs.open(store.oid_to_path(md5), "rb")

    def size(self, md5: str, place: str = "") -> int:
        store = self.stores[place or self.places[md5][0]]
        return int(store.fs.info(store.oid_to_path(md5))["size"])

    def sha256(self, md5: str) -> str:
        with self.open(md5) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def digests(self, md5: str) -> set[str]:
        """Of a file, or of a tar's members."""
        with contextlib.suppress(tarfile.TarError), self.open(md5) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            return {content_hash(part.read())[:DIGEST] for member in tar if (part := tar.extractfile(member))}
        return {self.sha256(md5)[:DIGEST]}  # it is no tar

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

    def samples(self) -> dict[str, dict[str, str]]:
        """The samples of each tar, none for other files. What only the remote has is opened, by a request, if it may be one."""
        others = {md5 for name, md5 in self.files if not name.endswith(".tar") and "cache" not in self.places[md5]}
        found = {}
        for md5 in self.places.keys() - others:
            with self.open(md5) as file:
                found[md5] = samples(file)
        return found


def samples(file: IO[bytes]) -> dict[str, str]:
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


def images_of(path: Path) -> set[str]:
    """The digests of the images in a shard; none for another file."""
    with path.open("rb") as file:
        return {key[:DIGEST] for key in samples(file)}
