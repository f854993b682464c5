"""The pipeline on a schedule, on one machine: `python -m flows.serve --cron "0 3 * * *"` until it is stopped.

It uses the Prefect server that `PREFECT_API_URL` names; where none is named, one that it starts itself, whose pages
show the schedule and its runs.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from flows.server import START_SECONDS, answers
from ldm.base.errors import InputError
from ldm.config import find_root, load_settings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__)
    parser.add_argument("--cron", default="0 3 * * *", help="when to run, as a cron line (default: %(default)s)")
    parser.add_argument("--timezone", help="of the cron line, e.g. Europe/Berlin (default: UTC)")
    parser.add_argument("--ingest", metavar="FOLDER", help="before each run, take in what is new there; see `ldm data ingest`")
    parser.add_argument("--port", type=int, default=4200, help="of the server it starts (default: %(default)s)")
    options = parser.parse_args()
    try:
        root = find_root()
        load_settings(root)
        inbox = os.path.abspath(options.ingest) if options.ingest else None
        with _server(options.port):
            _serve(root, inbox, options.cron, options.timezone)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _serve(root: Path, inbox: str | None, cron: str, timezone: str | None) -> None:
    from prefect.schedules import Cron  # reads PREFECT_API_URL, so not before there is a server

    from flows.pipeline import pipeline

    try:
        schedule = Cron(cron, timezone=timezone)
    except ValueError as error:
        raise InputError(f"--cron {cron!r}, --timezone {timezone!r}: {error}") from None
    os.chdir(root)
    # one run at a time: two would change the same files
    pipeline.serve(name="scheduled", schedule=schedule, parameters={"root": str(root), "inbox": inbox}, limit=1)


@contextlib.contextmanager
def _server(port: int) -> Iterator[None]:
    """A Prefect server for as long as we run, where `PREFECT_API_URL` names none."""
    if os.environ.get("PREFECT_API_URL"):
        yield
        return
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"http://127.0.0.1:{port}/api/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise InputError(f"no Prefect server on port {port}: is it taken? Try --port, or set PREFECT_API_URL")
            time.sleep(0.5)
        print(f"Prefect server: http://127.0.0.1:{port}", flush=True)
        yield
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
