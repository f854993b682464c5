"""MLflow runs, with an honest status and buffered metrics.

A server that is away costs one warning and never stops the work. Importing mlflow takes longer than most stages: under the flow,
which sets `LDM_RECORDS`, a stage records its run in a file, and the flow's process delivers the file to MLflow.
"""

import contextlib
import fcntl
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.base.errors import reason
from ldm.base.files import file_hash, folder_hash
from ldm.registry import locations

METRICS, PARAMS = 1000, 100  # MLflow's limits for one request
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

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Buffer metrics at a position of training; `flush` delivers them."""
        if self._destination:
            now = milliseconds()
            self._buffer += [(key, float(value), now, images_seen) for key, value in metrics.items()]

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
    """A stage's run under `LDM_PARENT_RUN`; it ends as FINISHED, FAILED or KILLED. A retry with the same `key` continues it.

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
    known = {"ldm.stage": stage, "ldm.key": key, "mlflow.parentRunId": os.environ.get("LDM_PARENT_RUN"), **tags}
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
        self.delivered = 0  # lines of its record, if it has one
        self._client: Any = None

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
                self.id = self._open(client, tags, params, key, start)
            case _ if self.id is None:
                raise ValueError("the run was not opened")
            case "metrics", metrics:  # key, value, timestamp in ms, step; MLflow ignores one that it has: none is stored twice
                client.log_batch(self.id, [Metric(*metric) for metric in metrics])
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
                running = f"tags.`mlflow.parentRunId` = '{self.id}' and attributes.status = 'RUNNING'"
                for child in client.search_runs([experiment_id(client)], running):  # it was killed
                    client.set_terminated(child.info.run_id, "KILLED")

    @staticmethod
    def _open(client: Any, tags: Mapping[str, str], params: Mapping[str, str], key: str | None, start: int) -> str:
        """Begin a run at `start` in ms, or continue an earlier one with the same key or record; returns its id."""
        from mlflow.entities import Param

        experiment = experiment_id(client)
        parent, found = tags.get("mlflow.parentRunId"), []
        if "ldm.record" in tags:
            found = client.search_runs([experiment], f"tags.`ldm.record` = '{tags['ldm.record']}'")
        if not found and key:  # a retry has the same key and parent; without a parent, it continues an unfinished run
            runs = client.search_runs([experiment], f"tags.`ldm.key` = '{key}'", order_by=["attributes.start_time DESC"])
            found = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
            found = [run for run in found if parent or run.info.status != "FINISHED"]
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
        run = found[0] if found else client.create_run(experiment, start, dict(tags), tags["ldm.stage"])
        entities = [Param(name, value) for name, value in params.items()]
        for first in range(0, len(entities), PARAMS):
            client.log_batch(run.info.run_id, params=entities[first : first + PARAMS])
        return str(run.info.run_id)


class Record:
    """Writes the record of one run: a file, locked while this process lives, with a JSON line `[call, arguments]` a call."""

    id = None

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{time.time_ns()}-{os.getpid()}.jsonl"
        self._file = self.path.open("ab", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def send(self, call: str, *arguments: Any) -> None:
        """Append a call; `OSError` if it is not written whole."""
        if call == "artifact":
            path, folder = arguments
            arguments = (os.path.relpath(path, self.path.parent), folder, _digest(Path(path)))  # a project may be moved
        line = f"\n{json.dumps([call, arguments])}".encode()  # newline first: a line cut off by a full disk spoils no other
        try:
            if self._file.write(line) != len(line):
                raise OSError(f"{self.path}: the disk is full")
        finally:
            if call == "close":
                self._file.close()


class Records:
    """Delivers the records in a folder to MLflow. What cannot be delivered stays there for a later run of the flow."""

    EVERY = 5.0  # seconds between deliveries while a stage runs

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[Path, MlflowRun] = {}
        self._wait_until = 0.0
        self._warn = WarnOnce(f"records stay in {folder} until a later run delivers them")

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
        failures = 0
        for path in sorted(self.folder.glob("*.jsonl")) if time.monotonic() >= self._wait_until else ():
            try:
                self._deliver(path)
            except Exception as error:  # tracking never fails the work
                self._warn(f"{path} cannot be delivered ({error!s:.200})")
                failures += 1
            if failures == 2:  # the server fails, not one file
                self._wait_until = time.monotonic() + RETRY_SECONDS
                return

    def _deliver(self, path: Path) -> None:
        """Deliver the new lines of a file, and delete it after the last. Nothing is stored twice, also if that was cut short."""
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ended = True
            except BlockingIOError:  # its process lives
                ended = False
            lines = file.read().decode("utf-8", "replace").split("\n")[1:]
        if ended and lines:  # without lines it was just made, and perhaps not locked yet
            lines.append(json.dumps(["close", ["KILLED", milliseconds()]]))  # comes second to the process's own "close"
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
                if _digest(Path(arguments[0])) != arguments.pop():
                    call = ""  # the file has changed since
            if call and (run.id or call == "open"):
                run.send(call, *arguments)
            if call == "close":
                path.unlink()
                return
            run.delivered += 1


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and text."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return flat


def _digest(path: Path) -> str | None:
    """Hash of a file's or folder's content; None where there is none."""
    if not path.exists():
        return None
    return folder_hash(path) if path.is_dir() else file_hash(path)
