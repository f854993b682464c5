"""The one error that is the user's to mend, and environment variables whose values are checked."""

import os


class InputError(Exception):
    """Names the file, key or sample, what was found and what to do. Entry points print it as one line and exit with code 2."""


def env_count(name: str, least: int) -> int:
    """A whole number of `least` or more, which is also the default."""
    value = os.environ.get(name) or str(least)
    if not (value.isascii() and value.isdigit()) or int(value) < least:
        raise InputError(f"{name} is {value!r}; set it to a whole number of {least} or more, or unset it")
    return int(value)


def env_switch(name: str) -> bool:
    """Whether it is 1; off by default."""
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise InputError(f"{name} is {value!r}; set it to 1, or unset it")
    return value == "1"
