"""The one error that is the user's to mend, environment variables whose values are checked, and why something failed."""

import contextlib
import os


class InputError(Exception):
    """Names the file, key or sample, what was found and what to do. Entry points print it as one line and exit with code 2."""


def env_count(name: str, least: int, default: int | None = None) -> int:
    """A whole number of `least` or more, which is also the default unless there is another."""
    value = os.environ.get(name) or str(least if default is None else default)
    if not (value.isascii() and value.isdigit()) or int(value) < least:
        raise InputError(f"{name} is {value!r}; set it to a whole number of {least} or more, or unset it")
    return int(value)


def env_positive(name: str, unit: str) -> float:
    """A number of some unit, above 0; without end by default."""
    value = os.environ.get(name) or "inf"
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


def reason(error: BaseException) -> str:
    """Why something failed, in a line: of errors that libraries have wrapped, the first is short and says it."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
    return (said or type(error).__name__).splitlines()[0][:200]
