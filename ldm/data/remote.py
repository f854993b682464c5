"""Shards on object storage or a web server: a bounded folder of their files, each verified when it arrives."""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from ldm.base.errors import InputError
from ldm.base.files import locked

CHUNK = 8 << 20  # bytes held in memory, and of one request to object storage
PAUSES = (0.2, 1.0)  # seconds between attempts
CONNECT, STALL = 5.0, 20.0  # seconds without a connection, or without a further byte, that end an attempt
SHA256 = re.compile("[0-9a-f]{64}")
PART = ".part"  # suffix of a file that is being fetched
LOCKS = "locks"  # in the cache's folder: an empty file for each of its files, which stays, and one for the folder itself


def is_url(place: str | Path) -> bool:
    """Whether `place` has a scheme, as in s3://bucket/folder or file:///folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(place)) is not None


class ShardCache:
    """Files below a URL, kept in `folder` under their sha256, `max_bytes` at most; the least recently opened are evicted.

    Threads and processes may share the folder, and this object may be forked or pickled; each file is fetched once.
    Raises `InputError` for files that are absent, refused, out of reach, too large or damaged.
    """

    def __init__(self, url: str, folder: Path, max_bytes: int):
        self.url, self.folder, self.max_bytes = url.rstrip("/"), folder, max_bytes
        self._listing = folder / LOCKS / "folder"  # held where files grow, go or get their names

    def text(self, name: str) -> str:
        """The text of a small file at the URL, never from the folder; raises `FileNotFoundError` if there is none."""
        return str(self._attempt(name, lambda filesystem, url: filesystem.cat_file(url).decode()))

    def open(self, name: str, sha256: str, size: int) -> int:
        """A read-only descriptor of the local copy, readable even after the copy was evicted. The caller closes it."""
        if not SHA256.fullmatch(sha256):  # it becomes a file name here
            raise InputError(f"{self.url}/{name}: its sha256 is {sha256!r}; upload the shard folder again")
        if size > self.max_bytes:
            room = f"do not fit in {self.folder}, which may hold {self.max_bytes:,}"
            raise InputError(f"{self.url}/{name}: its {size:,} bytes {room}; raise that bound or write smaller shards")
        try:
            self._listing.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._listing.with_name(sha256)):
                with contextlib.suppress(FileNotFoundError):
                    kept = os.open(self.folder / sha256, os.O_RDONLY)
                    if os.fstat(kept).st_size == size:  # its hash was verified when it arrived
                        os.utime(kept, ns=(time.time_ns(),) * 2)  # the kernel's clock for "now" has steps of milliseconds
                        return kept
                    os.close(kept)
                return self._fetch(name, sha256, size)
        except OSError as error:  # of this disk: `_attempt` turns the server's into InputErrors
            raise InputError(f"{self.folder}: {error}; shards of {self.url} are kept there, make it writable") from None

    def _fetch(self, name: str, sha256: str, size: int) -> int:
        path, part = self.folder / sha256, self.folder / f"{sha256}{PART}"
        try:
            with part.open("wb") as file:
                self._make_room(file, size)
                try:
                    self._attempt(name, lambda filesystem, url: _download(filesystem, url, sha256, size, file))
                except FileNotFoundError:
                    advice = "check the URL, or upload the shard folder again"
                    raise InputError(f"{self.url}/{name}: not found; {advice}") from None
                os.fsync(file.fileno())  # it had its full size before its bytes: after a power cut the size would prove nothing
            fetched = os.open(part, os.O_RDONLY)
            with locked(self._listing):  # a listing during a rename may show neither name
                os.replace(part, path)
            return fetched
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, part: IO[bytes], size: int) -> None:
        """Evict files until `size` bytes fit, and claim these as the length of `part`; wait for other parts if need be."""
        while True:
            with locked(self._listing):
                files = [path for path in self.folder.iterdir() if SHA256.fullmatch(path.name.removesuffix(PART))]
                room = self.max_bytes - size - sum(self._claimed(path) for path in files if path.suffix == PART)
                if room >= 0:
                    kept = sorted((path for path in files if path.suffix != PART), key=lambda path: path.stat().st_mtime_ns)
                    while sum(path.stat().st_size for path in kept) > room:
                        kept.pop(0).unlink()
                    part.truncate(size)
                    return
            time.sleep(0.1)

    def _claimed(self, part: Path) -> int:
        """The length of a part that a live process holds. A part of a dead process is removed."""
        with contextlib.suppress(FileNotFoundError):
            try:
                with locked(self._listing.with_name(part.stem), wait=False):
                    part.unlink()
            except BlockingIOError:
                return part.stat().st_size
        return 0

    def _attempt(self, name: str, read: Callable[[Any, str], Any]) -> Any:
        """`read(filesystem, url)` of a file, again after errors that may pass. Raises `FileNotFoundError` for an absent file."""
        url = f"{self.url}/{quote(name) if self.url.startswith('http') else name}"
        for pause in (*PAUSES, 0):
            try:
                return read(_filesystem(self.url, os.getpid()), url)
            except (InputError, FileNotFoundError):
                raise
            except Exception as error:  # every filesystem has its own exceptions
                cause = f"{type(error).__name__} {' '.join(str(error).split())}".strip()
                if isinstance(error, PermissionError | ValueError) or "Credentials" in type(error).__name__:
                    raise InputError(f"{url}: not readable ({cause}); check the URL and the credentials") from None
            time.sleep(pause)
        advice = "upload the shards again, or mend the server, the network or this disk"
        raise InputError(f"{url}: not read in {len(PAUSES) + 1} attempts ({cause}); {advice}")


def _download(filesystem: Any, url: str, sha256: str, size: int, part: IO[bytes]) -> None:
    # Over http, fsspec takes any failure to find the size for an absent file, and its ranges need a server that has them.
    stream = {"block_size": 0, "size": size} if url.startswith("http") else {"cache_type": "none"}
    digest, found = hashlib.sha256(), 0
    part.seek(0)
    with filesystem.open(url, "rb", **stream) as remote:
        while found <= size and (chunk := remote.read(CHUNK)):
            digest.update(chunk)
            part.write(chunk[: size - found])
            found += len(chunk)
    part.flush()
    if found != size:
        raise OSError(f"{'over ' * (found > size)}{min(found, size):,} bytes, expected {size:,}")
    if digest.hexdigest() != sha256:
        raise OSError(f"sha256 {digest.hexdigest()}, expected {sha256}")


@cache
def _filesystem(url: str, pid: int) -> Any:
    """The fsspec filesystem of `url` for the process `pid`; raises `InputError` if a package for it is missing.

    Each process has its own: a filesystem's thread does not survive a fork. None is closed: parent and child share its sockets.
    """
    scheme, options = url.partition("://")[0], {}
    try:
        import fsspec

        theirs = fsspec.config.conf.get(scheme, {})  # FSSPEC_S3_… and the like, which an argument would replace
        if scheme == "s3":
            timeouts = {"connect_timeout": CONNECT, "read_timeout": STALL, "retries": {"total_max_attempts": 1}}
            options = {"config_kwargs": timeouts | theirs.get("config_kwargs", {})}
        elif scheme.startswith("http"):
            from aiohttp import ClientTimeout

            timeout = {"timeout": ClientTimeout(connect=CONNECT, sock_read=STALL)}
            options = {"client_kwargs": timeout | theirs.get("client_kwargs", {})}
        filesystem, _ = fsspec.url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        raise InputError(f"{url}: {error}; for s3:// and https://, pip install ldm-pipeline[s3]") from None
    if scheme == "s3":
        filesystem.retries = 1  # its 5 retries would multiply with ours
    return filesystem
