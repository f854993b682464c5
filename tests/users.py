"""Another user, with neither a name nor a home: as in a container with any user id."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

USER = 54321


def open_up(folder: Path) -> None:
    """Let that user in: pytest's folders are its own user's alone."""
    for parent in folder.parents:
        if tempfile.gettempdir() in map(str, parent.parents):
            parent.chmod(0o755)


def as_another_user(work: Callable[[], Any]) -> Any:
    """What `work` returns in a child process of that user, as JSON; needs root."""
    result, written = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(USER)
            os.setuid(USER)
            found = work()
        except BaseException as error:
            found = repr(error)
        os.write(written, json.dumps(found).encode())
        os._exit(0)
    os.close(written)
    with os.fdopen(result) as said:
        found = json.load(said)
    os.waitpid(child, 0)
    return found
