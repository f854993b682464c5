"""The pipeline on a schedule, until stopped, with the Prefect server that `PREFECT_API_URL` names, or else one that it starts."""

import argparse
import os
import sys

from flows import server
from ldm import doctor
from ldm.base.errors import InputError
from ldm.base.project import find_root
from ldm.config import load_settings


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
        for warning in doctor.before_run(root, data=not options.ingest):
            if warning.subject == "Prefect":
                raise InputError(warning.text)
            print(f"warning: {warning.text}", file=sys.stderr, flush=True)
        if not os.environ.get("PREFECT_API_URL"):
            own = server.start(options.port)
            own.wait()
            os.environ["PREFECT_API_URL"] = own.url
            print(f"Prefect server: {own.url.removesuffix('/api')}", flush=True)
        from prefect.schedules import Cron  # reads PREFECT_API_URL, so not before there is a server

        from flows.pipeline import pipeline

        try:
            schedule = Cron(options.cron, timezone=options.timezone)
        except ValueError as error:
            raise InputError(f"--cron {options.cron!r}, --timezone {options.timezone!r}: {error}") from None
        parameters = {"root": str(root), "inbox": options.ingest and os.path.abspath(options.ingest)}
        os.chdir(root)
        pipeline.serve(name="scheduled", schedule=schedule, parameters=parameters, limit=1)  # two would change the same files
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
