"""The flows of the deployments in infra/prefect.yaml: what a scheduled run does around the pipeline.

It works in the worktree that `flows.workspace`, its command, has prepared, and leaves a commit on a branch runs/SLOT/DATE.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from prefect import flow, get_run_logger
from prefect.events import emit_event
from prefect.states import Completed, Failed, State
from pydantic import Field

from flows import TARGET, last_run, workspace
from flows.pipeline import bring_up_to_date, ingest_batch, opened
from flows.summary import Summary
from flows.supervise import StageFailed, Step
from ldm.base import clock
from ldm.base.errors import InputError
from ldm.base.options import value_at
from ldm.collection import batches, deletions, retention
from ldm.collection.ingest import version
from ldm.config import change_settings, load_settings
from ldm.data.captions import NOT_INGESTED
from ldm.registry import versions
from ldm.versioning.git import git, newest_run
from ldm.versioning.repository import around, read_graph
from ldm.versioning.reproduce import up_to_date
from ldm.versioning.worktree import publish_collection, publish_run, publish_settings, push

Notes = list[tuple[str, str]]  # for the summary
LISTED = 3  # names in a message
PINS = ("autoencoder.pretrained", "train_vae.images", "train_unet.init")  # settings of a run that starts from the champion


def _run_name() -> str:
    return f"{os.environ.get('PREFECT__DEPLOYMENT_NAME', 'ldm')} {clock.now():%Y-%m-%d %H:%M}"


@flow(name=workspace.flow_name(), flow_run_name=_run_name)
def scheduled(
    start: Literal["nothing", "champion"] = "nothing",
    ingest: str | None = None,
    settings: Sequence[str] = (),
    quiet_days: Annotated[int, Field(gt=0)] = 14,
) -> State[Any]:
    """One run of a deployment.

    `start`: train everything from nothing, or keep the champion's autoencoder and go on from its U-Net. `ingest`: a folder whose
    new images are taken in first; a relative one is below the project's. `settings`: changes of params.yaml, as `ldm run --set`
    takes them. `quiet_days`: after so many days without new images, that is reported.
    """
    if busy := os.environ.get(workspace.BUSY):
        return Completed(name="Skipped", message=busy)
    if refusal := os.environ.get(workspace.REFUSED):
        return Failed(message=refusal)
    workspace.follow_worker()
    folder, slot = Path.cwd(), os.environ["PREFECT__DEPLOYMENT_NAME"]
    steps, notes = list[Step](), Notes()
    try:
        with opened(folder, None, data=False) as away:
            _take_collection(folder, slot, ingest, quiet_days, steps, notes)
            state = _run(folder, slot, away, start == "champion", settings, steps, notes)
    except (InputError, StageFailed) as error:
        return last_run.failed(error)
    last_run.end(folder, state)
    return state


def _take_collection(folder: Path, slot: str, inbox: str | None, quiet_days: int, steps: list[Step], notes: Notes) -> None:
    """Honour deletions, take in what is new, and commit both on the branch runs/collection."""

    def publish(pointer: str) -> None:
        publish_collection(folder, pointer, f"{slot}: the collection")

    if inbox:
        inbox = str(Path(os.environ[workspace.ROOT], inbox).expanduser())
        ingested = ingest_batch(folder, inbox, steps, notes, publish)
        days = (clock.now().date() - ingested.newest).days if ingested.newest else 0
        if days and days % quiet_days == 0:
            _news("quiet", slot, f"no new images in {inbox} for {days} days. Is it still filled?")
        if ingested.news:
            listed = "; ".join(f"{name}: {reason}" for name, reason in list(ingested.news.items())[:LISTED])
            _news("left", slot, f"{len(ingested.news)} files stay in {inbox}, {NOT_INGESTED} there says why ({listed}).")
    elif batches.forget(folder):
        publish(version(folder, folder / load_settings(folder).data.path))


def _run(
    folder: Path, slot: str, away: list[str], warm: bool, settings: Sequence[str], steps: list[Step], notes: Notes
) -> State[Any]:
    last = newest_run(folder, slot)
    before = yaml.safe_load(git(folder, "show", f"{last}:./params.yaml")) if last else {}
    pins = [f"{key}={yaml.safe_dump(value_at(before, key)).splitlines()[0]}" for key in PINS if warm and last]
    change_settings(folder, [*pins, *settings])
    stages, others = around(read_graph(folder), TARGET)
    if last and {node.name for node in (*stages, *others)} <= up_to_date(folder):
        return Completed(name="Nothing to do", message=f"no new images and no change since {last}")
    if warm:
        _pin_champion(folder)
        change_settings(folder, list(settings))
    publish_settings(folder, f"{slot}: settings of a run")
    # what fails between the promotion and the branch would let the next run start from the new champion, on the same images
    summary = bring_up_to_date(folder, away, steps, notes, before_registry=lambda: push(folder))
    branch = publish_run(folder, slot, f"{clock.now():%Y-%m-%d}", _message(slot, summary))
    _tell(slot, summary)
    message = f"{branch}: {dict(summary.results)['gate']}"
    try:
        push(folder)  # what stages after the gate have made
    except InputError as error:
        return Completed(message=f"{message}; {error}")
    return Completed(message=message)


def _pin_champion(folder: Path) -> None:
    """Let a run keep the champion's autoencoder and start from its U-Net; without a champion, nothing changes."""
    if (champion := versions.by_alias(load_settings(folder).registry.name, "champion")) is None:
        return
    from ldm.stages.pins import check_pins  # imports torch

    values = (champion.pinned, "0", champion.pinned)
    change_settings(folder, [f"{key}={value}" for key, value in zip(PINS, values, strict=True)])
    try:
        check_pins(folder, load_settings(folder))
    except InputError as error:
        raise InputError(f"{error}; the deployment rebuild makes such a model, and then this one goes on from it") from None


def _message(slot: str, summary: Summary) -> str:
    """A commit's message: what the run did and how good its model is."""
    results = dict(summary.results)
    lines = [f"{what}: {value}" for what, value in summary.results]
    return "\n".join([f"{slot}: {results['model']}, {results['gate']}", "", *lines])


def _tell(slot: str, summary: Summary) -> None:
    """Emit what somebody may want to know as events, which an automation sends (`flows.deployments`)."""
    results = dict(summary.results)
    model, gate = results["model"], results["gate"]
    if gate.startswith("promoted"):
        _news("promoted", slot, f"{model} is champion: {gate}. `ldm registry rollback` takes that back.")
    elif "(new)" in model:
        _news(
            "rejected",
            slot,
            f"{model} is not the champion: {gate}. `ldm registry show` has more, `ldm registry promote` decides.",
        )
    if (found := results.get("new images", "")).startswith("drift"):
        _news("drift", slot, f"{found}. Look at the newest folder of the collection; what does not belong there can be deleted.")


def _news(what: str, slot: str, message: str) -> None:
    emit_event(f"ldm.{what}", {"prefect.resource.id": f"ldm.{slot}"}, payload={"message": message})


@flow(name=f"{workspace.flow_name()}-collect", flow_run_name=_run_name)
def collect(keep: int = 30, purge_days: float = deletions.DAYS, purge_share: float = deletions.SHARE) -> State[Any]:
    """Purge images that were deleted from the collection at least `purge_days` days ago, and remove what accumulates (`ldm gc`):
    all that neither versions with an alias nor the last `keep` runs need. No image goes if that is more than a `purge_share`.
    """
    if busy := os.environ.get(workspace.BUSY):
        return Completed(name="Skipped", message=busy)
    if refusal := os.environ.get(workspace.REFUSED):
        return Failed(message=refusal)
    root, logger = Path.cwd(), get_run_logger()
    try:
        deleted = deletions.purge_deleted(root, purge_days, purge_share)
        table = retention.collect_garbage(root, keep, days=purge_days, listings=deleted.listings)
    except InputError as error:
        return last_run.failed(error)
    for line in (*deleted.lines(), *("  ".join(row.values()) for row in retention.summary(table))):
        logger.info("%s", line)
    said = f"{len(deleted.digests)} deleted images purged; {len(table)} removed, {table['bytes'].sum() / 1e6:,.1f} MB"
    if not deleted.left:
        return Completed(message=said)
    listed = "; ".join(f"{name}: {why}" for name, why in list(deleted.left.items())[:LISTED])
    left = f"of deleted images, {len(deleted.left)} could not be purged and are tried again next time ({listed})"
    _news("left", workspace.COLLECT, left)
    return Completed(message=f"{said}; {left}")
