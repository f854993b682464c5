"""A clock that lives through a year in minutes, and one run of a deployment by it: `python -m year DEPLOYMENT PARAMETERS`.

The file that `YEAR` names is the calendar: when each night began, in seconds by the system and by the clock.
"""

import bisect
import json
import os
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path


class Calendar:
    """Within a night the clock goes as the system's does; between two nights it leaps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._nights: list[list[float]] = json.loads(path.read_text()) if path.exists() else []

    def begin(self, night: datetime) -> None:
        self._nights.append([time.time(), night.timestamp()])
        self._path.write_text(json.dumps(self._nights))

    def at(self, seconds: float) -> datetime:
        system, stubbed = self._nights[max(bisect.bisect(self._nights, [seconds, float("inf")]) - 1, 0)]
        return datetime.fromtimestamp(stubbed + seconds - system, UTC)

    def now(self) -> datetime:
        return self.at(time.time())


def main() -> None:
    """In the folder where the run works, as `flows.workspace` has made it; the last line printed is its state and message."""
    from ldm.base import clock

    calendar = Calendar(Path(os.environ["YEAR"]))
    clock.now, clock.at = calendar.now, calendar.at
    if free := os.environ.get("YEAR_FREE_BYTES"):
        usage = shutil.disk_usage(".")
        shutil.disk_usage = lambda path: usage._replace(free=int(free))
    os.environ["LDM_WORKER_PID"] = str(os.getppid())
    from flows import scheduled

    flow = scheduled.collect if sys.argv[1] == "collect" else scheduled.scheduled
    state = flow(**json.loads(sys.argv[2]), return_state=True)
    print(json.dumps([state.name, state.message]), flush=True)


if __name__ == "__main__":
    main()
