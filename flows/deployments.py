"""What a schedule needs on a Prefect server: work pool, deployments, and the automation that tells of runs that died."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.states import Running
from pydantic import ValidationError

from flows import last_run, workspace
from flows.workspace import FILE
from ldm.base.errors import InputError
from ldm.base.files import content_hash
from ldm.versioning.git import git
from ldm.versioning.worktree import WORKTREES

TRIES = 3  # times that a run which died is started
REPORT_SECONDS = 8.0  # in which a worker that lives reports, twice, that a run has died, over whatever was said before
RECENT = 20  # runs that are looked at
HEARTBEAT_SECONDS = 30  # between two signs of life of a run, the shortest that Prefect has
NAMES = ("Completed", "Failed", "Crashed", "Cancelled")
ENDS = {f"prefect.flow-run.{name}" for name in (*NAMES, "AwaitingRetry", "Nothing to do", "Skipped")}


def apply(root: Path, branch: str, client: SyncPrefectClient) -> None:
    """Create or change all of it; what is as it should be stays."""
    _check(root)
    with contextlib.suppress(ObjectAlreadyExists):  # or the worker makes it
        client.create_work_pool(WorkPoolCreate(name=pool(root), type="process"))
    words = {"LDM_PYTHON": shlex.quote(sys.executable), "LDM_BRANCH": shlex.quote(branch)}  # of a command
    env = {**os.environ, **words, "LDM_ROOT": str(root), "LDM_POOL": pool(root)}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", FILE]
    done = subprocess.run(command, cwd=root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{root / FILE}: Prefect refuses it ({(done.stderr or done.stdout).strip().splitlines()[-1]}); mend it")
    _automate(client)


def _check(root: Path) -> None:
    """What Prefect would not say in one line, or only when a run starts."""
    try:
        for each in yaml.safe_load((root / FILE).read_text(encoding="utf-8"))["deployments"]:
            if mistake := _mistake(each):
                raise InputError(f"{root / FILE}: {each['name']}: {mistake}")
    except (yaml.YAMLError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{root / FILE}: cannot be read ({' '.join(str(error).split())}); mend it") from None


def _mistake(deployment: dict[str, Any]) -> str:
    """What is wrong with one; nothing if all is well."""
    from flows import scheduled  # imports all that a run needs

    module, _, name = str(deployment["entrypoint"]).rpartition(".")
    flow = getattr(scheduled, name, None) if module == scheduled.__name__ else None
    if flow and (unknown := sorted({*deployment.get("parameters", {})} - {*flow.parameters.properties})):
        return f"no parameter {unknown[0]!r}; there are {', '.join(sorted(flow.parameters.properties))}"
    try:
        for schedule in deployment.get("schedules", []):
            if "cron" in schedule and "{{" not in str(schedule):  # which Prefect would fill in
                CronSchedule(cron=schedule["cron"], timezone=schedule.get("timezone"))
    except ValidationError as error:
        found = error.errors()[0]["msg"].removeprefix("Value error, ")
        return f"{found}; minute, hour, day, month, weekday, as '0 3 * * *'"
    return ""


def pool(root: Path) -> str:
    """The work pool of a project on this machine: a team's server has others', whose processes cannot be seen from here."""
    return f"{workspace.flow_name()}-{platform.node()}-{content_hash(str(root).encode())[:6]}"


class Settler:
    """Tells the server which runs of this machine's pool have no process any more, and has them tried again."""

    def __init__(self, root: Path) -> None:
        self._pool = pool(root)
        self._worktrees, self._within = root / WORKTREES, git(root, "rev-parse", "--show-prefix")
        self._dead: dict[UUID, float] = {}  # since when a run has been seen without a process

    def settle(self, client: SyncPrefectClient) -> None:
        """Of runs that have started and of those that are about to; an older run of a deployment is not tried again."""
        alive, now, later, pool = _alive(), time.monotonic(), set[UUID | None](), WorkPoolFilterName(any_=[self._pool])
        pending = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING]))
        started = FlowRunFilterStartTime(is_null_=False)
        for wanted in (FlowRunFilter(state=pending), FlowRunFilter(start_time=started)):
            for run in client.read_flow_runs(
                work_pool_filter=WorkPoolFilter(name=pool), flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC, limit=RECENT
            ):  # fmt: skip
                tries = 0 if run.deployment_id in later else TRIES
                later |= {run.deployment_id} if run.start_time else set()
                waits = run.state is not None and run.state.is_scheduled()  # such as one that is to be tried again
                if str(run.id) in alive or waits or (run.state and run.state.is_final() and not run.state.is_crashed()):
                    self._dead.pop(run.id, None)
                    if run.state and run.state.is_crashed():  # its signs of life were lost with a server
                        client.set_flow_run_state(run.id, Running(message="it is at work"), force=True)
                elif run.deployment_id and now > self._dead.setdefault(run.id, now) + REPORT_SECONDS:
                    slot = client.read_deployment(run.deployment_id).name
                    if state := last_run.true_state(run, last_run.read(self._worktrees / slot / self._within), tries):
                        client.set_flow_run_state(run.id, state, force=True)
                        del self._dead[run.id]  # started again, it has as long once more until it has a process
                        print(f"{run.name}: {state.name}, {state.message}", flush=True)


def _alive() -> set[str]:
    """The runs that a process of this user works at."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            found.add(process.environ().get("PREFECT__FLOW_RUN_ID", ""))
    return found


def _automate(client: SyncPrefectClient) -> None:
    """The project's automations, which are known by their names, are made anew."""
    wanted = [_crash(), *(made for name in os.environ.get("LDM_NOTIFY", "").split() for made in _notify(client, name))]
    for known in client.read_automations():
        if known.name.startswith(f"{workspace.flow_name()}: "):
            client.delete_automation(known.id)
    for automation in wanted:
        client.create_automation(automation)


def _ours() -> dict[str, str | list[str]]:
    """Events of this project's flows, and of no others on the server."""
    name = workspace.flow_name()
    return {"prefect.resource.role": "flow", "prefect.resource.name": [name, f"{name}-collect"]}


def _crash() -> AutomationCore:
    """A run whose process, machine or container is gone is Crashed, also if nobody is left to say so."""
    heartbeat = "prefect.flow-run.heartbeat"
    silence = EventTrigger(
        after={heartbeat}, expect={heartbeat, *ENDS}, match={"prefect.resource.id": "prefect.flow-run.*"}, match_related=_ours(),
        for_each={"prefect.resource.id"}, posture=Posture.Proactive, threshold=1, within=timedelta(seconds=3 * HEARTBEAT_SECONDS),
    )  # fmt: skip
    said = "no sign of life for 90 s: its process, machine or container is gone"
    crash = ChangeFlowRunState(name=None, state=StateType.CRASHED, message=said, force=False)
    return AutomationCore(
        name=f"{workspace.flow_name()}: a run without a sign of life has crashed", trigger=silence, actions=[crash]
    )


def _notify(client: SyncPrefectClient, name: str) -> Iterator[AutomationCore]:
    """Send failures and news to a block of Prefect's that can notify: TYPE/NAME, such as custom-webhook/team."""
    kind, _, called = name.partition("/")
    try:
        block = client.read_block_document_by_name(called, kind).id
    except ObjectNotFound:
        raise InputError(f"LDM_NOTIFY names {name!r}, and Prefect has no such block; create it on its page Blocks") from None
    subject, body = "{{ deployment.name }}: {{ flow_run.state.name }}", "{{ flow_run.state.message }} {{ flow_run|ui_url }}"
    for what, events, related, texts in (
        ("failures", {"prefect.flow-run.Failed", "prefect.flow-run.Crashed"}, _ours(), (subject, body)),
        ("news", {"ldm.*"}, {}, ("{{ event.event }}", "{{ event.payload.message }}")),
    ):
        trigger = EventTrigger(
            expect=events, match_related=related, for_each={"prefect.resource.id"}, posture=Posture.Reactive, threshold=1,
            within=timedelta(0),
        )  # fmt: skip
        send = SendNotification(block_document_id=block, subject=texts[0], body=texts[1])
        yield AutomationCore(name=f"{workspace.flow_name()}: {what} to {name}", trigger=trigger, actions=[send])
