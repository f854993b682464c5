"""Bring stages up to date with DVC.

`python -m ldm.versioning.reproduce STAGE` does what `dvc --wait-for-lock repro -s STAGE` does, and ends with the exit code of the
stage's command, or 1 if DVC itself fails. To the file descriptor `LDM_RESULT_FD` it writes `executed` (the command ran),
`restored` (DVC's run-cache had the outs) or `cached` (unchanged), and the exit code, which is negative for a signal.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from ldm.base.errors import InputError
from ldm.versioning.graph import stage_name
from ldm.versioning.repository import open_repository


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

    restored = False
    with open_repository(root, wait=True) as repo:
        restore = repo.stage_cache.restore

        def noted(*arguments: Any, **options: Any) -> None:
            nonlocal restored
            restore(*arguments, **options)  # raises if the run-cache has nothing
            restored = True

        repo.stage_cache.restore = noted
        try:
            done = repo.reproduce(stage, single_item=True)
        except ReproductionError as error:
            if isinstance(error.__cause__, StageCmdFailedError):
                return "executed", int(str(error.__cause__).rpartition(" ")[2])
            raise error.__cause__ or error from None
    return "restored" if restored else "executed" if done else "cached", 0


def main() -> int:
    try:
        outcome, code = reproduce(Path.cwd(), sys.argv[1])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    os.write(int(os.environ["LDM_RESULT_FD"]), f"{outcome} {code}".encode())
    return code % 256


if __name__ == "__main__":
    sys.exit(main())
