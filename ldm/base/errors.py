"""The one error that is the user's to mend, environment variables and disks that are checked, and why something failed."""

import contextlib
import errno
import math
import os
import re
import shutil
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of a disk, a user's share of it, a file
# of libraries that pass no number on: safetensors, SQLite
FULL_WORDS = re.compile(r"no space left on device|quota exceeded|disk is full|os error (28|122|27)\b", re.I)


class InputError(Exception):
    """Names the file, key or sample, what was found and what to do. Entry points print it as one line and exit with code 2."""


def env_count(name: str, least: int, default: int | None = None) -> int:
    """A whole number of `least` or more, which is also the default unless there is another."""
    value = os.environ.get(name) or str(least if default is None else default)
    if not (value.isascii() and value.isdigit()) or int(value) < least:
        raise InputError(f"{name} is {value!r}; set it to a whole number of {least} or more, or unset it")
    return int(value)


def env_positive(name: str, unit: str, default: float = math.inf) -> float:
    """A number of some unit, above 0."""
    value = os.environ.get(name) or str(default)
    with contextlib.suppress(ValueError):
        if float(value) > 0:
            return float(value)
    raise InputError(f"{name} is {value!r}; set it to a number of {unit} above 0, or unset it")


def env_switch(name: str) -> bool:
    """Whether it is 1; off by default."""
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise InputError(f"{name} is {value!r}; set it to 1, or unset it")
    return value == "1"


def disk_full(error: BaseException, *folders: Path) -> InputError | None:
    """The one line for an error that means a full disk, wherever in its chain of causes that is said; None for another error.

    Of the `folders` that were written to, the line names the one with the least space, unless the error names a file.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    found = [one for one in chain if getattr(one, "errno", None) in FULL or FULL_WORDS.search(str(one))]
    if not found:
        return None
    number, words = getattr(found[0], "errno", None), FULL_WORDS.search(str(found[0]))
    what = os.strerror(number) if number in FULL else words[0] if words else ""
    file = next((one.filename for one in found if isinstance(one, OSError) and isinstance(one.filename, str)), None)
    named = [Path(file).absolute().parent] if file else [folder for folder in folders if folder.is_dir()] or [Path.cwd()]
    there = {folder: next(parent for parent in (folder, *folder.parents) if parent.is_dir()) for folder in named}
    free, place = min((shutil.disk_usage(there[folder]).free, folder) for folder in named)
    return InputError(f"{place}: the disk is full ({what}), {megabytes(free)} are free there; make room, then run this again")


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise an `InputError` if the disk of `folder`, which may not exist yet, has less than `needed` bytes free."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    if (missing := needed - (free := shutil.disk_usage(place).free)) > 0:
        found = f"{what} need {megabytes(needed)}, and {megabytes(free)} are free there"
        raise InputError(f"{folder}: {found}; make room for {megabytes(missing)} first")


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def reason(error: BaseException) -> str:
    """Why something failed, in a line: of errors that libraries have wrapped, the first is short and says it."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
    return (said or type(error).__name__).splitlines()[0][:200]
