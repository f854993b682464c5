"""A real MLflow server that does not answer for a while: no point is lost or doubled, and a run ends as its stage did."""

import math
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow_server import MlflowServer

from ldm.registry import tracking
from ldm.registry.lineage import pipeline_run
from ldm.registry.tracking import Records, experiment_id, mlflow_client, stage_run

ROOT = Path(__file__).resolve().parents[2]
ROWS = 4  # of the curve
EVENTS = ("pipeline opens", "stage opens", *(f"row {row}" for row in range(ROWS)), "stage ends", "pipeline ends")


@pytest.fixture(scope="module")
def store(database: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(database, tmp_path_factory.mktemp("server") / "server.db"))


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[MlflowServer]:
    made = MlflowServer(store.parent, f"sqlite:///{store}")
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def impatient(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)


def flow(records: Records, key: str, error: BaseException | None, at: Any) -> None:
    """What a flow and one stage record, delivered after each event, which `at` is told of beforehand."""

    def event(name: str) -> None:
        records.deliver()
        at(name)

    at("pipeline opens")
    with pipeline_run(ROOT, {}, name=f"flow {key}", records=records.folder) as parent, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_PARENT_RUN", str(parent.reference))
        event("stage opens")
        try:
            with stage_run("train_vae", {"lr": 0.1}, key=key, records=records.folder) as run:
                for row in range(ROWS):
                    event(f"row {row}")
                    run.log({"loss": 1 / (row + 1), "nan": math.nan}, 64 * row)
                    run.flush()
                event("stage ends")
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
        event("pipeline ends")
    records.deliver()


def check(key: str, status: str) -> None:
    """Everything is there, once."""
    client = mlflow_client()
    found = client.search_runs([experiment_id(client)], f"tags.`ldm.key` = '{key}'")
    parents = client.search_runs([experiment_id(client)], f"attributes.run_name = 'flow {key}'")
    assert (len(found), len(parents)) == (1, 1)
    (run,), (parent,) = found, parents
    assert (run.info.status, parent.info.status) == (status, "FINISHED")
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id and run.data.params == {"lr": "0.1"}
    history = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss")]
    assert history == [(64 * row, 1 / (row + 1)) for row in range(ROWS)]
    assert len(client.get_metric_history(run.info.run_id, "nan")) == ROWS


@pytest.mark.parametrize("away", [("pipeline opens", "row 1"), ("row 1", "stage ends"), ("stage ends", None)], ids=str)
def test_a_silent_server_loses_and_doubles_nothing(server: MlflowServer, tmp_path: Path, away: tuple[str, str | None]) -> None:
    def at(event: str) -> None:
        if event == away[0]:
            server.freeze()
        if event == away[1]:
            server.thaw()

    records, key = Records(tmp_path / "records"), f"silent {away}".replace("'", "")
    flow(records, key, KeyboardInterrupt(), at)
    server.thaw()
    Records(tmp_path / "records").deliver()  # the next flow's
    assert not list((tmp_path / "records").iterdir())
    check(key, "KILLED")


def test_a_request_that_was_repeated_makes_one_run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's client repeats a request that was not answered in time, and the server may carry out both."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    client = mlflow_client()
    create, asked = type(client).create_run, list[str]()

    def slowly(*arguments: Any, **options: Any) -> Any:
        other = sqlite3.connect(store, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")  # the server waits for up to five seconds
        threading.Timer(3, other.close).start()
        made = create(*arguments, **options)
        asked.append(made.info.run_id)
        return made

    monkeypatch.setattr(type(client), "create_run", slowly)
    records, key = Records(tmp_path / "records"), "repeated"
    with stage_run("train_vae", {"lr": 0.1}, key=key, records=records.folder) as run:
        run.log({"loss": 1.0}, 0)
        run.flush()
        records.deliver()
    time.sleep(0.5)
    assert len(client.search_runs([experiment_id(client)], f"tags.`ldm.key` = '{key}'")) == 2 and len(asked) == 1
    records.deliver()
    (found,) = client.search_runs([experiment_id(client)], f"tags.`ldm.key` = '{key}'")
    assert found.info.status == "FINISHED" and found.data.metrics == {"loss": 1.0}


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(8))
def test_a_server_that_is_killed_and_started_again_loses_and_doubles_nothing(
    server: MlflowServer, tmp_path: Path, seed: int
) -> None:
    """At seeded events, also in the middle of a delivery: a thread delivers meanwhile."""
    rng = np.random.default_rng(seed)
    killed, back = sorted(rng.choice(len(EVENTS) + 1, 2, replace=False))

    def at(event: str) -> None:
        time.sleep(float(rng.uniform(0, 0.2)))
        if event == EVENTS[killed]:
            server.kill()
        if back < len(EVENTS) and event == EVENTS[back]:
            server.start()

    records = Records(tmp_path / "records")
    records.EVERY = 0.05  # type: ignore[misc]
    with records.delivering():
        flow(Records(tmp_path / "records"), f"killed {seed}", ValueError() if seed % 2 else None, at)
    if back == len(EVENTS):
        server.start()
    deadline = time.monotonic() + 60  # its first answers take seconds
    while list((tmp_path / "records").iterdir()):
        assert time.monotonic() < deadline
        Records(tmp_path / "records").deliver()
    check(f"killed {seed}", "FAILED" if seed % 2 else "FINISHED")
