"""MLflow runs of stages, with an honest status and buffered metrics.

Tracking is on where `MLFLOW_TRACKING_URI` is set. Importing mlflow takes longer than most stages: under the flow, which sets
`LDM_RECORDS`, a stage records its run in a file, and the flow's process delivers the file to MLflow.
"""

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.base.hashing import file_hash, folder_hash
from ldm.registry.mlflow_run import METRICS, MlflowRun, WarnOnce, milliseconds

RETRY_SECONDS = 300.0  # wait after a failed delivery, so that a dead server costs seconds, not minutes


class Run:
    """What a stage tells about its run. Without a destination every call does nothing; no call raises.

    A metric that arrives twice is stored once, so a checkpoint may carry undelivered metrics: write it first, then `flush`.
    """

    def __init__(self, destination: "MlflowRun | Record | None" = None) -> None:
        self._destination = destination
        self._buffer: list[tuple[str, float, int, int]] = []  # key, value, timestamp in ms, images seen
        self._wait_until = 0.0

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
        return self._destination is not None and self._destination.send(call, *arguments)

    def close(self, status: str) -> None:
        self._wait_until = 0.0  # there is no later flush
        self.flush()
        self.send("close", status, milliseconds())


def use_default_store(root: Path) -> None:
    """Track where MLflow itself looks when it runs in the project's folder and nothing is set."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")


@contextlib.contextmanager
def stage_run(
    stage: str, params: Mapping[str, Any], key: str | None = None, tags: Mapping[str, str] | None = None
) -> Iterator[Run]:
    """A run for one stage, nested under `LDM_PARENT_RUN`; it ends as FINISHED, FAILED or KILLED, whatever happened.

    `key` names the work: a retry with the same key and parent continues the earlier run instead of opening a second.
    """
    destination: MlflowRun | Record | None = None
    if os.environ.get("RANK", "0") == "0":
        if records := os.environ.get("LDM_RECORDS"):
            with contextlib.suppress(OSError):  # a full disk
                destination = Record(Path(records))
        elif os.environ.get("MLFLOW_TRACKING_URI"):
            destination = MlflowRun(WarnOnce("the work goes on without tracking"))
    run, status = Run(destination), "FINISHED"
    known = {"ldm.stage": stage, "ldm.key": key, "mlflow.parentRunId": os.environ.get("LDM_PARENT_RUN"), **(tags or {})}
    run.send("open", {name: value for name, value in known.items() if value}, _flat(params), key, milliseconds())
    try:
        yield run
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception | SystemExit) else "KILLED"  # by Ctrl-C, a scheduler
        raise
    finally:
        run.close(status)


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and text."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return flat


class Record:
    """Writes the record of one run: a file in `folder` with a JSON line `[call, arguments]` for each call.

    The file is locked while this process lives. Each line begins with its newline: one that a full disk cuts off spoils no other.
    """

    id = None

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{time.time_ns()}-{os.getpid()}.jsonl"
        self._file = self.path.open("ab", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def send(self, call: str, *arguments: Any) -> bool:
        """Append a call; whether it is written."""
        if call == "artifact":
            arguments = (*arguments, _digest(Path(arguments[0])))
        line = f"\n{json.dumps([call, arguments])}".encode()
        try:
            return self._file.write(line) == len(line)
        except OSError:
            return False
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
        if time.monotonic() < self._wait_until:
            return
        failures = 0
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                failures += not self._deliver(path)
            except Exception as error:  # tracking never fails the work
                self._warn(f"{path} cannot be delivered ({error!r:.200})")
                failures += 1
            if failures == 2:  # the server fails, not one file
                self._wait_until = time.monotonic() + RETRY_SECONDS
                return

    def _deliver(self, path: Path) -> bool:
        """Deliver the new lines of a file, and delete it after the last; False where MLflow failed."""
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ended = True
            except BlockingIOError:  # its process lives
                ended = False
            lines = file.read().decode("utf-8", "replace").split("\n")[1:]
        if not lines:
            return True  # just made, and perhaps not locked yet
        if ended:
            lines.append(json.dumps(["close", ["KILLED", milliseconds()]]))  # comes second to the process's own "close"
        run = self._runs.setdefault(path, MlflowRun(self._warn))
        for line in lines[run.delivered :]:
            try:
                call, arguments = json.loads(line)
            except ValueError:
                if run.delivered == len(lines) - 1:
                    return True  # half written
                call, arguments = "", []
            if call == "open":
                arguments[0]["ldm.record"] = path.stem
            if call == "artifact" and _digest(Path(arguments[0])) != arguments.pop():
                call = ""  # the file has changed since
            if call and (run.id or call == "open") and not run.send(call, *arguments):
                return False  # the next delivery goes on here; another process begins anew, and nothing is stored twice
            if call == "close":
                path.unlink()
                return True
            run.delivered += 1
        return True


def _digest(path: Path) -> str | None:
    """Hash of a file's or folder's content; None where there is none."""
    if not path.exists():
        return None
    return folder_hash(path) if path.is_dir() else file_hash(path)
