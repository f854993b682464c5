"""MLflow runs of stages, with an honest status and buffered metrics.

Tracking is on where `MLFLOW_TRACKING_URI` is set, and only then is mlflow imported. Stages nest under the run that
`LDM_PARENT_RUN` names. Where `LDM_RECORDS` names a folder, a stage only writes a record there (`ldm.registry.records`).
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.registry.mlflow_run import BATCH, MlflowRun, WarnOnce
from ldm.registry.records import RETRY_SECONDS, Record


class Run:
    """What a stage tells about its run. Without a destination every call does nothing; no call raises.

    A metric that arrives twice is stored once, so a checkpoint may carry undelivered metrics: write it first, then `flush`.
    """

    def __init__(self, destination: MlflowRun | Record | None = None) -> None:
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
            now = _milliseconds()
            self._buffer += [(key, float(value), now, images_seen) for key, value in metrics.items()]

    def flush(self) -> None:
        """Deliver the buffer; what cannot be delivered stays for a later flush."""
        if time.monotonic() >= self._wait_until:
            self._deliver()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or every file of a folder, with the run."""
        self._send("artifact", str(path), folder)

    def tag(self, tags: Mapping[str, str]) -> None:
        self._send("tag", dict(tags))

    def dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Record a data set as the run's input."""
        self._send("dataset", name, digest, source, dict(profile))

    def state_dict(self) -> dict[str, Any]:
        """The undelivered metrics, JSON-able, for a checkpoint."""
        return {"metrics": [list(metric) for metric in self._buffer]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._destination:
            self._buffer += [(key, value, stamp, seen) for key, value, stamp, seen in state["metrics"]]

    def open(self, tags: Mapping[str, str], params: Mapping[str, Any], key: str | None) -> None:
        """Begin, or continue the run that `key` names. Nested `params` get dotted names."""
        self._send("open", dict(tags), {name: str(value) for name, value in flatten(params).items()}, key, _milliseconds())

    def close(self, status: str) -> None:
        self._deliver()
        self._send("close", status, _milliseconds())

    def _deliver(self) -> None:
        size = BATCH["metrics"]
        while self._buffer:
            if not self._send("metrics", *self._buffer[:size]):
                self._wait_until = time.monotonic() + RETRY_SECONDS
                return
            del self._buffer[:size]

    def _send(self, call: str, *arguments: Any) -> bool:
        return self._destination is not None and self._destination.send(call, *arguments)


def use_default_store(root: Path) -> None:
    """Track where MLflow itself looks when it runs in the project's folder and nothing is set."""
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")


def stage_run(
    stage: str, params: Mapping[str, Any], key: str | None = None, tags: Mapping[str, str] | None = None
) -> contextlib.AbstractContextManager[Run]:
    """A run for one stage, nested under `LDM_PARENT_RUN`; it ends as FINISHED, FAILED or KILLED, whatever happened.

    `key` names the work: a retry with the same key and parent continues the earlier run instead of opening a second.
    """
    known = {"ldm.stage": stage, "ldm.key": key, "mlflow.parentRunId": os.environ.get("LDM_PARENT_RUN"), **(tags or {})}
    return open_run({name: value for name, value in known.items() if value}, params, key)


@contextlib.contextmanager
def open_run(tags: Mapping[str, str], params: Mapping[str, Any], key: str | None = None) -> Iterator[Run]:
    """A run with these tags, of which "ldm.stage" is its name."""
    run, status = Run(_destination()), "FINISHED"
    with _sigterm_raises():
        run.open(tags, params, key)
        try:
            yield run
        except BaseException as error:
            status = _status(error)
            raise
        finally:
            run.close(status)


def _destination() -> MlflowRun | Record | None:
    if os.environ.get("RANK", "0") != "0":
        return None
    if records := os.environ.get("LDM_RECORDS"):
        return Record(Path(records))
    return MlflowRun(WarnOnce(), "the work goes on without tracking") if os.environ.get("MLFLOW_TRACKING_URI") else None


def _status(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "FINISHED" if not error.code else "KILLED" if error.code in (130, 143) else "FAILED"
    return "FAILED" if isinstance(error, Exception) else "KILLED"  # KeyboardInterrupt, a scheduler's termination signals


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


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000
