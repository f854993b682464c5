"""MLflow runs, with an honest status and buffered metrics.

A server that is away costs one warning and never stops the work. Importing mlflow takes longer than most stages: under the flow,
which sets `LDM_RECORDS`, a stage records its run in a file, and the flow's process delivers the file to MLflow.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.base.errors import InputError, reason
from ldm.base.files import locked
from ldm.base.project import find_root
from ldm.registry import locations
from ldm.registry.record import Record, Recorded, digest, read

METRICS, PARAMS = 1000, 100  # MLflow's limits for one request
PARENT = "mlflow.parentRunId"
RETRY_SECONDS = 300.0  # wait after a failed delivery, so that a dead server costs seconds, not minutes
PATIENCE = {  # of recording, where the user has not set it: MLflow's own defaults wait for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
}  # fmt: skip


class Run:
    """What a stage tells about its run. No call raises. A metric that arrives twice is stored once."""

    def __init__(self, destination: "MlflowRun | Record | None" = None) -> None:
        self._destination = destination
        self._buffer: list[tuple[str, float, int, int]] = []  # key, value, timestamp in ms, images seen
        self._wait_until = 0.0
        self._warn = WarnOnce("the work goes on without tracking")

    @property
    def id(self) -> str | None:
        """MLflow's id of the run; None where another process delivers it, or nobody."""
        return self._destination.id if self._destination else None

    @property
    def reference(self) -> str | None:
        """What `LDM_PARENT_RUN` takes: its id, or `record:NAME` if another process delivers it."""
        return self._destination.reference if self._destination else None

    def log(self, metrics: Mapping[str, float], images_seen: int, at: int | None = None) -> None:
        """Buffer metrics at a position of training, measured now or `at` a time in ms; `flush` delivers them."""
        if self._destination:
            stamp = milliseconds() if at is None else at
            self._buffer += [(key, float(value), stamp, images_seen) for key, value in metrics.items()]

    def flush(self) -> None:
        """Deliver the buffer; what cannot be delivered stays for a later flush."""
        while self._buffer and time.monotonic() >= self._wait_until:
            if not self.send("metrics", *self._buffer[:METRICS]):
                self._wait_until = time.monotonic() + RETRY_SECONDS
                return
            del self._buffer[:METRICS]

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or every file of a folder, with the run."""
        self.send("artifact", str(path), folder)

    def state_dict(self) -> dict[str, Any]:
        """The undelivered metrics, JSON-able, for a checkpoint."""
        return {"metrics": [list(metric) for metric in self._buffer]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._destination:
            self._buffer += [(key, value, stamp, seen) for key, value, stamp, seen in state["metrics"]]

    def send(self, call: str, *arguments: Any) -> bool:
        """Make a call of `MlflowRun`, such as "tag" with a dictionary; whether it arrived."""
        try:
            if self._destination:
                self._destination.send(call, *arguments)
        except Exception as error:
            self._warn(error)
            return False
        return self._destination is not None

    def close(self, status: str) -> None:
        self._wait_until = 0.0  # there is no later flush
        self.flush()
        self.send("close", status, milliseconds())


class WarnOnce:
    """Prints the first warning that it is given, and what follows from it."""

    def __init__(self, consequence: str) -> None:
        self.consequence, self.warned = consequence, False

    def __call__(self, warning: object) -> None:
        if not self.warned:
            with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
                print(f"warning: tracking: {warning}; {self.consequence}", file=sys.stderr, flush=True)
        self.warned = True


def use_default_store(root: Path) -> None:
    """Track where MLflow itself looks when it runs in the project's folder and nothing is set."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")


@contextlib.contextmanager
def stage_run(
    stage: str, params: Mapping[str, Any], key: str | None = None, tags: Mapping[str, str] = {}, records: Path | None = None
) -> Iterator[Run]:
    """A stage's run under `LDM_PARENT_RUN`; it ends as FINISHED, FAILED or KILLED. Unless FINISHED, the next one of the same
    `key` continues it, under its own parent.

    With `records` or `LDM_RECORDS`, a folder, it is recorded there, for the flow to deliver.
    """
    destination: MlflowRun | Record | None = None
    if os.environ.get("RANK", "0") == "0":
        if place := records or os.environ.get("LDM_RECORDS"):
            with contextlib.suppress(OSError):  # a full disk
                destination = Record(Path(place))
        elif os.environ.get("MLFLOW_TRACKING_URI"):
            destination = MlflowRun()
    run, status = Run(destination), "FINISHED"
    known = {"ldm.stage": stage, "ldm.key": key, PARENT: os.environ.get("LDM_PARENT_RUN"), "ldm.workspace": _workspace(), **tags}
    run.send("open", {name: value for name, value in known.items() if value}, _flat(params), key, milliseconds())
    try:
        yield run
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception | SystemExit) else "KILLED"  # by Ctrl-C, a scheduler
        raise
    finally:
        run.close(status)


def mlflow_client() -> Any:
    """A client of the store that `MLFLOW_TRACKING_URI` names. Importing mlflow takes 1.5 to 2 s."""
    if database := locations.database_file(os.environ.get("MLFLOW_TRACKING_URI", "")):
        locations.settle(database)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking import MlflowClient

    # a new database would report each of its migrations, and an absent server each attempt, where we warn once
    for name, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    return MlflowClient()


@contextlib.contextmanager
def short_patience() -> Iterator[None]:
    """Give up on a silent server within seconds. MLflow reads `PATIENCE` at every call; uploads of models keep its defaults."""
    added = {name: value for name, value in PATIENCE.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def experiment_id(client: Any) -> str:
    """The id of the experiment, made where it is missing; beside SQLite, artifacts lie in MLflow's usual place."""
    name, uri = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ldm"), os.environ["MLFLOW_TRACKING_URI"]
    if (found := client.get_experiment_by_name(name)) is None:
        database = locations.database_file(uri)
        place = (database.parent / locations.FOLDER / name).as_uri() if database else None  # MLflow decodes plain paths, too
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except Exception:
            if (found := client.get_experiment_by_name(name)) is None:  # else another process made it meanwhile
                raise
    return str(found.experiment_id)


def milliseconds() -> int:
    """Now, as MLflow counts."""
    return time.time_ns() // 1_000_000


class MlflowRun:
    """A run in MLflow."""

    def __init__(self) -> None:
        self.id: str | None = None
        self._stored: dict[str, set[int]] | None = None  # steps by metric, of an earlier part of the run; None: there was none
        self._record = uuid.uuid4().hex  # names what this process, or the record that it delivers, tells of the run
        self.delivered = 0  # lines of its record, if it has one
        self._client: Any = None

    @property
    def reference(self) -> str | None:
        return self.id

    def send(self, call: str, *arguments: Any) -> None:
        """Make a call: "open", "metrics", "tag", "artifact", "dataset" or "close". `ConnectionError` if it fails."""
        try:
            with short_patience():
                self._make(call, arguments)
        except Exception as error:
            raise ConnectionError(f"{os.environ['MLFLOW_TRACKING_URI']}: {call} failed ({reason(error)})") from None

    def _make(self, call: str, arguments: tuple[Any, ...]) -> None:
        client = self._client = self._client or mlflow_client()
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag

        match call, arguments:
            case "open", [tags, params, key, start]:
                self._open(client, tags, params, key, start)
            case _ if self.id is None:
                raise ValueError("the run was not opened")
            case "metrics", metrics:  # key, value, timestamp in ms, step; MLflow ignores one that it has: none is stored twice
                client.log_batch(self.id, [Metric(*metric) for metric in self._missing(client, metrics)])
            case "tag", [tags]:
                client.log_batch(self.id, tags=[RunTag(*tag) for tag in tags.items()])
            case "artifact", [path, folder]:
                store = client.log_artifacts if Path(path).is_dir() else client.log_artifact
                store(self.id, path, folder)
            case "dataset", [name, digest, source, profile]:
                dataset = Dataset(name, digest, "local", json.dumps({"uri": source}), profile=json.dumps(profile))
                client.log_inputs(self.id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
            case "close", [status, end]:  # ms
                client.set_terminated(self.id, status, end)
                for twin in tagged(client, experiment_id(client), "ldm.record", self._record):
                    if twin.info.run_id != self.id:  # MLflow's client repeats a request that was answered too late
                        client.delete_run(twin.info.run_id)
                running = f"tags.`{PARENT}` = '{self.id}' and attributes.status = 'RUNNING'"
                for child in client.search_runs([experiment_id(client)], running):  # it was killed
                    client.set_terminated(child.info.run_id, "KILLED")

    def _open(self, client: Any, tags: dict[str, str], params: Mapping[str, str], key: str | None, start: int) -> None:
        """Begin a run at `start` in ms, or continue that of the same record, or the last of the same key unless it FINISHED."""
        from mlflow.entities import Param, RunTag

        experiment, found = experiment_id(client), None
        self._record = tags.setdefault("ldm.record", self._record)
        for tag, value in (("ldm.record", self._record), ("ldm.key", key)):
            if value and not found:
                runs = tagged(client, experiment, tag, value)
                found = next((run for run in runs[:1] if tag == "ldm.record" or run.info.status != "FINISHED"), None)
        run = found or client.create_run(experiment, start, tags, tags["ldm.stage"])
        self.id, self._stored = str(run.info.run_id), {} if found else None
        if found:
            client.update_run(self.id, status="RUNNING")
            client.log_batch(self.id, tags=[RunTag(*tag) for tag in tags.items()])
        entities = [Param(name, value) for name, value in params.items()]
        for first in range(0, len(entities), PARAMS):
            client.log_batch(self.id, params=entities[first : first + PARAMS])
        # a parent known by its record: the one of the two that is delivered last finds the other
        kind, _, parent = tags.get(PARENT, "").partition(":")
        for one in tagged(client, experiment, "ldm.record", parent) if kind == "record" else ():
            client.set_tag(self.id, PARENT, one.info.run_id)
        for child in tagged(client, experiment, PARENT, f"record:{self._record}"):
            client.set_tag(child.info.run_id, PARENT, self.id)

    def _missing(self, client: Any, metrics: tuple[Any, ...]) -> tuple[Any, ...]:
        """Without the points that an earlier part of the run stored: it got beyond the checkpoint from which this one goes on."""
        if self._stored is None:
            return metrics
        for key in {key for key, *_ in metrics} - self._stored.keys():
            self._stored[key] = {point.step for point in client.get_metric_history(self.id, key)}
        return tuple(metric for metric in metrics if metric[3] not in self._stored[metric[0]])


def tagged(client: Any, experiment: str, tag: str, value: str) -> list[Any]:
    """The runs with this value of a tag, newest first."""
    return list(client.search_runs([experiment], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time DESC"]))


class Records:
    """Delivers the records in a folder to MLflow. What cannot be delivered stays there for a later run of the flow."""

    EVERY = 5.0  # seconds between deliveries while a stage runs

    def __init__(self, folder: Path, away: bool = False) -> None:
        """`away`: MLflow does not answer, which the caller has said already."""
        self.folder = folder.resolve()  # worktrees share it by a link
        self._runs: dict[Path, MlflowRun] = {}
        self._refused: set[str] = set()  # keys, or names of files without one
        self._wait_until = time.monotonic() + RETRY_SECONDS if away else 0.0
        self._warn = WarnOnce(f"records stay in {folder} until a later run delivers them")
        self._warn.warned = away

    @contextlib.contextmanager
    def delivering(self) -> Iterator[None]:
        """Deliver while a stage runs, and once more at its end."""
        ended = threading.Event()

        def repeat() -> None:
            while not ended.wait(self.EVERY):
                self.deliver()

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.deliver()

    def deliver(self) -> None:
        """Deliver the new lines of every file. A run whose process ended without closing it was killed."""
        if not self.folder.is_dir() or time.monotonic() < self._wait_until:
            return
        failed: list[str | None] = []  # keys
        with locked(self.folder.with_name(f"{self.folder.name}.lock")):  # other flows may deliver the same files
            records = [(path, read(path)) for path in sorted(self.folder.glob("*.jsonl"))]
            # what was refused before comes last, and does not hold up others for ever
            for path, recorded in sorted(records, key=lambda one: (one[1].key or one[0].stem) in self._refused):
                if recorded.key and recorded.key in failed:
                    continue  # in order, or parts of one training would become two runs
                try:
                    self._deliver(path, recorded)
                except Exception as error:  # tracking never fails the work
                    self._warn(f"{path} cannot be delivered ({error!s:.200})")
                    self._refused.add(recorded.key or path.stem)
                    failed.append(recorded.key)
                if len(failed) == 2:  # the server fails, not one file
                    self._wait_until = time.monotonic() + RETRY_SECONDS
                    return

    def _deliver(self, path: Path, recorded: Recorded) -> None:
        """Deliver the new lines of a file, and delete it after the last. Nothing is stored twice, also if that was cut short."""
        lines = recorded.lines
        if recorded.ended is not None and lines:  # without lines it was just made, and perhaps not locked yet
            lines.append(json.dumps(["close", ["KILLED", recorded.ended]]))  # comes second to the process's own "close"
        run = self._runs.setdefault(path, MlflowRun())
        for line in lines[run.delivered :]:
            try:
                call, arguments = json.loads(line)
            except ValueError:
                if run.delivered == len(lines) - 1:
                    return  # half written
                call, arguments = "", []
            if call == "open":
                arguments[0]["ldm.record"] = path.stem
            if call == "artifact":
                arguments[0] = os.path.normpath(path.parent / arguments[0])
                if digest(Path(arguments[0])) != arguments.pop():
                    call = ""  # the file has changed since
            if call and (run.id or call == "open"):
                run.send(call, *arguments)
            if call == "close":
                path.unlink()
                return
            run.delivered += 1


def _workspace() -> str | None:
    """The project's folder, or a worktree of it."""
    with contextlib.suppress(InputError):
        return str(find_root())
    return None


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and text."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return flat
