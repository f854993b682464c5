"""MLflow runs of stages: honest status, nothing lost or doubled, and never in the way of the work."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import set_params

from ldm.registry import tracking
from ldm.registry.lineage import lineage, log_results, pipeline_run
from ldm.registry.tracking import experiment_id, stage_run

ROOT = Path(__file__).resolve().parents[2]


def history(client: Any, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def test_a_stage_nests_under_its_parent_and_delivers_its_metrics(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pipeline_run(ROOT, {"seed": 0, "data": {"path": "x"}}) as parent:
        monkeypatch.setenv("LDM_PARENT_RUN", str(parent.id))
        with stage_run("train_vae", {"lr": 0.1, "channels": (1, 2)}) as run:
            for step in range(2500):  # more than one batch of MLflow's
                run.log({"loss": 1 / (step + 1)}, images_seen=64 * step)
            assert history(client, run.id, "loss") == []  # buffered
    stored = client.get_run(run.id)
    assert stored.info.status == "FINISHED" and stored.info.run_name == "train_vae"
    assert stored.data.tags["mlflow.parentRunId"] == parent.id
    assert stored.data.params == {"lr": "0.1", "channels": "(1, 2)"}
    assert sorted(history(client, run.id, "loss")) == [(64 * step, 1 / (step + 1)) for step in range(2500)]
    assert client.get_run(parent.id).data.params == {"seed": "0", "data.path": "x"}


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (SystemExit(2), "FAILED")],
)
def test_the_status_says_how_it_ended(client: Any, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), stage_run("shard", {}) as run:
        run.log({"images": 3}, 0)
        raise error
    assert client.get_run(run.id).info.status == status
    assert history(client, run.id, "images") == [(0, 3)]


def test_a_stage_that_was_killed_is_noticed_by_the_parent(client: Any) -> None:
    code = "import os, sys; from ldm.registry.tracking import stage_run\n"
    code += "with stage_run('shard', {}): os.kill(os.getpid(), int(sys.argv[1]))"
    with pipeline_run(ROOT, {}) as parent:
        env = {**os.environ, "LDM_PARENT_RUN": str(parent.id), "PYTHONPATH": str(ROOT)}
        for number in (signal.SIGTERM, signal.SIGKILL):
            done = subprocess.run([sys.executable, "-c", code, str(int(number))], env=env)
            assert done.returncode == -number
    children = client.search_runs([client.get_run(parent.id).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.id}'")
    assert [child.info.status for child in children] == ["KILLED", "KILLED"]


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt(), "kill -9"])
def test_an_unfinished_run_is_continued_under_its_new_parent(
    client: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException | str
) -> None:
    monkeypatch.setenv("LDM_PARENT_RUN", "a" * 32)
    if isinstance(error, str):
        code = "import os; from ldm.registry.tracking import stage_run\n"
        code += "with stage_run('train_vae', {'lr': 1}, key='k', tags={'ldm.threads': '1'}): os.kill(os.getpid(), 9)"
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    else:
        with pytest.raises(type(error)), stage_run("train_vae", {"lr": 1}, key="k", tags={"ldm.threads": "1"}):
            raise error
    (first,) = client.search_runs([experiment_id(client)])
    with stage_run("train_vae", {"lr": 2}, key="other") as other:
        assert other.id != first.info.run_id
    monkeypatch.setenv("LDM_PARENT_RUN", "b" * 32)
    with stage_run("train_vae", {"lr": 1}, key="k", tags={"ldm.threads": "1, 2"}) as second:
        assert second.id == first.info.run_id and client.get_run(second.id).info.status == "RUNNING"
    found = client.get_run(second.id)
    assert found.data.tags["mlflow.parentRunId"] == "b" * 32 and found.data.tags["ldm.threads"] == "1, 2"
    assert (found.info.status, found.info.start_time) == ("FINISHED", first.info.start_time)
    assert found.info.end_time > (first.info.end_time or 0)
    ids = []
    for parent in ("b" * 32, "c" * 32, None):  # a finished run is finished
        if parent is None:
            monkeypatch.delenv("LDM_PARENT_RUN")
        else:
            monkeypatch.setenv("LDM_PARENT_RUN", parent)
        with stage_run("train_vae", {"lr": 1}, key="k") as next_one:
            ids.append(next_one.id)
    assert len({*ids, first.info.run_id, other.id}) == 5


def test_a_checkpoint_carries_undelivered_metrics_and_doubles_none(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_PARENT_RUN", "a" * 32)
    with pytest.raises(KeyboardInterrupt), stage_run("train_vae", {}, key="k") as run:
        run.log({"loss": 2.0, "nan": float("nan")}, 64)
        run.log({"loss": 1.0}, 128)
        checkpoint = json.dumps(run.state_dict())
        run.flush()  # delivered after the checkpoint was written, then killed
        assert run.state_dict() == {"metrics": []}
        raise KeyboardInterrupt
    time.sleep(0.01)
    with stage_run("train_vae", {}, key="k") as resumed:
        resumed.load_state_dict(json.loads(checkpoint))
        resumed.log({"loss": 0.5}, 192)
    assert history(client, resumed.id, "loss") == [(64, 2.0), (128, 1.0), (192, 0.5)]
    assert len(history(client, resumed.id, "nan")) == 1


def test_what_a_run_made_is_recorded_with_it(client: Any, tmp_path: Path) -> None:
    (tmp_path / "reports/plots").mkdir(parents=True)
    (tmp_path / "data/shards").mkdir(parents=True)
    (tmp_path / "data/shards/index.json").write_text('{"splits": {"train": [0, 9], "test": [9, 12]}}')
    (tmp_path / "reports/metrics.json").write_text('{"psnr": 20.5, "test_images": 3, "image": "8x8x1"}')
    (tmp_path / "reports/plots/samples.png").write_bytes(b"png")
    (tmp_path / "dvc.lock").write_text("x")
    with pipeline_run(tmp_path, {}) as run:
        log_results(run, tmp_path)
    stored = client.get_run(run.id)
    assert stored.data.metrics == {"psnr": 20.5, "test_images": 3.0}
    assert {"ldm.dvc_lock", "ldm.data_index"} <= stored.data.tags.keys()
    (dataset,) = stored.inputs.dataset_inputs
    assert json.loads(dataset.dataset.profile) == {"train_images": 9, "test_images": 3}
    assert {file.path for file in client.list_artifacts(run.id)} == {"metrics.json", "plots"}


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize(
    ("collection", "changed", "dirty"),
    [
        ("data/raw/mine", "dvc.lock reports/metrics.json data/raw/mine.dvc data/raw/.gitignore", "false"),
        ("a*b/[mine]", "a*b/[mine].dvc a*b/.gitignore", "false"),
        ("mine", "mine.dvc .gitignore", "false"),
        ("data/raw/mine", "params.yaml", "true"),
        ("data/raw/mine", "data/raw/other.dvc", "true"),
        ("a*b/[mine]", "a*b/m.dvc", "true"),
    ],
)
def test_what_a_run_rewrites_does_not_make_its_commit_dirty(
    tmp_path: Path, collection: str, changed: str, dirty: str, tracked: bool
) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t", *arguments], cwd=tmp_path, check=True)

    files = [tmp_path / name for name in changed.split()]
    shutil.copy(ROOT / "params.yaml", tmp_path)
    set_params(tmp_path, {"data": {"path": collection}})
    git("init", "-q")
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        if tracked:
            file.touch()
    git("add", "-A")
    git("commit", "-qm", "all")
    assert lineage(tmp_path)["ldm.git_dirty"] == "false"
    for file in files:
        with file.open("a") as written:
            written.write("\n# changed\n")
    assert lineage(tmp_path)["ldm.git_dirty"] == dirty


def test_off_means_no_mlflow_at_all() -> None:
    code = (
        "import sys; from ldm.registry.tracking import stage_run\n"
        "with stage_run('shard', {}) as run: run.log({'a': 1}, 0); run.flush(); run.artifact('x'); state = run.state_dict()\n"
        "print('mlflow' in sys.modules, run.id, state)"
    )
    env = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "False None {'metrics': []}", done.stderr


@pytest.mark.parametrize("kind", ["refuses", "is silent"])
def test_a_server_that_is_away_costs_one_warning(kind: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    names = ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR")
    patience = [float(tracking.PATIENCE[f"MLFLOW_HTTP_REQUEST_{name}"]) for name in names]
    assert patience[0] * (1 + patience[1]) + patience[2] < 10
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # what the user has set stands
    with socket.socket() as server:  # bound: nobody else takes the port; listening: connects, but never answers
        server.bind(("127.0.0.1", 0))
        if kind == "is silent":
            server.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with stage_run("train_vae", {}, key="k") as run:
            run.log({"loss": 1.0}, 64)
            run.flush()
            assert len(run.state_dict()["metrics"]) == 1  # a checkpoint may still carry it to a better day
        assert time.monotonic() - start < 6
    (warning,) = capfd.readouterr().err.splitlines()
    assert warning.startswith("warning: tracking: ") and "goes on without tracking" in warning
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_failed_delivery_waits_for_the_next(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
    database = tmp_path / "mlflow.db"
    with stage_run("train_vae", {}) as run:
        run.log({"loss": 1.0}, 64)
        away = _moved_away(database)
        run.flush()
        assert len(run.state_dict()["metrics"]) == 1
        away.rename(database)
        run.log({"loss": 0.5}, 128)
        run.flush()
        assert run.state_dict() == {"metrics": []}
    assert history(client, run.id, "loss") == [(64, 1.0), (128, 0.5)]


def _moved_away(database: Path) -> Path:
    """SQLite opens files anew: an empty one in place of the database has no tables."""
    away = database.rename(database.with_suffix(".away"))
    database.touch()
    return away
