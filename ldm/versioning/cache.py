"""DVC's cache: which of its objects are needed, and the removal of all others.

What names an object is the text of a dvc.lock or .dvc file: whatever stands there as an md5 is needed.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from ldm.versioning.git import output

MD5 = re.compile(r"""\bmd5['"]?\s*:\s*['"]?([0-9a-f]{32}(?:\.dir)?)""")
REMOVED = "removed"  # folder in the cache: objects that are about to be deleted


def local_cache(repo: Any) -> Path:
    """The folder of the cache of DVC's `Repo`."""
    return Path(repo.cache.legacy.path)


def path_of(cache: Path, md5: str) -> Path:
    """Where the cache has an object, or would have it."""
    return cache / "files/md5" / md5[:2] / md5[2:]


def names_objects(path: str) -> bool:
    """Whether the file of this path names objects."""
    return path == "dvc.lock" or path.endswith(("/dvc.lock", ".dvc"))


def named(texts: Iterable[str]) -> set[str]:
    """The md5 of every object that files name."""
    return {md5 for text in texts for md5 in MD5.findall(text)}


def named_now(checkouts: Iterable[Path]) -> set[str]:
    """The md5 of every object that files in these folders name now, committed or not."""
    texts = []
    for checkout in checkouts:
        listed = output(checkout, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.dvc", "*dvc.lock")
        for path in {"dvc.lock", *filter(names_objects, listed.decode(errors="surrogateescape").split("\0"))}:
            with contextlib.suppress(FileNotFoundError):
                texts.append((checkout / path).read_text(encoding="utf-8", errors="replace"))
    return named(texts)


def expanded(cache: Path, needed: Collection[str]) -> set[str]:
    """These objects, and the files in those that are folders."""
    found = set(needed)
    for md5 in needed:
        if md5.endswith(".dir"):
            with contextlib.suppress(OSError, ValueError):  # it is not here, or damaged
                found |= {entry["md5"] for entry in json.loads(path_of(cache, md5).read_bytes())}
    return found


def unneeded(cache: Path, needed: Collection[str], is_old: Callable[[Path], bool]) -> tuple[dict[str, Path], list[Path]]:
    """Objects that are not needed, by md5, and entries of the run-cache (which stage made what) whose outs are not all there.

    What is not old stays, and what it names, too: who needs it may not have written that down yet.
    """
    objects = {path.parent.name + path.name: path for path in sorted(cache.glob("files/md5/??/*"))}
    entries = {path: _outs(path) for path in sorted(cache.glob("runs/??/*/*"))}
    recent = {md5 for md5, path in objects.items() if md5 not in needed and not is_old(path)}
    recent |= {md5 for path, outs in entries.items() if not is_old(path) for md5 in outs}
    staying = expanded(cache, recent).union(needed) & objects.keys()
    gone = {md5: path for md5, path in objects.items() if md5 not in staying}
    return gone, [path for path, outs in entries.items() if is_old(path) and not outs <= staying]


def take_out(cache: Path, objects: dict[str, Path], entries: Iterable[Path]) -> None:
    """Remove objects from the cache, quickly: `delete_removed` deletes their bytes."""
    (cache / REMOVED).mkdir(parents=True, exist_ok=True)  # without a first run, there is no cache
    for entry in entries:
        entry.unlink(missing_ok=True)
    for md5, path in sorted(objects.items(), key=lambda item: not item[0].endswith(".dir")):  # no folder without its files
        with contextlib.suppress(FileNotFoundError):
            path.rename(cache / REMOVED / md5)


def delete_removed(cache: Path) -> None:
    """Delete the bytes of what `take_out` removed, also before a kill."""
    shutil.rmtree(cache / REMOVED, ignore_errors=True)


def _outs(entry: Path) -> set[str]:
    """The outs that an entry of the run-cache names; they stand last."""
    with contextlib.suppress(OSError):
        return named([entry.read_text(encoding="utf-8", errors="replace").rpartition("\nouts:")[2]])
    return set()
