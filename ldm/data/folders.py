"""Read a folder of captioned images: which images there are and what their captions say."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pandas as pd

from ldm.base.errors import InputError
from ldm.data.captions import PROMPTS, read_captions
from ldm.data.conventions import Convention
from ldm.data.images import SUFFIXES, UNREAD, UnreadableImage

MAX_BYTES = 2**30  # of an image file
# What a NAS, a Mac or Windows leaves in a folder, beside hidden files
SYSTEM = {"@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "lost+found",
          "System Volume Information", "Thumbs.db", "ehthumbs.db", "desktop.ini", "Icon\r"}  # fmt: skip
# files of a cache that are named by their content: DVC's, and the Hugging Face hub's
CONTENT = re.compile(r"/(files/md5|cache)/[0-9a-f]{2}/[0-9a-f]{30}$|/blobs/([0-9a-f]{40}|[0-9a-f]{64})$")
LINKED_FOLDER = "a symbolic link to a folder; move the folder itself here"


@dataclass(frozen=True)
class Place:
    """Where the bytes of an image are: a file, or `size` bytes at `offset` of a file."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Raises `UnreadableImage` for what is no regular file, is larger than `MAX_BYTES` or cannot be read."""
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for ever.
            with os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise UnreadableImage("not a regular file")
                size = status.st_size if self.size is None else self.size
                if size > MAX_BYTES:
                    raise UnreadableImage(f"{size:,} bytes; at most {MAX_BYTES:,} are read")
                file.seek(self.offset)
                return file.read(size)
        except OSError as error:
            raise UnreadableImage(error.strerror or type(error).__name__) from None  # without the path, which differs elsewhere


@dataclass(frozen=True)
class Collection:
    """Captioned images: a row of `table` (`file_name`, `text`, further columns), the origin of its caption and a place each."""

    table: pd.DataFrame
    origins: list[str]  # table, file, folder name or none
    places: list[Place]
    refused: dict[str, str] = field(default_factory=dict)  # file name -> reason: images that are not opened
    ignored: dict[str, int] = field(default_factory=dict)  # files passed over: suffix, or what they are -> number


def read_folder(folder: Path, convention: Convention = "auto") -> Collection:
    """The captioned images in `folder` and below, sorted by `file_name` (POSIX path relative to `folder`).

    README.md has the conventions for captions, of which `convention` may choose one. Hidden files and what systems leave behind
    are passed over; files that must not be opened are refused.
    Raises `InputError` for a folder that is missing or empty, and for captions without an image or images without a caption.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; set data.path in params.yaml to a folder of captioned images")
    found, others = [], {}  # others: name -> why it must not be opened, or ""
    refused, passed = dict[str, str](), dict[str, str]()
    for name, reason in walk(folder, passed):
        is_image = PurePosixPath(name).suffix.lower() in SUFFIXES | UNREAD
        if is_image and not reason:
            found.append(name)
        elif is_image or reason == LINKED_FOLDER:
            refused[name] = reason
        elif name == PROMPTS and reason:
            raise InputError(f"{folder / name}: {reason}")
        else:
            others[name] = reason
    others.pop(PROMPTS, None)
    ignored = Counter(passed.values())
    if found:
        captions = read_captions(folder, found, others, refused.keys() | passed.keys(), convention)
        ignored.update(PurePosixPath(name).suffix or name for name in others if name not in captions.files)
        if captions.deleted:
            ignored["rows of deleted images"] = captions.deleted
        places = [Place(folder / name) for name in captions.table.file_name]
        return Collection(captions.table, captions.origins, places, refused, dict(sorted(ignored.items())))
    ignored.update(PurePosixPath(name).suffix or name for name in others)
    reasons = [counted(refused.values())] if refused else []
    reasons += [f"{count} passed over: {what}" for what, count in ignored.most_common()]
    advice = f"put captioned images there ({', '.join(sorted(SUFFIXES))})"
    raise InputError(f"{folder}: holds no images that are read; {'; '.join([*reasons, advice])}")


def unread(suffix: str) -> str:
    """Why an image of a format in `UNREAD` is refused."""
    return f"{suffix} is not read; convert it to JPEG or PNG"


def counted(reasons: Iterable[str]) -> str:
    """The reasons of refused images, each with its number."""
    return "; ".join(f"{count} refused: {reason}" for reason, count in Counter(reasons).most_common())


def walk(folder: Path, passed: dict[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Every file below a folder, if there is one: its path relative to it, and why not to open it (or "").

    Hidden files and what a NAS, a Mac or Windows leaves behind go to `passed` instead, with what they are.
    """
    root, passed = folder.resolve(), {} if passed is None else passed

    def cannot(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable or move it away")

    for here, folders, files in os.walk(folder, onerror=cannot) if folder.is_dir() else ():
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        for path in sorted(Path(here, name) for name in (*files, *links)):
            relative = path.relative_to(folder).as_posix()
            name = relative.encode(errors="backslashreplace").decode()
            if what := left_behind(relative):
                passed[name] = what
            else:
                yield name, _refusal(path, root)
        folders.sort()


def left_behind(name: str) -> str | None:
    """What a file is that is passed over: "hidden", or the name of a folder or file that a system makes; None for others."""
    parts = PurePosixPath(name).parts
    return next((part if part in SYSTEM else "hidden" for part in parts if part in SYSTEM or part.startswith(".")), None)


def _refusal(path: Path, root: Path) -> str:
    try:
        path.name.encode()
        if path.is_symlink() and path.is_dir():
            return LINKED_FOLDER
        target = path.resolve(strict=True) if path.is_symlink() else None
        if target and not (target.is_relative_to(root) or CONTENT.search(target.as_posix())):
            return "a symbolic link that leaves the folder; move the file itself here"
        if not path.is_file():
            return "not a regular file"
        return unread(path.suffix.lower()) if path.suffix.lower() in UNREAD else ""
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    except (OSError, RuntimeError):  # the latter: links that lead to each other
        return "a symbolic link that leads nowhere; restore its target or remove it"
