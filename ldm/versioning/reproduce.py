"""Bring stages up to date with DVC.

`python -m ldm.versioning.reproduce STAGE` brings one stage up to date, as `dvc --wait-for-lock repro -s STAGE` does. It prints
the stage's own lines and DVC's warnings, and writes a `Reproduced` as JSON to the file descriptor `LDM_RESULT_FD`.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.base.errors import InputError
from ldm.versioning.graph import stage_name
from ldm.versioning.repository import open_repository


@dataclass(frozen=True)
class Reproduced:
    """How bringing a stage up to date ended."""

    status: Literal["executed", "restored", "cached"] = "cached"  # the command ran; DVC's run-cache had the outs; unchanged
    exit_code: int = 0  # of the stage's command, negative for a signal
    error: str = ""  # DVC's own failure


class Status:
    """Which stages are up to date. DVC is asked once for all stages, and again after a stage has run."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._fresh: set[str] | None = None
        self._current = False  # no stage has run since DVC was asked

    def is_up_to_date(self, stage: str) -> bool:
        """Whether there is nothing to do for a stage; False if in doubt."""
        if self._fresh is None or (stage in self._fresh and not self._current):
            self._fresh, self._current = self._ask(), True
        return stage in self._fresh

    def changed(self) -> None:
        """Call this before a stage runs: later stages may then no longer be up to date."""
        self._current = False

    def _ask(self) -> set[str]:
        from dvc.lock import LockError

        def is_fresh(stage: Any) -> bool:
            try:
                return not stage.changed()
            except LockError:  # another process runs a stage that writes what this one reads or writes
                return False

        with open_repository(self._root) as repo:
            try:
                with repo.lock:
                    return {stage_name(stage) for stage in repo.index.stages if stage.cmd and is_fresh(stage)}
            except LockError:
                return set()


def reproduce(root: Path, stage: str) -> Reproduced:
    """Bring one stage up to date; its command runs as a child of this process."""
    from dvc.exceptions import ReproductionError
    from dvc.stage.exceptions import StageCmdFailedError

    restored = False
    try:
        with open_repository(root, wait=True) as repo:
            restore = repo.stage_cache.restore

            def noted(*arguments: Any, **options: Any) -> None:
                nonlocal restored
                restore(*arguments, **options)  # raises if the run-cache has nothing
                restored = True

            repo.stage_cache.restore = noted
            try:
                done = repo.reproduce(stage, single_item=True)
                return Reproduced("restored" if restored else "executed" if done else "cached")
            except ReproductionError as error:
                if not isinstance(error.__cause__, StageCmdFailedError):
                    raise error.__cause__ or error from None
                return Reproduced("executed", int(str(error.__cause__).rpartition(" ")[2]))
    except InputError as error:
        return Reproduced(exit_code=1, error=str(error))


def main() -> int:
    found = reproduce(Path.cwd(), sys.argv[1])
    if found.error:
        print(f"error: {found.error}", file=sys.stderr, flush=True)
    if "LDM_RESULT_FD" in os.environ:
        with open(int(os.environ["LDM_RESULT_FD"]), "w") as result:
            json.dump(asdict(found), result)
    return found.exit_code % 256


if __name__ == "__main__":
    sys.exit(main())
