"""The flow: DVC decides which stages have to run; Prefect adds retries, time limits, cancellation and a record."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Completed

from flows import STARTED, TARGET, last_run
from flows.stages import PLAIN, Work, can_be_retried, run_stages
from flows.summary import Summary, markdown, summarise
from flows.supervise import StageFailed, Step
from ldm import doctor
from ldm.base.errors import InputError
from ldm.base.files import locked
from ldm.base.paths import POSTERIOR, TRACKING
from ldm.collection import ingest as ingestion
from ldm.config import load_settings
from ldm.registry import lineage, registration, tracking, versions
from ldm.registry.dead_runs import end_dead_runs
from ldm.registry.tracking import Records, Run
from ldm.versioning.repository import alone, around, check_data, read_graph
from ldm.versioning.reproduce import up_to_date

_registry_task = task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=can_be_retried)
register = _registry_task(registration.register)
gate = _registry_task(registration.gate_and_promote).with_options(name="gate")


@task(cache_policy=NO_CACHE)
def ingest(root: Path, inbox: str, versioned: Callable[[str], object] | None) -> ingestion.Ingested:
    """Move new images from a watched folder into the collection; see `ldm.collection.ingest`."""
    ingested = ingestion.ingest(root, Path(inbox), versioned=versioned)
    for line in ingested.lines():
        get_run_logger().info("%s", line, extra=PLAIN)
    return ingested


@task(cache_policy=NO_CACHE)
def check_drift(root: str, batch: str) -> str:
    """Warn if new images differ from those of the model so far (`ldm data drift`). They are used all the same."""
    command = [sys.executable, "-m", "ldm.cli", "data", "drift", str(Path(root, batch))]  # a process, for the memory
    done = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    verdict = next((line for line in lines if line.startswith(("drift: ", "no drift: "))), None)
    if verdict is None:  # no reason to stop: the images are versioned already
        lines = [f"drift: not checked: {(done.stderr.strip() or 'no output').splitlines()[-1].removeprefix('error: ')}"]
    for line in lines if done.returncode else ():
        get_run_logger().warning("%s", line, extra=PLAIN)
    return verdict or "not checked"


@flow(name="ldm-pipeline", validate_parameters=False)
def pipeline(root: str = ".", inbox: str | None = None, away: list[str] | None = None, end: Any = None) -> Summary:
    """Ingest what is new in `inbox`, bring every stage up to date, register the model, let the gate decide, set the aliases.

    `away`: the servers that do not answer, where the caller has made the checks of `ldm.doctor`. `end` gets the summary: what
    Prefect does after it fails if its server is gone.
    """
    folder = Path(root).resolve()
    with opened(folder, away, data=not inbox) as away:
        steps, notes = [Step("start", "", time.monotonic() - STARTED)], list[tuple[str, str]]()
        if inbox:
            ingest_batch(folder, inbox, steps, notes)
        summary = bring_up_to_date(folder, away, steps, notes)
        last_run.end(folder, Completed())  # if Prefect's server is gone by now, its own record never says so
        if end:
            end(summary)
        return summary


@contextlib.contextmanager
def opened(folder: Path, away: list[str] | None, *, data: bool) -> Iterator[list[str]]:
    """Work in a project's folder, alone: what died there before has its true state. Yields which servers are `away`."""
    logger = get_run_logger()
    if away is None:
        warnings = doctor.before_run(folder, data=data)
        away = [warning.subject for warning in warnings]
        for warning in warnings:
            logger.warning("%s", warning.text)
    tracking.use_default_store(folder)
    with alone(folder):
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:  # a record, and no reason to stop
            if last_run.read(folder).get("flow_run") != flow_run.id and (told := last_run.settle(folder, client)):
                logger.warning("the run before this one, %s", told)
        if "MLflow" not in away:
            Records(folder / TRACKING).deliver()  # of runs while its server was away
            end_dead_runs(folder)
        last_run.begin(folder, flow_run.id)
        try:
            yield away
        except (InputError, StageFailed) as error:
            last_run.end(folder, last_run.failed(error))
            raise


def ingest_batch(
    folder: Path, inbox: str, steps: list[Step], notes: list[tuple[str, str]], versioned: Callable[[str], object] | None = None
) -> ingestion.Ingested:
    """Ingest, and compare what came in with what the last model was trained on: a note for the summary."""
    ingested, seconds = _timed(ingest, folder, inbox, versioned)
    steps.append(Step("ingest", "executed" if ingested.batch else "cached", seconds))
    if ingested.batch and (folder / POSTERIOR).is_dir():  # of the last run
        notes.append(("new images", check_drift(str(folder), ingested.batch)))
    return ingested


def bring_up_to_date(
    folder: Path, away: list[str], steps: list[Step], notes: list[tuple[str, str]],
    before_registry: Callable[[], object] = lambda: None,
) -> Summary:  # fmt: skip
    """Run the stages that are out of date, then register their model and let the gate decide."""
    settings, records = load_settings(folder), Records(folder / TRACKING, away="MLflow" in away)
    check_data(folder, settings.data.path)
    stages, others = around(read_graph(folder), TARGET)
    later = records.folder if "MLflow" in away else None
    nothing_to_run = {node.name for node in (*stages, *others)} <= (fresh := up_to_date(folder))
    recording = lineage.pipeline_run(folder, settings.model_dump(), records=later)
    with contextlib.nullcontext(Run()) if nothing_to_run else recording as run:
        work = Work(folder, run.reference, records, fresh)
        steps += run_stages(stages, work)
        if not nothing_to_run:
            lineage.log_results(run, folder)
        before_registry()
        (folder / TRACKING).mkdir(parents=True, exist_ok=True)
        with locked(folder / TRACKING / "registry.lock"):  # which all worktrees share: two runs would replace one champion
            try:
                registered, seconds = _timed(register, folder, run.id)
                steps.append(Step("register", "executed" if registered.created else "cached", seconds))
                decision, seconds = _timed(gate, folder, registered.version)
                steps.append(Step("gate", "executed" if decision.n else "cached", seconds))
            except versions.Unreachable as error:
                raise InputError(f"{error}; the model is done: the next run registers it, without training again") from None
        steps += run_stages(others, work)  # last: their failure keeps no model from its promotion
    champion = versions.by_alias(settings.registry.name, "champion")  # None if the first model's bound is not finite
    summary = summarise(folder, settings, steps, others, registered, decision, champion.version if champion else None, notes)
    with contextlib.suppress(Exception):  # Prefect's server is away, and everything is done
        create_markdown_artifact(markdown(summary, folder), key="ldm-pipeline-summary")
    for what, value in summary.results:
        get_run_logger().info("%s: %s", what, value)  # for the logs of scheduled runs
    return summary


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.monotonic()
    return work(*arguments), time.monotonic() - start
