"""The flow: the stages of dvc.yaml, then register, gate, publish.

DVC decides what has to run; Prefect adds retries, time limits, cancellation and a record.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import STARTED, supervise
from flows.summary import Step, Summary, markdown, summarise
from ldm.base.errors import InputError
from ldm.base.paths import LATENT_STORE, LATENTS, POSTERIOR, TRACKING
from ldm.config import load_settings
from ldm.data.store import prune_store
from ldm.registry import lineage, promotion, registration, tracking, versions
from ldm.registry.records import Records
from ldm.versioning.graph import Node, ancestors, check_data, descendants, read_graph
from ldm.versioning.reproduce import Status

if TYPE_CHECKING:
    from ldm.collection.ingest import Ingested
    from ldm.evaluation.gate import Decision

WORDS = {"cached": "nothing to do", "restored": "brought back from DVC's cache"}  # of stages that were not executed
TARGET = "evaluate"  # the stage before registration, a side effect of which DVC does not know
PLAIN = {"plain": True}  # marks the log lines that someone at a console wants to see as they are


def _mendable(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a retry may help: not where the input is bad."""
    error = state.result(raise_on_failure=False)
    bad_input = isinstance(error, supervise.StageFailed) and error.bad_input
    return isinstance(error, versions.Unreachable) or not (bad_input or isinstance(error, InputError))


@task(cache_policy=NO_CACHE)
def ingest(root: str, inbox: str) -> "Ingested":
    """What is new in a watched folder becomes a batch of the collection: see `ldm.collection.ingest`."""
    from ldm.collection.ingest import ingest as ingest_folder

    ingested = ingest_folder(Path(root), Path(inbox))
    for line in ingested.lines():
        get_run_logger().info("%s", line, extra=PLAIN)
    return ingested


@task(cache_policy=NO_CACHE)
def check_drift(root: str, batch: str) -> str:
    """Warn where new images are unlike those of the model so far, which `ldm data drift` says; they are taken in all the same."""
    logger = get_run_logger()
    command = [sys.executable, "-m", "ldm.cli", "data", "drift", str(Path(root, batch))]  # a process, for the memory
    done = subprocess.run(command, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    verdict = next((line for line in lines if line.startswith(("drift: ", "no drift: "))), None)
    if verdict is None:  # no reason to stop: the images are versioned already
        lines = [f"drift: not checked: {(done.stderr.strip() or 'no output').splitlines()[-1].removeprefix('error: ')}"]
    if done.returncode:
        for line in lines:
            logger.warning("%s", line, extra=PLAIN)
    return verdict or "not checked"


@task(cache_policy=NO_CACHE, retry_condition_fn=_mendable, retry_delay_seconds=2)
def run_stage(root: str, stage: Node, parent_run: str | None, status: Status, records: Records) -> supervise.Outcome:
    """One stage of dvc.yaml as a child process; its lines are this task's log."""
    logger = get_run_logger()
    limit = os.environ.get("LDM_STAGE_TIMEOUT")
    parent = {"LDM_PARENT_RUN": parent_run} if parent_run else {}
    try:
        with records.delivering():
            return supervise.run_stage(
                Path(root),
                stage.name,
                status=status,
                on_line=lambda line: logger.info("%s", line, extra=PLAIN),
                timeout=float(limit) if limit else None,
                env={"LDM_RECORDS": str(records.folder), **parent},
            )
    except supervise.StageFailed as failure:
        if not failure.bad_input:  # a retry that helps must not hide that there was something to help
            logger.error("%s", failure, extra=PLAIN)
        raise


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=_mendable)
def register(root: str, parent_run: str | None) -> registration.Registered:
    """The model in the registry, once for each content."""
    return registration.register(Path(root), parent_run)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=_mendable)
def gate(root: str, version: int) -> "Decision":
    """Champion or not: see `ldm.registry.promotion`."""
    return promotion.gate_and_promote(Path(root), version)


@flow(name="ldm-pipeline", validate_parameters=False)
def pipeline(root: str = ".", inbox: str | None = None) -> Summary:
    """Take in what is new in `inbox`, bring every stage up to date, register the model, let the gate decide, set the aliases."""
    folder = Path(root).resolve()
    settings = load_settings(folder)
    graph = read_graph(folder)
    stages = ancestors(graph, TARGET)
    others = descendants(graph, TARGET)
    notes: list[tuple[str, str]] = []
    tracking.use_default_store(folder)
    with _alone(folder), lineage.pipeline_run(folder, settings.model_dump()) as run:
        steps = [Step("start", "", time.monotonic() - STARTED)]
        if inbox:
            start = time.monotonic()
            batch = ingest(str(folder), inbox).batch
            steps.append(Step("ingest", "executed" if batch else "cached", time.monotonic() - start))
            if batch and (folder / POSTERIOR).is_dir():  # of the last run
                notes.append(("new images", check_drift(str(folder), batch)))
            check_data(folder, settings.data.path)
        common = (run.id, Status(folder), Records(folder / TRACKING))
        steps += _run_stages(folder, stages, *common)
        if (folder / LATENTS / "manifest.json").is_file():
            prune_store(folder / LATENT_STORE, folder / LATENTS)
        lineage.log_results(run, folder)
        start = time.monotonic()
        registered = register(str(folder), run.id)
        steps.append(Step("register", "executed" if registered.created else "cached", time.monotonic() - start))
        start = time.monotonic()
        decision = gate(str(folder), registered.version)
        steps.append(Step("gate", "executed" if decision.n else "cached", time.monotonic() - start))
        steps += _run_stages(folder, others, *common)  # last: what fails here keeps no model from its place
    found = versions.by_alias(settings.registry.name, "champion")
    champion = found.version if found else None  # none, where the first model's bound is not finite
    summary = summarise(folder, settings, steps, others, registered, decision, champion, notes)
    create_markdown_artifact(markdown(summary, folder), key="ldm-pipeline-summary")
    for what, value in summary.results:
        get_run_logger().info("%s: %s", what, value)  # for the logs of scheduled runs
    return summary


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One run at a time in a folder: two would change the same files."""
    path = root / ".ldm/pipeline.lock"
    path.parent.mkdir(exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            process = f"process {lock.read()}"
            raise InputError(f"{root}: another run of the pipeline ({process}) works here; wait for it or stop it") from None
        lock.truncate(0)
        print(os.getpid(), end="", file=lock, flush=True)
        yield


def _run_stages(root: Path, stages: tuple[Node, ...], parent_run: str | None, status: Status, records: Records) -> list[Step]:
    """Each stage after those it depends on, in this thread, so that a signal reaches the child that is running."""
    outcomes: dict[str, supervise.Outcome] = {}
    retries = int(os.environ.get("LDM_STAGE_RETRIES", "1"))
    for stage in stages:
        one = run_stage.with_options(name=stage.name, task_run_name=stage.name, retries=retries)
        upstream = [outcomes[name] for name in stage.upstream if name in outcomes]
        outcomes[stage.name] = one(str(root), stage, parent_run, status, records, wait_for=upstream)
        if (found := WORDS.get(outcomes[stage.name].status)) is not None:
            get_run_logger().info("%s: %s", stage.name, found, extra=PLAIN)
    return [Step(name, found.status, found.seconds, found.peak_bytes) for name, found in outcomes.items()]
