"""Set what the libraries read from the environment, before they are imported. What the user has set stays.

The entry points call this, `flows` and the command line; the stages inherit it.
"""

import contextlib
import getpass
import os
from pathlib import Path

from ldm.base.errors import InputError
from ldm.base.paths import HOME
from ldm.base.project import find_root

QUIET = {  # nothing is reported to anybody, and no address printed among a stage's lines
    "DO_NOT_TRACK": "1", "DVC_NO_ANALYTICS": "true", "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}  # fmt: skip
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PLACES = {  # where libraries write
    "PREFECT_HOME": "~/.prefect", "MPLCONFIGDIR": "~/.config/matplotlib", "TRITON_CACHE_DIR": "~/.triton",
    "HF_HOME": "~/.cache/huggingface", "DVC_SITE_CACHE_DIR": "/var/tmp/dvc",
}  # fmt: skip


def set_up() -> None:
    """No telemetry, no proxy in front of this machine's own servers, and a place for all that libraries write."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):  # set to nothing, as a compose file does, is not set
        if not os.environ.get(name):
            os.environ.pop(name, None)
    hosts = [*os.environ.get("NO_PROXY", "").split(","), *os.environ.get("no_proxy", "").split(","), *LOOPBACK]
    named = list(dict.fromkeys(filter(None, map(str.strip, hosts))))
    for name in ("NO_PROXY", "no_proxy"):  # some libraries read the one, some the other
        os.environ[name] = "*" if "*" in named else ",".join(named)  # all hosts, which some read only if it stands alone
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name, for which DVC asks
        os.environ["LOGNAME"] = f"user{os.getuid()}"
    with contextlib.suppress(InputError, OSError):  # there is no project, or it cannot be written: `ldm.doctor` says so
        _find_places(find_root() / HOME)


def _find_places(ours: Path) -> None:
    """What the user's home, or the system, has no writable place for goes into the folder `ours`."""
    home = os.path.expanduser("~")  # HOME, else of the user's entry in the system; "~" if there is neither
    if not (os.path.isdir(home) and os.access(home, os.R_OK | os.X_OK)):
        (ours / "user").mkdir(parents=True, exist_ok=True)
        os.environ["HOME"] = str(ours / "user")
    for name, usual in PLACES.items():
        place = os.path.expanduser(usual)
        only_read = name == "HF_HOME" and os.path.isdir(place)  # what was downloaded before can be used as it is
        if not (writable(place) or only_read):
            os.environ.setdefault(name, str(ours / name.lower()))


def writable(place: str | Path) -> bool:
    """Whether files can be made in a folder, which may not exist yet."""
    place = os.path.abspath(place)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    return os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)
