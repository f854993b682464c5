"""`python -m flows.run` runs the pipeline once, on this machine, and shows the stages' own lines."""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from flows import server, supervise
from ldm import doctor
from ldm.base.errors import InputError, disk_full
from ldm.base.project import find_root
from ldm.config import load_settings
from ldm.registry import locations

RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")


class _Console(logging.StreamHandler[TextIO]):
    """Shows the stages' lines as they are (`error: …` on stderr) and Prefect's warnings, not Prefect's account of the run."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "plain", False):
            line = record.getMessage()
            print(line, file=sys.stderr if line.startswith("error: ") else sys.stdout, flush=True)
        elif record.levelno >= logging.WARNING and not record.name.startswith(RUN_LOGGERS):
            super().emit(record)


def _run(root: Path, inbox: str | None, temporary: server.Server | None, away: list[str]) -> int:
    """Import Prefect and MLflow and open MLflow's store while Prefect's temporary server starts, which takes seconds."""
    from prefect.exceptions import TerminationSignal
    from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

    from flows import pipeline, summary
    from ldm.registry import tracking

    if temporary and "PREFECT_API_URL" not in os.environ and (api := get_current_settings().api).url:  # a profile names one
        key = api.key.get_secret_value() if api.key else None
        login = api.auth_string.get_secret_value() if api.auth_string else None
        if problem := doctor.prefect_problem(api.url, key, login):
            print(f"warning: {problem}; a temporary server stands in", file=sys.stderr, flush=True)
        else:
            temporary.process.terminate()
            temporary = None
    if locations.database_file(os.environ["MLFLOW_TRACKING_URI"]):
        with contextlib.suppress(Exception):  # the run itself reports what is wrong
            tracking.experiment_id(tracking.mlflow_client())
    if temporary:
        temporary.wait()
    logging.getLogger().handlers = [_Console()]  # in place of Prefect's
    try:
        with temporary_settings({PREFECT_API_URL: temporary.url} if temporary else {}):
            summary.show(pipeline.pipeline(str(root), inbox and os.path.abspath(inbox), away))
    except TerminationSignal:
        return 143
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.run", description=__doc__)
    parser.add_argument("--ingest", metavar="FOLDER", help="first ingest what is new in this folder; see `ldm data ingest`")
    inbox = parser.parse_args().ingest
    try:
        root = find_root()
        load_settings(root)
        print(f"pipeline in {root}: starting Prefect and MLflow", flush=True)
        temporary = None if os.environ.get("PREFECT_API_URL") else server.start()
        warnings = doctor.before_run(root, data=not inbox)  # which may bring the first images
        for warning in warnings:
            print(f"warning: {warning.text}", file=sys.stderr, flush=True)
        away = [warning.subject for warning in warnings]
        if "Prefect" in away:
            temporary = server.start()
        return _run(root, inbox, temporary, away)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return supervise.BAD_INPUT
    except supervise.StageFailed as failure:
        if failure.bad_input:
            return supervise.BAD_INPUT  # the last line shown is the stage's own error
        print(f"{failure}; `ldm run` goes on from the last checkpoint", file=sys.stderr)
        return 1
    except Exception as error:
        if (refusal := disk_full(error, Path.cwd(), Path(tempfile.gettempdir()))) is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        return supervise.BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; `ldm run` continues where this stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
