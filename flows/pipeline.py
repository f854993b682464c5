"""The flow: DVC decides which stages have to run; Prefect adds retries, time limits, cancellation and a record."""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows import STARTED, supervise
from flows.summary import Summary, markdown, summarise
from flows.supervise import StageFailed, Step
from ldm import doctor
from ldm.base.errors import InputError, env_count, env_positive
from ldm.base.paths import LATENT_STORE, LATENTS, POSTERIOR, TRACKING
from ldm.collection import ingest as ingestion
from ldm.config import load_settings
from ldm.data.latents import prune_store
from ldm.registry import lineage, registration, tracking, versions
from ldm.registry.tracking import Records
from ldm.versioning.repository import Node, alone, ancestors, check_data, read_graph
from ldm.versioning.reproduce import up_to_date

WORDS = {"cached": "nothing to do", "restored": "brought back from DVC's cache"}  # for stages that were not executed
TARGET = "evaluate"  # the last stage before registration, which is a side effect and so no stage
PLAIN = {"plain": True}  # marks log lines that `flows.run` shows as they are


def _can_be_retried(_task: Any, _run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, versions.Unreachable) or not getattr(error, "bad_input", isinstance(error, InputError))


_registry_task = task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=_can_be_retried)
register = _registry_task(registration.register)
gate = _registry_task(registration.gate_and_promote).with_options(name="gate")


@task(cache_policy=NO_CACHE)
def ingest(root: Path, inbox: str) -> ingestion.Ingested:
    """Move new images from a watched folder into the collection; see `ldm.collection.ingest`."""
    ingested = ingestion.ingest(root, Path(inbox))
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
def run_stage(root: Path, stage: str, fresh: bool, parent_run: str | None, records: Records) -> Step:
    """Run one stage of dvc.yaml as a child process, unless it is `fresh`; its lines are this task's log."""
    if fresh:
        return Step(stage, "cached", 0)
    logger, limit = get_run_logger(), env_positive("LDM_STAGE_TIMEOUT", "seconds")
    env = {"LDM_RECORDS": str(records.folder)} | ({"LDM_PARENT_RUN": parent_run} if parent_run else {})
    try:
        with records.delivering():
            return supervise.run_stage(root, stage, on_line=partial(logger.info, "%s", extra=PLAIN), timeout=limit, env=env)
    except StageFailed as failure:
        if not failure.bad_input:  # shown even if a retry succeeds
            logger.error("%s", failure, extra=PLAIN)
        raise


@flow(name="ldm-pipeline", validate_parameters=False)
def pipeline(root: str = ".", inbox: str | None = None, away: list[str] | None = None) -> Summary:
    """Ingest what is new in `inbox`, bring every stage up to date, register the model, let the gate decide, set the aliases.

    `away`: the servers that do not answer, where the caller has made the checks of `ldm.doctor`.
    """
    folder, notes = Path(root).resolve(), list[tuple[str, str]]()
    if away is None:
        warnings = doctor.before_run(folder, data=not inbox)
        away = [warning.subject for warning in warnings]
        for warning in warnings:
            get_run_logger().warning("%s", warning.text)
    records = Records(folder / TRACKING)
    later = records.folder if "MLflow" in away else None
    settings, graph = load_settings(folder), read_graph(folder)
    others = tuple(node for node in graph if TARGET in node.needs)
    tracking.use_default_store(folder)
    with alone(folder), lineage.pipeline_run(folder, settings.model_dump(), records=later) as run:
        steps = [Step("start", "", time.monotonic() - STARTED)]
        if inbox:
            ingested, seconds = _timed(ingest, folder, inbox)
            steps.append(Step("ingest", "executed" if ingested.batch else "cached", seconds))
            if ingested.batch and (folder / POSTERIOR).is_dir():  # of the last run
                notes.append(("new images", check_drift(str(folder), ingested.batch)))
            check_data(folder, settings.data.path)
        if not later:
            records.deliver()  # of runs while MLflow's server was away
        steps += _run_stages(ancestors(graph, TARGET), folder, run.id, records)
        if (folder / LATENTS / "manifest.json").is_file():
            prune_store(folder / LATENT_STORE, folder / LATENTS)
        lineage.log_results(run, folder)
        try:
            registered, seconds = _timed(register, folder, run.id)
            steps.append(Step("register", "executed" if registered.created else "cached", seconds))
            decision, seconds = _timed(gate, folder, registered.version)
            steps.append(Step("gate", "executed" if decision.n else "cached", seconds))
        except versions.Unreachable as error:
            raise InputError(f"{error}; the model is done: `ldm run` registers it later, without training again") from None
        steps += _run_stages(others, folder, run.id, records)  # last: their failure must not keep a model from its promotion
    champion = versions.by_alias(settings.registry.name, "champion")  # None if the first model's bound is not finite
    summary = summarise(folder, settings, steps, others, registered, decision, champion.version if champion else None, notes)
    create_markdown_artifact(markdown(summary, folder), key="ldm-pipeline-summary")
    for what, value in summary.results:
        get_run_logger().info("%s: %s", what, value)  # for the logs of scheduled runs
    return summary


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.monotonic()
    return work(*arguments), time.monotonic() - start


def _run_stages(stages: tuple[Node, ...], root: Path, parent_run: str | None, records: Records) -> list[Step]:
    """Run each stage after those it depends on, in this thread, so that a signal reaches the running child."""
    steps: dict[str, Step] = {}
    retries = env_count("LDM_STAGE_RETRIES", 0, 1)
    fresh, current = {stage.name for stage in stages}, False  # DVC is asked before the first stage, and after one has run
    for stage in stages:
        if stage.name in fresh and not current:
            fresh, current = up_to_date(root), True
        one = run_stage.with_options(name=stage.name, task_run_name=stage.name, retries=retries)
        upstream = [steps[name] for name in stage.upstream if name in steps]
        step = steps[stage.name] = one(root, stage.name, stage.name in fresh, parent_run, records, wait_for=upstream)
        current = current and stage.name in fresh
        if step.status in WORDS:
            get_run_logger().info("%s: %s", stage.name, WORDS[step.status], extra=PLAIN)
    return list(steps.values())
