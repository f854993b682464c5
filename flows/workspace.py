"""The command of a scheduled run: takes its slot, prepares the worktree of that slot, and becomes Prefect's engine there.

`python -m flows.workspace --branch BRANCH`, in the project's folder; the slot is the name of the deployment. The lock of the slot
is held until the process ends, however it ends: who may work is decided by that, not by a server's memory of who is running.
"""

import argparse
import fcntl
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from ldm.base.errors import InputError, reason
from ldm.base.project import find_root
from ldm.config import load_settings
from ldm.registry.tracking import use_default_store
from ldm.versioning.worktree import SLOTS, prepare

REFUSED, BUSY, PARENT, ROOT = "LDM_SLOT_REFUSED", "LDM_SLOT_BUSY", "LDM_WORKER_PID", "LDM_ROOT"  # tell the flow
SLOT = re.compile(r"\w[\w.-]*")  # a folder, and a part of a branch's name
FILE = "infra/prefect.yaml"
COLLECT = "collect"  # the deployment, and flow, that works on the whole project and in no worktree
PATIENCE = 15.0  # seconds to wait for a slot whose lock is held, perhaps by a run that is done and whose process still ends
LOOK_SECONDS = 1.0  # between looks at the worker


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.workspace", description=__doc__)
    parser.add_argument("--branch", required=True)
    options = parser.parse_args()
    root, slot = find_root(), os.environ["PREFECT__DEPLOYMENT_NAME"]
    os.environ[ROOT] = str(root)
    use_default_store(root)
    try:
        if not SLOT.fullmatch(slot) or slot.endswith((".", ".lock")):
            raise InputError(f"{FILE}: the deployment {slot!r} names a folder and a branch; use letters, digits, - and _")
        if not _take(root / SLOTS, slot):
            os.environ[BUSY] = f"the run of {slot} before this one is still at work"
        elif slot != COLLECT:
            os.chdir(prepare(root, slot, options.branch))
    except InputError as error:
        os.environ[REFUSED] = str(error)
    except Exception as error:  # is said where people look, not in a log of the worker
        os.environ[REFUSED] = f"the worktree of {slot} cannot be prepared ({type(error).__name__}: {reason(error)})"
    os.environ[PARENT] = str(os.getppid())
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")  # seconds; see `flows.deployments`
    os.environ["PREFECT__FLOW_ENTRYPOINT"] = f"flows.scheduled.{COLLECT if slot == COLLECT else 'scheduled'}"
    os.execv(sys.executable, [sys.executable, "-m", "prefect.engine"])


def flow_name() -> str:
    """Of the project's flow on a server that several projects may share: the name under which it registers its models."""
    try:
        return load_settings(find_root()).registry.name
    except InputError:  # is reported by the run
        return "ldm"


def follow_worker() -> None:
    """Stop when the worker dies: what a run does without one, nobody can cancel."""
    worker = int(os.environ[PARENT])

    def look() -> None:
        while os.getppid() == worker:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


def _take(slots: Path, slot: str) -> bool:
    """Lock a slot for this process and what it becomes."""
    slots.mkdir(parents=True, exist_ok=True)
    lock, deadline = os.open(slots / f"{slot}.lock", os.O_CREAT | os.O_RDWR), time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        else:
            os.set_inheritable(lock, True)  # past `execv`; children that are started with closed files do not have it
            return True


if __name__ == "__main__":
    main()
