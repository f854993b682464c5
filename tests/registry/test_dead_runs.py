"""Runs whose process was killed: who works in their folder next sets them to KILLED, and no other run."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.registry.dead_runs import end_dead_runs
from ldm.registry.lineage import pipeline_run
from ldm.registry.tracking import PARENT, Records, experiment_id

ROOT = Path(__file__).resolve().parents[2]
FLOW = """
import os, sys
from pathlib import Path
from ldm.registry.lineage import pipeline_run
from ldm.registry.tracking import stage_run
with pipeline_run(Path.cwd(), {}) as run:
    os.environ["LDM_PARENT_RUN"] = run.reference
    if sys.argv[1] == "direct":
        with stage_run("shard", {}) as stage:
            stage.log({"images": 3.0}, 0, at=int(sys.argv[2]))
            stage.flush()
            os.kill(os.getpid(), 9)
    with stage_run("shard", {}, records=Path(".ldm/tracking")) as stage:
        print("recorded", flush=True)
        if sys.argv[1] == "alive" and not os.fork():
            sys.stdin.read()
            stage.close("FINISHED")
            os._exit(0)
        os.kill(os.getpid(), 9)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder whose name no filter of MLflow's can hold."""
    folder = tmp_path / 'it\'s "mine"'
    folder.mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        (folder / name).touch()
    return folder


def killed_flow(project: Path, kind: str, at: int = 0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", FLOW, kind, str(at)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    flow = subprocess.Popen(command, cwd=project, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert flow.wait() == -signal.SIGKILL
    return flow


def statuses(client: Any) -> dict[str, str]:
    return {run.info.run_name: run.info.status for run in client.search_runs([experiment_id(client)])}


def test_a_killed_flow_and_its_stage_end_when_they_were_last_heard_of(client: Any, project: Path) -> None:
    with pipeline_run(project.parent, {}, name="elsewhere") as elsewhere, pipeline_run(project, {}, name="mine") as mine:
        far = client.get_run(mine.id).info.start_time + 10**7  # ms: hours later, which no clock of this test shows
        killed_flow(project, "direct", far)
        assert statuses(client) == dict.fromkeys(("elsewhere", "mine", "pipeline", "shard"), "RUNNING")
        end_dead_runs(project, except_run=mine.id)
        assert statuses(client) == {"elsewhere": "RUNNING", "mine": "RUNNING", "pipeline": "KILLED", "shard": "KILLED"}
        ended = {run.info.run_name: run.info.end_time for run in client.search_runs([experiment_id(client)])}
        assert ended["shard"] == ended["pipeline"] == far
    assert elsewhere.id and statuses(client)["mine"] == "FINISHED"


def test_a_stage_that_still_lives_is_left_to_its_record(client: Any, project: Path) -> None:
    flow, records = killed_flow(project, "alive"), Records(project / ".ldm/tracking")
    records.deliver()
    end_dead_runs(project)
    assert statuses(client) == {"pipeline": "KILLED", "shard": "RUNNING"}
    flow.communicate("")  # it ends
    while statuses(client)["shard"] == "RUNNING":
        records.deliver()
    assert statuses(client) == {"pipeline": "KILLED", "shard": "FINISHED"}
    (shard,) = client.search_runs([experiment_id(client)], "attributes.run_name = 'shard'")
    assert client.get_run(shard.data.tags[PARENT]).info.run_name == "pipeline"


def test_a_killed_stage_ends_when_it_wrote_last(client: Any, project: Path) -> None:
    killed_flow(project, "recorded")
    (record,) = (project / ".ldm/tracking").iterdir()
    last = record.stat().st_mtime_ns // 1_000_000
    Records(project / ".ldm/tracking").deliver()
    end_dead_runs(project)
    ended = {run.info.run_name: run.info.end_time for run in client.search_runs([experiment_id(client)])}
    assert ended == {"shard": last, "pipeline": last} and set(statuses(client).values()) == {"KILLED"}


def test_a_server_that_is_away_costs_one_warning(project: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{bound.getsockname()[1]}")
        end_dead_runs(project)
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning.startswith("warning: tracking: ") and "stay RUNNING" in warning
