"""The flow: bring the stages of dvc.yaml up to date, register the model, let the gate decide.

DVC decides what has to run; Prefect adds retries, time limits, cancellation and a record.
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import STARTED, supervise
from flows.summary import Summary, markdown, summarise
from flows.supervise import StageFailed, Step
from ldm.base.errors import InputError
from ldm.base.paths import LATENT_STORE, LATENTS, POSTERIOR, TRACKING
from ldm.config import load_settings
from ldm.data.latents import prune_store
from ldm.registry import lineage, promotion, registration, tracking, versions
from ldm.registry.tracking import Records
from ldm.versioning.graph import Node, ancestors, check_data, descendants, read_graph
from ldm.versioning.reproduce import Status

if TYPE_CHECKING:
    from ldm.collection.ingest import Ingested
    from ldm.evaluation.gate import Decision

WORDS = {"cached": "nothing to do", "restored": "brought back from DVC's cache"}  # for stages that were not executed
TARGET = "evaluate"  # the last stage before registration, which is a side effect and so no stage
PLAIN = {"plain": True}  # marks log lines that `flows.run` shows as they are


def _can_be_retried(_task: Any, _run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    bad_input = isinstance(error, InputError) or (isinstance(error, StageFailed) and error.bad_input)
    return isinstance(error, versions.Unreachable) or not bad_input


_registry_task = task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=_can_be_retried)


@task(cache_policy=NO_CACHE)
def ingest(root: str, inbox: str) -> "Ingested":
    """Move new images from a watched folder into the collection; see `ldm.collection.ingest`."""
    from ldm.collection.ingest import ingest as ingest_folder

    ingested = ingest_folder(Path(root), Path(inbox))
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


@task(cache_policy=NO_CACHE, retry_condition_fn=_can_be_retried, retry_delay_seconds=2)
def run_stage(root: str, stage: str, parent_run: str | None, status: Status, records: Records) -> Step:
    """Run one stage of dvc.yaml as a child process; its lines are this task's log."""
    logger = get_run_logger()
    limit = os.environ.get("LDM_STAGE_TIMEOUT")
    env = {"LDM_RECORDS": str(records.folder)} | ({"LDM_PARENT_RUN": parent_run} if parent_run else {})
    options: dict[str, Any] = {"timeout": float(limit) if limit else None, "env": env}
    try:
        with records.delivering():
            on_line = partial(logger.info, "%s", extra=PLAIN)
            return supervise.run_stage(Path(root), stage, status=status, on_line=on_line, **options)
    except StageFailed as failure:
        if not failure.bad_input:  # shown even if a retry succeeds
            logger.error("%s", failure, extra=PLAIN)
        raise


@_registry_task
def register(root: str, parent_run: str | None) -> registration.Registered:
    """Register the model, once for each content."""
    return registration.register(Path(root), parent_run)


@_registry_task
def gate(root: str, version: int) -> "Decision":
    """Decide whether the model becomes the champion; see `ldm.registry.promotion`."""
    return promotion.gate_and_promote(Path(root), version)


@flow(name="ldm-pipeline", validate_parameters=False)
def pipeline(root: str = ".", inbox: str | None = None) -> Summary:
    """Ingest what is new in `inbox`, bring every stage up to date, register the model, let the gate decide, set the aliases."""
    folder = Path(root).resolve()
    settings = load_settings(folder)
    graph = read_graph(folder)
    others = descendants(graph, TARGET)
    notes: list[tuple[str, str]] = []
    tracking.use_default_store(folder)
    with _alone(folder), lineage.pipeline_run(folder, settings.model_dump()) as run:
        steps = [Step("start", "", time.monotonic() - STARTED)]
        if inbox:
            ingested, seconds = _timed(ingest, str(folder), inbox)
            batch = ingested.batch
            steps.append(Step("ingest", "executed" if batch else "cached", seconds))
            if batch and (folder / POSTERIOR).is_dir():  # of the last run
                notes.append(("new images", check_drift(str(folder), batch)))
            check_data(folder, settings.data.path)
        common = (str(folder), run.id, Status(folder), Records(folder / TRACKING))
        steps += _run_stages(ancestors(graph, TARGET), *common)
        if (folder / LATENTS / "manifest.json").is_file():
            prune_store(folder / LATENT_STORE, folder / LATENTS)
        lineage.log_results(run, folder)
        registered, seconds = _timed(register, str(folder), run.id)
        steps.append(Step("register", "executed" if registered.created else "cached", seconds))
        decision, seconds = _timed(gate, str(folder), registered.version)
        steps.append(Step("gate", "executed" if decision.n else "cached", seconds))
        steps += _run_stages(others, *common)  # after the gate: their failure must not keep a model from its promotion
    champion = versions.by_alias(settings.registry.name, "champion")  # None if the first model's bound is not finite
    summary = summarise(folder, settings, steps, others, registered, decision, champion.version if champion else None, notes)
    create_markdown_artifact(markdown(summary, folder), key="ldm-pipeline-summary")
    for what, value in summary.results:
        get_run_logger().info("%s: %s", what, value)  # for the logs of scheduled runs
    return summary


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Allow one run at a time in a folder: two would change the same files."""
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


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.monotonic()
    return work(*arguments), time.monotonic() - start


def _run_stages(stages: tuple[Node, ...], root: str, parent_run: str | None, status: Status, records: Records) -> list[Step]:
    """Run each stage after those it depends on, in this thread, so that a signal reaches the running child."""
    steps: dict[str, Step] = {}
    retries = int(os.environ.get("LDM_STAGE_RETRIES", "1"))
    for stage in stages:
        one = run_stage.with_options(name=stage.name, task_run_name=stage.name, retries=retries)
        upstream = [steps[name] for name in stage.upstream if name in steps]
        step = steps[stage.name] = one(root, stage.name, parent_run, status, records, wait_for=upstream)
        if step.status in WORDS:
            get_run_logger().info("%s: %s", stage.name, WORDS[step.status], extra=PLAIN)
    return list(steps.values())
