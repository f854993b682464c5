"""MLflow's client, and one run in it. A server that is away costs one warning and never stops the work."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

EXPERIMENT = "ldm"
BATCH = {"metrics": 1000, "params": 100}  # MLflow's limits for one request
PATIENCE = {  # of recording, where the user has not set it: MLflow's own defaults wait for minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
}


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
    added = [name for name in PATIENCE if name not in os.environ]
    os.environ.update({name: PATIENCE[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


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


class WarnOnce:
    """Prints the first warning that it is given."""

    def __init__(self) -> None:
        self.warned = False

    def __call__(self, text: str) -> None:
        if not self.warned:
            print(f"warning: tracking: {text}", file=sys.stderr, flush=True)
        self.warned = True


class MlflowRun:
    """A run in MLflow. Its calls are those of a record's lines (`ldm.registry.records`)."""

    def __init__(self, warn: WarnOnce, if_away: str) -> None:
        self.id: str | None = None
        self._client: Any = None
        self._warn, self._if_away = warn, if_away

    def send(self, call: str, *arguments: Any) -> bool:
        """Make one call. False, after one warning, where it failed; a call of another name does nothing."""
        calls: dict[str, Callable[..., None]] = {"open": self._open, "metrics": self._metrics, "close": self._close}
        calls |= {"tag": self._tag, "artifact": self._artifact, "dataset": self._dataset}
        if self.id is None and call != "open":
            return False
        try:
            with short_patience():
                calls.get(call, lambda *_: None)(*arguments)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self._warn(f"{os.environ['MLFLOW_TRACKING_URI']}: {call} failed ({reason}); {self._if_away}")
            return False
        return True

    def _open(self, tags: Mapping[str, str], params: Mapping[str, str], key: str | None, start: int) -> None:
        """Begin, or continue an earlier run with the same key or record; `start` in ms."""
        self._client = client = mlflow_client()
        experiment = experiment_id(client)
        run_id = _earlier_run(client, experiment, tags, key)
        if run_id:
            client.update_run(run_id, status="RUNNING")
        else:
            run_id = client.create_run(experiment, start, dict(tags), tags["ldm.stage"]).info.run_id
        self._batches(run_id, params=[_entities().Param(name, value) for name, value in params.items()])
        self.id = run_id

    def _metrics(self, *metrics: Sequence[Any]) -> None:
        """Key, value, timestamp in ms and step of each. MLflow ignores one that it has: sending twice stores it once."""
        self._batches(self.id, metrics=[_entities().Metric(*metric) for metric in metrics])

    def _batches(self, run_id: str | None, **kind: list[Any]) -> None:
        for name, entities in kind.items():
            for first in range(0, len(entities), BATCH[name]):
                self._client.log_batch(run_id, **{name: entities[first : first + BATCH[name]]})

    def _artifact(self, path: str, folder: str | None) -> None:
        store = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        store(self.id, path, folder)

    def _tag(self, tags: Mapping[str, str]) -> None:
        self._client.log_batch(self.id, tags=[_entities().RunTag(key, value) for key, value in tags.items()])

    def _dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        entities = _entities()
        dataset = entities.Dataset(name, digest, "local", json.dumps({"uri": source}), profile=json.dumps(profile))
        context = entities.InputTag("mlflow.data.context", "training")
        self._client.log_inputs(self.id, [entities.DatasetInput(dataset, [context])])

    def _close(self, status: str, end: int) -> None:
        """End the run; runs under it that never ended were killed. `end` in ms."""
        self._client.set_terminated(self.id, status, end)
        query = f"tags.`mlflow.parentRunId` = '{self.id}' and attributes.status = 'RUNNING'"
        for child in self._client.search_runs([experiment_id(self._client)], query):
            self._client.set_terminated(child.info.run_id, "KILLED")


def _entities() -> Any:
    import mlflow.entities

    return mlflow.entities


def _earlier_run(client: Any, experiment: str, tags: Mapping[str, str], key: str | None) -> str | None:
    """The run of the same record, or the run that a retry continues: same key and parent; without a parent, an unfinished one."""
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
