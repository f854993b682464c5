"""The stages of dvc.yaml as Prefect's tasks: each after those that it depends on, independent ones at once."""

import contextvars
import logging
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import FailedRun
from prefect.tasks import exponential_backoff

from flows import gpus, supervise
from flows.supervise import StageFailed, Step
from ldm.base.errors import InputError, env_count, env_positive
from ldm.registry import versions
from ldm.registry.tracking import Records
from ldm.stages.stage import BUSY
from ldm.versioning.repository import Node
from ldm.versioning.reproduce import up_to_date

WORDS = {"cached": "nothing to do", "restored": "brought back from DVC's cache"}  # for stages that were not executed
PLAIN = {"plain": True}  # marks log lines that `flows.run` shows as they are
AT_ONCE = 4  # stages
BUSY_SECONDS = 10.0  # between looks at a training that another run does


def _in_one_line(record: logging.LogRecord) -> bool:
    """What a stage, an input error or a failed run says is all that there is to say: no traceback in Prefect's logs."""
    if record.exc_info and isinstance(record.exc_info[1], InputError | StageFailed | FailedRun):
        record.exc_info = None
    return True


for name in ("prefect.task_runs", "prefect.flow_runs", "prefect.engine"):
    logging.getLogger(name).addFilter(_in_one_line)


def can_be_retried(_task: Any, _run: Any, state: Any) -> bool:
    error = state.result(raise_on_failure=False)
    if isinstance(error, StageFailed):
        return not (error.bad_input or error.stopped)
    return isinstance(error, versions.Unreachable) or not isinstance(error, InputError)


class Work:
    """What the stages of one run of the flow share."""

    def __init__(self, root: Path, parent_run: str | None, records: Records, fresh: set[str]) -> None:
        self.root, self.parent_run, self.records = root, parent_run, records
        self.stopped = threading.Event()  # the run ends: every child is stopped
        self.spent: dict[str, list[float]] = {}  # seconds of failed attempts at a stage
        self._fresh: set[str] | None = fresh

    def is_fresh(self, stage: str) -> bool:
        """Whether a stage whose upstream stages have ended has nothing to do. DVC is asked again after one has run."""
        self._fresh = up_to_date(self.root) if self._fresh is None else self._fresh
        return stage in self._fresh

    def ended(self, step: Step) -> None:
        if step.status != "cached":
            self._fresh = None


@task(
    cache_policy=NO_CACHE, retry_condition_fn=can_be_retried, retry_delay_seconds=exponential_backoff(2), retry_jitter_factor=0.5
)
def run_stage(work: Work, node: Node, fresh: bool) -> Step:
    """Run one stage of dvc.yaml as a child process, unless it is `fresh`; its lines are this task's log."""
    if fresh:
        return Step(node.name, "cached", 0)
    logger, spent = get_run_logger(), work.spent.setdefault(node.name, [])
    limit = env_positive("LDM_STAGE_TIMEOUT", "seconds", float(node.meta.get("timeout", "inf")))
    env = {"LDM_RECORDS": str(work.records.folder)} | ({"LDM_PARENT_RUN": work.parent_run} if work.parent_run else {})
    said, again, errors = set[str](), False, [""]

    def tell(line: str) -> None:
        if not (again and line in said):
            logger.info("%s", line, extra=PLAIN)
        said.add(line)
        if line.startswith("error: "):
            errors.append(line.removeprefix("error: "))

    with gpus.take(node.meta, work.stopped, tell) as devices:
        while True:
            try:
                env |= devices
                step = supervise.run_stage(work.root, node.name, on_line=tell, timeout=limit, env=env, stopped=work.stopped)
                return step.after(spent)
            except StageFailed as failure:
                if failure.exit_code == BUSY and not work.stopped.wait(BUSY_SECONDS):
                    again = True  # another run trains this very model: when it has ended, DVC has the outs
                    continue
                spent.append(failure.seconds)
                failure.said = errors[-1]
                if not (failure.bad_input or failure.stopped):  # shown even if a retry succeeds
                    logger.error("%s", failure, extra=PLAIN)
                raise


def run_stages(stages: tuple[Node, ...], work: Work) -> list[Step]:
    """Run the stages, in threads: those that need no other one that is still to run, at once."""
    steps, running, names = dict[str, Step](), dict[Future[Step], str](), {stage.name for stage in stages}
    failure: BaseException | None = None
    with ThreadPoolExecutor(AT_ONCE) as threads, work.records.delivering():
        try:
            while running or (len(steps) < len(stages) and not failure):
                waiting = [stage for stage in stages if stage.name not in {*steps, *running.values()}]
                for stage in waiting if not failure else ():
                    if not stage.upstream & names <= steps.keys():
                        continue
                    retries = env_count("LDM_STAGE_RETRIES", 0, int(stage.meta.get("retries", 1)))
                    one = run_stage.with_options(name=stage.name, task_run_name=stage.name, retries=retries)
                    upstream = [steps[name] for name in stage.upstream if name in steps]
                    call = partial(one, work, stage, work.is_fresh(stage.name), wait_for=upstream)
                    running[threads.submit(contextvars.copy_context().run, call)] = stage.name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    if failure := failure or future.exception():
                        continue
                    step = steps[name] = future.result()
                    work.ended(step)
                    if step.status in WORDS:
                        get_run_logger().info("%s: %s", name, WORDS[step.status], extra=PLAIN)
        except BaseException:  # also a signal, which reaches this thread
            work.stopped.set()
            raise
    if failure:
        raise failure
    return [steps[stage.name] for stage in stages]
