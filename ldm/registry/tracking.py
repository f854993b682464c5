"""MLflow runs with an honest status and buffered metrics; nothing here is allowed to fail or stall the work it records.

Tracking is on where `MLFLOW_TRACKING_URI` is set, and only then is mlflow imported. Stages nest under the run that
`LDM_PARENT_RUN` names. Importing mlflow takes longer than most stages, so under the flow a stage only writes a record to the
folder `LDM_RECORDS`, which the flow's process delivers (`Records`); alone it speaks to MLflow itself.

MLflow ignores a metric that it already has (same key, value, timestamp and step), so delivering a checkpoint's metrics twice
doubles nothing: checkpoint first, then `flush`.
"""

import contextlib
import fcntl
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ldm.base.hashing import file_hash, folder_hash

EXPERIMENT = "ldm"
BATCH = 1000  # metrics a request, MLflow's limit
RETRY_SECONDS = 300.0  # after a failed delivery the next one waits, so that a dead server costs a stage seconds, not minutes
PATIENCE = {  # of a stage, where the user has not set it: MLflow's own defaults wait for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
}


class Run:
    """One MLflow run, or nothing at all where tracking is off or its server does not answer."""

    def __init__(self, *, tracked: bool = False, kept: Path | None = None) -> None:
        self.id: str | None = None
        self._tracked = tracked  # buffer even when the server is away: a checkpoint may carry the metrics to a later run
        self._client: Any = None
        self._buffer: list[tuple[str, float, int, int]] = []  # key, value, timestamp in ms, images seen
        self._wait_until = 0.0
        self._warned = False
        self._kept = kept  # where a record stays if it cannot be delivered

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Buffer metrics at a position of training; `flush` delivers them."""
        if self._tracked:
            now = time.time_ns() // 1_000_000
            self._buffer.extend((key, float(value), now, images_seen) for key, value in metrics.items())

    def flush(self) -> None:
        """Deliver the buffer; what cannot be delivered stays for the next flush."""
        if self._client is not None and self._buffer and time.monotonic() >= self._wait_until:
            self._deliver()

    def artifact(self, path: Path, folder: str | None = None) -> bool:
        """Store a file (or every file of a folder) with the run; whether it is stored."""
        if self._client is None:
            return False
        store = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        return self._attempt(f"{path} was not stored", lambda: store(self.id, str(path), folder))

    def tag(self, tags: Mapping[str, str]) -> bool:
        """Set tags of the run; whether they are set."""
        if self._client is None:
            return False
        entities = [_entities().RunTag(key, value) for key, value in tags.items()]
        return self._attempt("tags were not stored", lambda: self._client.log_batch(self.id, tags=entities))

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> bool:
        """Record a data set as the run's input; whether it is recorded."""
        if self._client is None:
            return False
        entities = _entities()
        dataset = entities.Dataset(name, digest, "local", json.dumps({"uri": source}), profile=json.dumps(profile))
        inputs = [entities.DatasetInput(dataset, [entities.InputTag("mlflow.data.context", "training")])]
        return self._attempt("the data set was not recorded", lambda: self._client.log_inputs(self.id, inputs))

    def state_dict(self) -> dict[str, Any]:
        """The undelivered metrics, JSON-able, for a checkpoint."""
        return {"metrics": [list(metric) for metric in self._buffer]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._tracked:
            self._buffer = [(key, value, stamp, seen) for key, value, stamp, seen in state["metrics"]] + self._buffer

    def _open(self, tags: Mapping[str, str], params: Mapping[str, Any], key: str | None, start: int | None = None) -> bool:
        """Begin, or go on with an earlier run of the same key or record; `start` in ms. Whether that worked."""

        def connect() -> None:
            _knock(uri)
            client, entities = mlflow_client(), _entities()
            experiment = experiment_id(client)
            self.id = _earlier_run(client, experiment, tags, key)
            if self.id:
                client.update_run(self.id, status="RUNNING")
            else:
                self.id = client.create_run(experiment, start, dict(tags), tags["ldm.stage"]).info.run_id
            pairs = [entities.Param(name, str(value)) for name, value in flatten(params).items()]
            for first in range(0, len(pairs), 100):
                client.log_batch(self.id, params=pairs[first : first + 100])
            self._client = client

        uri = os.environ["MLFLOW_TRACKING_URI"]
        lost = (
            f"its record stays in {self._kept} until a later run delivers it"
            if self._kept
            else "the work goes on without tracking"
        )
        opened = self._attempt(f"{uri} cannot be used; {lost}", connect)
        if not opened:
            self.id = None
        return opened

    def _deliver(self) -> bool:
        metric = _entities().Metric
        while self._buffer:
            batch = [metric(key, value, stamp, seen) for key, value, stamp, seen in self._buffer[:BATCH]]
            send = functools.partial(self._client.log_batch, self.id, batch)
            if not self._attempt("metrics wait for the next delivery", send):
                self._wait_until = time.monotonic() + RETRY_SECONDS
                return False
            del self._buffer[:BATCH]
        return True

    def _close(self, status: str, end: int | None = None) -> bool:
        """End the run; `end` in ms. Whether all of it was delivered."""
        if self._client is None:
            return False
        delivered = self._deliver()
        return self._attempt("its status was not stored", lambda: self._client.set_terminated(self.id, status, end)) and delivered

    def _attempt(self, what: str, call: Callable[[], Any]) -> bool:
        """Call MLflow briefly; a failure is one warning per run, never an exception."""
        try:
            with short_patience():
                call()
        except Exception as error:
            if not self._warned:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                print(f"warning: tracking: {what} ({reason})", file=sys.stderr, flush=True)
            self._warned = True
            return False
        return True


class _Record(Run):
    """A run as a file of JSON lines, for `Records` to deliver; locked for as long as this process writes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(tracked=True)
        self._path = folder / f"{time.time_ns()}-{os.getpid()}.jsonl"
        self._file: Any = None

    def flush(self) -> None:
        if self._buffer and self._write("metrics", self._buffer):
            self._buffer = []

    def artifact(self, path: Path, folder: str | None = None) -> bool:
        return self._write("artifact", [str(path), folder, _digest(path)])

    def tag(self, tags: Mapping[str, str]) -> bool:
        return self._write("tag", [dict(tags)])

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> bool:
        return self._write("dataset", [name, digest, source, dict(profile)])

    def _open(self, tags: Mapping[str, str], params: Mapping[str, Any], key: str | None, start: int | None = None) -> bool:
        values = {name: str(value) for name, value in flatten(params).items()}
        with contextlib.suppress(OSError):  # the disk may be full, and the work goes on
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new = self._path.with_suffix(".new")
            self._file = new.open("ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if self._write("open", [{**tags, "ldm.record": self._path.stem}, values, key, time.time_ns() // 1_000_000]):
                os.rename(new, self._path)  # from here on it may be delivered
        return True

    def _close(self, status: str, end: int | None = None) -> bool:
        self.flush()
        self._write("close", [status, time.time_ns() // 1_000_000])
        if self._file is not None:
            self._file.close()
        return True

    def _write(self, what: str, values: Any) -> bool:
        """One whole line, or nothing."""
        if self._file is None:
            return False
        line, size = (json.dumps([what, values]) + "\n").encode(), os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) == len(line):
                return True
        except OSError:
            pass
        with contextlib.suppress(OSError):
            os.ftruncate(self._file.fileno(), size)
        return False


class Records:
    """Delivers to MLflow what stages record in a folder. What cannot be delivered stays there for a later run of the flow."""

    EVERY = 5.0  # seconds between deliveries while a stage runs

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, tuple[Run, int]] = {}  # the run of each file, and how many of its lines are delivered
        self._wait_until = 0.0
        self._warned = False

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Deliver while a stage runs, and once more at its end."""
        ended = threading.Event()

        def follow() -> None:
            while not ended.wait(self.EVERY):
                self.deliver()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.deliver()

    def deliver(self) -> None:
        """Deliver what is new in every file. A run whose process is gone without closing it was killed."""
        if time.monotonic() < self._wait_until:
            return
        failures = 0
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                failures += not self._deliver(path)
            except Exception as error:  # tracking never fails the work
                self._warn(f"{path} cannot be delivered ({error!r:.200})")
                failures += 1
            if failures == 2:  # it is not this file's fault
                self._wait_until = time.monotonic() + RETRY_SECONDS
                return

    def _deliver(self, path: Path) -> bool:
        with path.open("rb") as file:
            killed = _is_free(file)
            written = file.read().decode("utf-8", "replace").split("\n")[:-1]  # the last may be half a line
        run, done = self._known.get(path) or (Run(tracked=True, kept=self.folder), 0)
        run._warned = self._warned  # one warning for all of them
        for what, values in _parsed(written[done:], killed):
            if run.id is None and what != "open":
                self._warn(f"{path} does not begin as a record does; it is set aside")
                path.rename(path.with_suffix(".bad"))
                return True
            if not self._pass_on(run, what, values):
                self._warned |= run._warned
                return False  # it comes again from here, or from the beginning with another process: nothing doubles
            if what == "close":
                self._known.pop(path, None)
                path.unlink()
                return True
            done += 1
            self._known[path] = run, done
        return True

    @staticmethod
    def _pass_on(run: Run, what: str, values: list[Any]) -> bool:
        if what == "metrics":
            run._buffer.extend(map(tuple, values))
            run.flush()
            return True  # what is left goes with the next flush, or with the run's end
        if what == "artifact":
            path, folder, digest = Path(values[0]), values[1], values[2]
            return _digest(path) != digest or run.artifact(path, folder)  # another model's by now
        calls: dict[str, Callable[..., bool]] = {"open": run._open, "tag": run.tag, "dataset": run.dataset, "close": run._close}
        return what not in calls or calls[what](*values)

    def _warn(self, what: str) -> None:
        if not self._warned:
            print(f"warning: tracking: {what}", file=sys.stderr, flush=True)
        self._warned = True


def _parsed(lines: list[str], killed: bool) -> Iterator[tuple[str, list[Any]]]:
    """The entries of a record, without what a full disk has garbled; of a killed process, with its end."""
    what = ""
    for line in lines:
        try:
            what, values = json.loads(line)
        except (ValueError, TypeError):
            what, values = "garbled", []
        yield what, values
    if killed and what != "close":
        yield "close", ["KILLED", time.time_ns() // 1_000_000]


def _is_free(file: Any) -> bool:
    """Whether no process holds the lock of an open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _digest(path: Path) -> str | None:
    """Identity of a file's or folder's content."""
    if not path.exists():
        return None
    return folder_hash(path) if path.is_dir() else file_hash(path)


def _knock(uri: str) -> None:
    """Raise OSError at once where nothing listens: MLflow's own attempts take many seconds, its import some too."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname, port), timeout=4).close()


@contextlib.contextmanager
def stage_run(
    stage: str, params: Mapping[str, Any], key: str | None = None, tags: Mapping[str, str] | None = None
) -> Iterator[Run]:
    """A run for one stage, nested under `LDM_PARENT_RUN`; it ends as FINISHED, FAILED or KILLED, whatever happened.

    `key` names the work: a retry with the same key and parent continues the earlier run instead of opening a second.
    """
    known = {"ldm.stage": stage, "ldm.key": key, "mlflow.parentRunId": os.environ.get("LDM_PARENT_RUN"), **(tags or {})}
    with open_run({name: value for name, value in known.items() if value}, params, key) as run:
        yield run


def use_default_store(root: Path) -> None:
    """Track where MLflow itself looks when it runs in the project's folder and nothing is set."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


@contextlib.contextmanager
def open_run(tags: Mapping[str, str], params: Mapping[str, Any], key: str | None) -> Iterator[Run]:
    tracked, records = os.environ.get("RANK", "0") == "0", os.environ.get("LDM_RECORDS")
    run = _Record(Path(records)) if tracked and records else Run(tracked=tracked and bool(os.environ.get("MLFLOW_TRACKING_URI")))
    with _sigterm_raises():
        if run._tracked:
            run._open(tags, params, key)
        try:
            yield run
        except Exception:
            run._close("FAILED")
            raise
        except SystemExit as stop:
            run._close("FINISHED" if not stop.code else "KILLED" if stop.code in (130, 143) else "FAILED")
            raise
        except BaseException:  # KeyboardInterrupt, a scheduler's own termination signals
            run._close("KILLED")
            raise
        run._close("FINISHED")


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143), unless someone handles it already."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def short_patience() -> Iterator[None]:
    """MLflow reads these at every call; only our recording is impatient, not the user's uploads of models."""
    added = [name for name in PATIENCE if name not in os.environ]
    os.environ.update({name: PATIENCE[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def mlflow_client() -> Any:
    """A client of the store that `MLFLOW_TRACKING_URI` names. Importing mlflow takes 1.5 to 2 s."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import logging

    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # a new database would report each of its migrations
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient()


def _entities() -> Any:
    import mlflow.entities

    return mlflow.entities


def experiment_id(client: Any) -> str:
    """The id of the experiment, made where it is missing; beside SQLite, artifacts lie in MLflow's usual place."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    if found is None:
        uri = os.environ["MLFLOW_TRACKING_URI"]
        database = uri.removeprefix("sqlite:///")
        place = str(Path(database).absolute().parent / "mlruns" / name) if database != uri else None
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except Exception:  # another process may have made it meanwhile
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def _earlier_run(client: Any, experiment: str, tags: Mapping[str, str], key: str | None) -> str | None:
    """The run that a retry continues: same key and parent; without a parent, one that has not finished. Or that of a record."""
    if record := tags.get("ldm.record"):
        for run in client.search_runs([experiment], f"tags.`ldm.record` = '{record}'"):
            return str(run.info.run_id)
    if not key:
        return None
    parent = tags.get("mlflow.parentRunId")
    for run in client.search_runs([experiment], f"tags.`ldm.key` = '{key}'", order_by=["attributes.start_time DESC"]):
        if run.data.tags.get("mlflow.parentRunId") == parent and (parent or run.info.status != "FINISHED"):
            return str(run.info.run_id)
    return None
