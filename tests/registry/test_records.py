"""Records of runs: a stage writes one, the flow delivers it to MLflow as the stage itself would have."""

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ldm.registry.lineage import pipeline_run
from ldm.registry.tracking import Records, experiment_id, stage_run

ROOT = Path(__file__).resolve().parents[2]


def history(client: Any, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


@pytest.fixture
def records(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    monkeypatch.setenv("LDM_RECORDS", str(tmp_path / "records"))
    return Records(tmp_path / "records")


def runs(client: Any) -> list[Any]:
    found = client.search_runs([experiment_id(client)], order_by=["attributes.start_time"])
    return list(found)


def test_a_record_arrives_as_the_stage_itself_would_have_delivered_it(
    client: Any, records: Records, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "plot.png").write_bytes(b"a plot")

    def stage() -> None:
        with stage_run("train_vae", {"lr": 0.1, "net": {"channels": (1, 2)}}, key="k", tags={"ldm.code": "c"}) as run:
            for step in range(1200):
                run.log({"loss": 1 / (step + 1), "nan": float("nan")}, images_seen=64 * step)
            run.flush()
            run.send("tag", {"a": "b"})
            run.send("dataset", "shards", "abc", "data/shards/index.json", {"train_images": 9})
            run.artifact(tmp_path / "plot.png", "plots")
            run.log({"loss": 7.0}, images_seen=10**6)

    before = time.time() * 1000
    stage()
    time.sleep(0.2)
    after = time.time() * 1000
    assert not runs(client)
    records.deliver()
    assert not list(records.folder.iterdir())
    monkeypatch.delenv("LDM_RECORDS")
    stage()
    recorded, direct = runs(client)
    assert before - 1 <= recorded.info.start_time <= recorded.info.end_time <= after - 200  # of the stage, not of the delivery
    for found in (recorded, direct):
        assert (found.info.status, found.info.run_name) == ("FINISHED", "train_vae")
        assert {"ldm.code": "c", "ldm.key": "k", "a": "b"}.items() <= found.data.tags.items()
        assert [file.path for file in client.list_artifacts(found.info.run_id, "plots")] == ["plots/plot.png"]
        assert [given.dataset.digest for given in found.inputs.dataset_inputs] == ["abc"]
    assert recorded.data.params == direct.data.params == {"lr": "0.1", "net.channels": "(1, 2)"}
    one, other = (sorted(history(client, found.info.run_id, "loss")) for found in (recorded, direct))
    assert one == other and len(one) == 1201


def test_metrics_arrive_while_a_stage_runs_and_a_killed_one_is_killed(
    client: Any, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Records, "EVERY", 0.05)
    code = (
        "import os, sys, time; from ldm.registry.tracking import stage_run\n"
        "with stage_run('shard', {}) as run:\n"
        "    run.log({'images': 1}, 0); run.flush(); run.log({'images': 2}, 1)\n"
        "    print('mlflow' in sys.modules, flush=True); sys.stdin.read(); os.kill(os.getpid(), 9)\n"
    )
    with records.delivering():
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        stage = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)
        assert stage.stdout and stage.stdout.readline() == "False\n"  # importing it takes longer than most stages
        deadline = time.monotonic() + 20
        while not [run for run in runs(client) if history(client, run.info.run_id, "images")]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert runs(client)[0].info.status == "RUNNING"
        assert stage.communicate("")[0] == "" and stage.returncode == -9
    (run,) = runs(client)
    assert run.info.status == "KILLED" and history(client, run.info.run_id, "images") == [(0, 1.0)]
    assert not list(records.folder.iterdir())


@pytest.mark.parametrize("fails_at", ["create_run", "log_batch", "set_terminated"])
def test_what_cannot_be_delivered_waits_and_is_neither_lost_nor_doubled(
    client: Any, records: Records, monkeypatch: pytest.MonkeyPatch, capfd: Any, fails_at: str
) -> None:
    with stage_run("train_vae", {"lr": 0.1}, key="k") as run:
        run.log({"loss": 2.0}, 64)
        run.flush()
        run.log({"loss": 1.0}, 128)
    with stage_run("shard", {}) as run:
        run.log({"images": 3.0}, 0)
    with monkeypatch.context() as patch:
        patch.setattr(f"mlflow.tracking.MlflowClient.{fails_at}", lambda *_, **__: 1 / 0)
        with records.delivering():
            pass
        assert len(list(records.folder.iterdir())) == 2
        records.deliver()  # not tried again at once
    assert capfd.readouterr().err.count("warning: tracking: ") == 1
    Records(records.folder).deliver()  # of the next run of the flow
    assert not list(records.folder.iterdir())
    found = {run.info.run_name: run for run in runs(client)}
    assert len(runs(client)) == 2 and {run.info.status for run in found.values()} == {"FINISHED"}
    assert history(client, found["train_vae"].info.run_id, "loss") == [(64, 2.0), (128, 1.0)]
    assert history(client, found["shard"].info.run_id, "images") == [(0, 3.0)]
    assert found["train_vae"].data.params == {"lr": "0.1"}


def test_a_record_of_a_retry_continues_the_run(client: Any, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_PARENT_RUN", "a" * 32)
    for value, error in ((2.0, ValueError), (1.0, None)):
        with contextlib.suppress(ValueError), stage_run("train_vae", {"lr": 1}, key="k") as run:
            run.log({"loss": value}, int(64 / value))
            if error:
                raise error
        records.deliver()
    (run,) = runs(client)
    assert run.info.status == "FINISHED" and history(client, run.info.run_id, "loss") == [(32, 2.0), (64, 1.0)]


@pytest.mark.parametrize("other_parent", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_the_record_of_a_killed_stage_and_that_of_the_next_are_one_run(
    client: Any, records: Records, monkeypatch: pytest.MonkeyPatch, at_once: bool, other_parent: bool
) -> None:
    code = (
        "import os; from ldm.registry.tracking import stage_run\n"
        "with stage_run('train_vae', {'lr': 1}, key='k') as run:\n"
        "    run.log({'loss': 2.0}, 32); run.flush(); run.log({'loss': 9.0}, 64); os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.setenv("LDM_PARENT_RUN", "a" * 32)
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    if not at_once:
        records.deliver()
        assert [run.info.status for run in runs(client)] == ["KILLED"]
    monkeypatch.setenv("LDM_PARENT_RUN", ("b" if other_parent else "a") * 32)
    with stage_run("train_vae", {"lr": 1}, key="k") as run:
        run.log({"loss": 1.0}, 64)
    after = time.time() * 1000
    time.sleep(0.1)
    records.deliver()
    (found,) = runs(client)
    assert found.info.status == "FINISHED" and found.info.end_time <= after
    assert found.data.tags["mlflow.parentRunId"] == ("b" if other_parent else "a") * 32
    assert history(client, found.info.run_id, "loss") == [(32, 2.0), (64, 1.0)]
    with stage_run("train_vae", {"lr": 1}, key="k"):
        pass
    records.deliver()
    assert len(runs(client)) == 2  # a finished run is finished


@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_parent_named_by_its_record_is_found_whichever_arrives_first(
    client: Any, records: Records, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: str
) -> None:
    with pipeline_run(ROOT, {}, records=records.folder) as parent:
        assert parent.id is None and str(parent.reference).startswith("record:")
        monkeypatch.setenv("LDM_PARENT_RUN", str(parent.reference))
        for stage in ("shard", "train_vae"):
            with stage_run(stage, {}):
                pass
    kept = sorted(records.folder.iterdir())
    held_back = kept[1:] if first == "parent" else kept[:1]
    for path in held_back:
        path.rename(tmp_path / path.name)
    records.deliver()
    for path in held_back:
        (tmp_path / path.name).rename(path)
    Records(records.folder).deliver()  # of another process
    found = {run.info.run_name: run for run in runs(client)}
    assert len(found) == len(runs(client)) == 3
    for stage in ("shard", "train_vae"):
        assert found[stage].data.tags["mlflow.parentRunId"] == found["pipeline"].info.run_id


def test_a_record_waits_for_an_earlier_one_of_its_training(
    client: Any, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the later one would be a finished run by the time the earlier arrives."""
    for value, error in ((2.0, ValueError), (1.0, None)):
        with contextlib.suppress(ValueError), stage_run("train_vae", {}, key="k") as run:
            run.log({"loss": value}, int(64 / value))
            if error:
                raise error
    with stage_run("shard", {}):
        pass
    create, failures = type(client).create_run, iter([True])
    monkeypatch.setattr(type(client), "create_run", lambda *a, **k: 1 / 0 if next(failures, False) else create(*a, **k))
    records.deliver()
    assert [run.info.run_name for run in runs(client)] == ["shard"]
    records.deliver()
    found = {run.info.run_name: run for run in runs(client)}
    assert len(runs(client)) == 2 and found["train_vae"].info.status == "FINISHED"
    assert history(client, found["train_vae"].info.run_id, "loss") == [(32, 2.0), (64, 1.0)]


def test_flows_of_several_worktrees_deliver_the_same_records_side_by_side(client: Any, records: Records, tmp_path: Path) -> None:
    """They share the folder by a link; each may deliver what stages of another have recorded."""
    worktree = tmp_path / "worktrees/nightly/.ldm"
    worktree.mkdir(parents=True)
    (worktree / "tracking").symlink_to(records.folder)
    records.folder.mkdir()
    picture = worktree.parent / "plot.png"
    picture.write_bytes(b"of the worktree")
    with stage_run("evaluate", {}, records=worktree / "tracking") as run:
        run.artifact(picture, "plots")
    for number in range(8):
        with stage_run("shard", {"number": number}) as run:
            run.log({"images": number}, 0)
    flows = [Records(worktree / "tracking"), Records(records.folder)]
    threads = [threading.Thread(target=flow.deliver) for flow in flows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = runs(client)
    assert len(found) == 9 and {run.info.status for run in found} == {"FINISHED"} and not list(records.folder.iterdir())
    (evaluated,) = (run for run in found if run.info.run_name == "evaluate")
    assert [file.path for file in client.list_artifacts(evaluated.info.run_id, "plots")] == ["plots/plot.png"]


def test_a_server_that_is_known_to_be_away_is_not_asked(records: Records, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    with stage_run("shard", {}):
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    start = time.monotonic()
    Records(records.folder, away=True).deliver()
    assert time.monotonic() - start < 0.5 and not capfd.readouterr().err and list(records.folder.iterdir())


def test_half_a_line_is_left_for_the_next_delivery_while_its_process_lives(client: Any, records: Records) -> None:
    with contextlib.suppress(KeyboardInterrupt), stage_run("shard", {}) as run:
        run.log({"images": 3.0}, 0)
        raise KeyboardInterrupt
    (path,) = records.folder.iterdir()
    whole = path.read_text()
    path.write_text(whole[:-20])
    with path.open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        records.deliver()
        Records(records.folder).deliver()  # of another flow, which is not to end the run
        assert [run.info.status for run in runs(client)] == ["RUNNING"]
        path.write_text(whole)
    records.deliver()
    assert [run.info.status for run in runs(client)] == ["KILLED"] and not path.exists()


def test_a_garbled_record_spoils_nothing(client: Any, records: Records) -> None:
    """What a full disk did to one, and one whose beginning is gone: the run after them is delivered."""
    for step in range(3):
        with stage_run("shard", {"step": step}) as run:
            run.log({"images": 3.0}, 0)
    first, second, _ = sorted(records.folder.iterdir())
    _, opened, metrics, *rest = first.read_text().splitlines()
    first.write_text("\n".join(["", opened, metrics[:20] + metrics, metrics[:-1], *rest]))
    second.write_text("\n".join(["", *second.read_text().splitlines()[2:]]))
    records.deliver()
    assert {(run.info.status, run.data.params["step"]) for run in runs(client)} == {("FINISHED", "0"), ("FINISHED", "2")}
    assert not list(records.folder.iterdir())


def test_a_full_disk_leaves_whole_lines_and_the_metrics_for_later(client: Any, records: Records) -> None:
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from ldm.registry.tracking import stage_run\n"
        "with stage_run('shard', {}) as run:\n"
        "    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (run._destination.path.stat().st_size + 30, most))\n"
        "    run.log({'images': 1}, 0); run.flush(); assert run.state_dict()['metrics']\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))\n"
        "    run.log({'images': 2}, 1)\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    records.deliver()
    (run,) = runs(client)
    assert run.info.status == "FINISHED" and history(client, run.info.run_id, "images") == [(0, 1.0), (1, 2.0)]


def test_what_has_changed_since_is_not_attached(client: Any, records: Records, tmp_path: Path) -> None:
    for name in ("same.png", "other.png", "gone.png"):
        (tmp_path / name).write_bytes(b"of this run")
    with stage_run("evaluate", {}) as run:
        for name in ("same.png", "other.png", "gone.png"):
            run.artifact(tmp_path / name, "plots")
    (tmp_path / "other.png").write_bytes(b"of another run")
    (tmp_path / "gone.png").unlink()
    records.deliver()
    (run,) = runs(client)
    assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id, "plots")] == ["plots/same.png"]
