"""`python -m flows.run` runs the pipeline once, on this machine, and shows the stages' own lines."""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

from flows import STARTED, TARGET, schedule, server, summary, supervise
from ldm import doctor
from ldm.base.errors import InputError, disk_full
from ldm.base.paths import TRACKING
from ldm.base.project import find_root
from ldm.config import load_settings
from ldm.registry import locations, registration, tracking, versions
from ldm.versioning.repository import around, read_graph
from ldm.versioning.reproduce import up_to_date

GONE = "warning: Prefect's server is gone, and does not know how this run ended; all is done"
PREFECT = {  # where the user has not set it
    "PREFECT_CLIENT_MAX_RETRIES": "2",  # 6 s: a server of this machine that does not answer is gone
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # else a line for each record that does not reach it
}
RUN_LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.events")  # the last: what does not reach a server


class _Console(logging.StreamHandler[TextIO]):
    """Shows the stages' lines as they are (`error: …` on stderr) and Prefect's warnings, not Prefect's account of the run."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "plain", False):
            line = record.getMessage()
            print(line, file=sys.stderr if line.startswith("error: ") else sys.stdout, flush=True)
        elif record.levelno >= logging.WARNING and not record.name.startswith(RUN_LOGGERS):
            super().emit(record)


def _nothing_to_do(root: Path) -> summary.Summary | None:
    """The summary of a run that has nothing to do, for which neither Prefect nor MLflow is needed; None if there is something."""
    tracking.use_default_store(root)
    stages, others = around(read_graph(root), TARGET)
    if any((root / TRACKING).glob("*.jsonl")) or not {node.name for node in (*stages, *others)} <= up_to_date(root):
        return None
    if (found := registration.standing(root)) is None:
        return None
    steps = [supervise.Step(node.name, "cached", 0) for node in (*stages, *others)]
    start = supervise.Step("start", "", time.monotonic() - STARTED)
    settings = load_settings(root)
    champion = versions.by_alias(settings.registry.name, "champion")
    return summary.summarise(root, settings, [start, *steps], others, *found, champion.version if champion else None, [])


def _run(root: Path, inbox: str | None, temporary: server.Server | None, away: list[str]) -> int:
    """Import Prefect and MLflow and open MLflow's store while Prefect's temporary server starts, which takes seconds."""
    from prefect.exceptions import TerminationSignal
    from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

    from flows import pipeline

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
    logging.raiseExceptions = False  # of log lines that do not reach its server
    done = list[summary.Summary]()

    def end(found: summary.Summary) -> None:
        summary.show(found)
        done.append(found)
        if temporary and temporary.process.poll() is not None:
            print(GONE, file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(0)  # Prefect would try to reach it for minutes

    try:
        with temporary_settings({PREFECT_API_URL: temporary.url} if temporary else {}):
            pipeline.pipeline(str(root), inbox and os.path.abspath(inbox), away, end)
    except TerminationSignal:
        return 143
    except Exception:
        if not done:
            raise
        print(GONE, file=sys.stderr, flush=True)
    return 0


def main() -> int:
    for name, value in PREFECT.items():
        os.environ.setdefault(name, value)
    parser = argparse.ArgumentParser(prog="python -m flows.run", description=__doc__)
    parser.add_argument("--ingest", metavar="FOLDER", help="first ingest what is new in this folder; see `ldm data ingest`")
    inbox = parser.parse_args().ingest
    try:
        root = find_root()
        load_settings(root)
        print(f"pipeline in {root}: starting Prefect and MLflow", flush=True)
        if scheduled := schedule.running(root):
            os.environ.setdefault("PREFECT_API_URL", scheduled["url"])
        temporary = None if os.environ.get("PREFECT_API_URL") else server.start()
        warnings = doctor.before_run(root, data=not inbox)  # which may bring the first images
        for warning in warnings:
            print(f"warning: {warning.text}", file=sys.stderr, flush=True)
        away = [warning.subject for warning in warnings]
        if not inbox and not away and (found := _nothing_to_do(root)):
            if temporary:
                temporary.process.terminate()
            summary.show(found)
            return 0
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
