"""MLflow's client, and one run in it. A server that is away costs one warning and never stops the work."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS, PARAMS = 1000, 100  # MLflow's limits for one request
PATIENCE = {  # of recording, where the user has not set it: MLflow's own defaults wait for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
}  # fmt: skip


def mlflow_client() -> Any:
    """A client of the store that `MLFLOW_TRACKING_URI` names. Importing mlflow takes 1.5 to 2 s."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):  # a new database would report each of its migrations
        logging.getLogger(name).setLevel(logging.WARNING)
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
        database = Path(uri.removeprefix("sqlite:///")).absolute()
        place = str(database.parent / "mlruns" / name) if uri.startswith("sqlite:///") else None
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except Exception:
            if (found := client.get_experiment_by_name(name)) is None:  # else another process made it meanwhile
                raise
    return str(found.experiment_id)


def milliseconds() -> int:
    """Now, as MLflow counts."""
    return time.time_ns() // 1_000_000


class WarnOnce:
    """Prints the first warning that it is given, and what follows from it."""

    def __init__(self, consequence: str) -> None:
        self.consequence, self.warned = consequence, False

    def __call__(self, text: str) -> None:
        if not self.warned:
            print(f"warning: tracking: {text}; {self.consequence}", file=sys.stderr, flush=True)
        self.warned = True


class MlflowRun:
    """A run in MLflow."""

    def __init__(self, warn: WarnOnce) -> None:
        self.id: str | None = None
        self.delivered = 0  # lines of its record, if it has one
        self._client: Any = None
        self._warn = warn

    def send(self, call: str, *arguments: Any) -> bool:
        """Make a call: "open", "metrics", "tag", "artifact", "dataset" or "close". False, after one warning, if it fails."""
        if self.id is None and call != "open":
            return False
        try:
            with short_patience():
                self._open(*arguments) if call == "open" else self._make(call, arguments)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self._warn(f"{os.environ['MLFLOW_TRACKING_URI']}: {call} failed ({reason})")
            return False
        return True

    def _open(self, tags: Mapping[str, str], params: Mapping[str, str], key: str | None, start: int) -> None:
        """Begin, or continue an earlier run with the same key or record; `start` in ms."""
        self._client = client = mlflow_client()
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
            run_id = found[0].info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            run_id = client.create_run(experiment, start, dict(tags), tags["ldm.stage"]).info.run_id
        entities = [Param(name, value) for name, value in params.items()]
        for first in range(0, len(entities), PARAMS):
            client.log_batch(run_id, params=entities[first : first + PARAMS])
        self.id = run_id

    def _make(self, call: str, arguments: tuple[Any, ...]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag

        client = self._client
        match call, arguments:
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
