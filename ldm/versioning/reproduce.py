"""Bring stages up to date with DVC.

`python -m ldm.versioning.reproduce STAGE` does what `dvc --wait-for-lock repro -s STAGE` does, and ends with the exit code of the
stage's command, or 1 if DVC itself fails. To the file descriptor `LDM_RESULT_FD` it writes `executed` (the command ran),
`restored` (DVC's run-cache had the outs) or `cached` (unchanged), and the exit code, which is negative for a signal.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ldm.base.errors import InputError
from ldm.versioning.repository import open_repository, stage_name


def up_to_date(root: Path) -> set[str]:
    """The stages with nothing to do. While another process runs a stage, those that it affects are left out."""
    from dvc.lock import LockError

    fresh = set()
    with open_repository(root) as repo, contextlib.suppress(LockError), repo.lock:
        for stage in repo.index.stages:
            with contextlib.suppress(LockError):
                if stage.cmd and not stage.changed():
                    fresh.add(stage_name(stage))
    return fresh


def reproduce(root: Path, stage: str) -> tuple[str, int]:
    """Bring one stage up to date; its command runs as a child of this process. Returns the outcome and the exit code."""
    from dvc.exceptions import ReproductionError
    from dvc.stage.exceptions import StageCmdFailedError

    outcome = "executed"
    with open_repository(root, wait=True) as repo:
        restore = repo.stage_cache.restore

        def noted(*arguments: Any, **options: Any) -> None:
            nonlocal outcome
            restore(*arguments, **options)  # raises if the run-cache has nothing
            outcome = "restored"

        repo.stage_cache.restore = noted
        try:
            return (outcome if repo.reproduce(stage, single_item=True) else "cached"), 0
        except ReproductionError as error:
            if isinstance(error.__cause__, StageCmdFailedError):
                return "executed", int(str(error.__cause__).rpartition(" ")[2])
            raise error.__cause__ or error from None


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a shell starts in the background
    try:
        outcome, code = reproduce(Path.cwd(), sys.argv[1])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:  # before the command, or after it
        sys.exit(128 + signal.SIGINT)
    os.write(int(os.environ["LDM_RESULT_FD"]), f"{outcome} {code}".encode())
    sys.exit(code % 256)
