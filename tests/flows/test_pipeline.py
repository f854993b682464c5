"""The flow on a small project, with Prefect, DVC and MLflow as they are."""

import asyncio
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from flows import run as run_module
from ldm.registry import tracking
from ldm.registry.versions import find, lookup

pytestmark = pytest.mark.usefixtures("prefect_server")


def statuses() -> list[str]:
    """Of every pipeline's run in MLflow, newest first."""
    client = tracking.mlflow_client()
    return [run.info.status for run in client.search_runs([tracking.experiment_id(client)], "tags.`ldm.stage` = 'pipeline'")]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database; its migrations take seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        tracking.mlflow_client().search_experiments()
    return path


@pytest.fixture
def main(project: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """What `python -m flows.run` does in the project; returns the exit code."""
    from flows import run, stages

    shutil.copy(database, project)
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["flows.run"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")  # as it sets itself; undone after the test
    monkeypatch.setattr(stages.run_stage, "retry_delay_seconds", 0)
    return run.main


def test_a_run_registers_a_champion_and_the_next_one_has_nothing_to_do(main: Callable[[], int], capfd: Any) -> None:
    assert main() == 0
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if line.endswith("starts")] == [
        "shard starts",
        "train_unet starts",
        "evaluate starts",
        "after starts",
    ]
    for expected in ("1.250 ± 0.012", "2 test images of 32x32x1, lanczos", "97.5%", "models:/ldm/1 (new)", "no champion yet"):
        assert expected in out
    assert 'ldm sample --model models:/ldm@champion --prompt "a handwritten seven"' in out
    assert lookup("models:/ldm@champion").version == 1
    assert statuses() == ["FINISHED"]
    check_prefects_record()

    assert main() == 0
    out = capfd.readouterr().out
    assert "starts" not in out and "models:/ldm/1 (registered before)" in out
    assert len(find({})) == 1


def check_prefects_record() -> None:
    """The summary, an edge for each dependency, the stages' lines."""
    from prefect.artifacts import Artifact
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
    from prefect.client.schemas.sorting import FlowRunSort

    artifact = Artifact.get("ldm-pipeline-summary")
    assert artifact is not None and "| evaluate | executed |" in str(artifact.data) and "report.html" in str(artifact.data)
    with get_client(sync_client=True) as client:
        (flow_run,) = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))
    by_name = {run.name: run for run in runs}
    needed = {found.id for found in by_name["evaluate"].task_inputs["wait_for"]}
    assert needed == {by_name["shard"].id, by_name["train_unet"].id}
    only = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id]))
    deadline = time.monotonic() + 15  # logs arrive in batches, a little later
    messages: list[str] = []
    while "evaluate starts" not in messages and time.monotonic() < deadline:
        time.sleep(0.2)
        messages = asyncio.run(_logs(only))
    assert {"shard starts", "train_unet starts", "evaluate starts"} <= set(messages)


async def _logs(only: Any) -> list[str]:
    from prefect.client.orchestration import get_client

    async with get_client() as client:
        return [log.message for log in await client.read_logs(only)]


def test_a_watched_folder_is_taken_in_first(
    project: Path, main: Callable[[], int], capfd: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may bring the first images; while there are none, that is said."""
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(params.replace("path: data/raw/source", "path: data/raw/mine"))
    (tmp_path / "inbox").mkdir()
    monkeypatch.setattr(sys, "argv", ["flows.run", "--ingest", "../inbox"])
    assert main() == 2
    captured = capfd.readouterr()
    assert f"ingest: nothing moved from {tmp_path}/inbox" in captured.out and "starts" not in captured.out
    assert captured.err.splitlines()[-1].startswith("error: data.path data/raw/mine: no such folder")
    Image.new("L", (8, 8)).save(tmp_path / "inbox/a.png")
    (tmp_path / "inbox/a.txt").write_text("a caption")
    for name in ("a.png", "a.txt"):
        os.utime(tmp_path / "inbox" / name, (0, 0))
    assert main() == 0
    out = capfd.readouterr().out
    assert out.index("ingest: 1 images moved to data/raw/mine/") < out.index("shard starts")
    assert re.search(r"^ingest +executed .*\nshard +executed", out, re.M)
    assert (project / "data/raw/mine.dvc").is_file() and not list((tmp_path / "inbox").iterdir())
    assert main() == 0
    assert re.search(r"^ingest +cached .*\nshard +cached", capfd.readouterr().out, re.M)


def test_a_stage_that_fails_once_is_tried_again(project: Path, main: Callable[[], int], capfd: Any) -> None:
    (project / "knob.txt").write_text("train_unet once")
    assert main() == 0
    assert capfd.readouterr().out.count("train_unet starts") == 2


@pytest.mark.parametrize(("code", "tries", "expected"), [(2, 1, 2), (7, 2, 1)])
def test_a_stage_that_fails_ends_the_run_with_its_own_words(
    project: Path, main: Callable[[], int], capfd: Any, code: int, tries: int, expected: int
) -> None:
    (project / "knob.txt").write_text(f"train_unet exit {code}")
    assert main() == expected
    captured = capfd.readouterr()
    assert captured.out.count("train_unet starts") == tries and "evaluate starts" not in captured.out
    assert captured.err.count("error: train_unet cannot") == tries and "error:" not in captured.out
    if code == 2:
        assert captured.err.splitlines()[-1] == "error: train_unet cannot"
    else:
        assert captured.out.count(f"stage train_unet failed with exit code {code}") == tries
        assert f"exit code {code}" in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
    assert statuses() == ["FAILED"]
    assert find({}) == []


def test_bad_settings_stop_everything_before_it_starts(project: Path, main: Callable[[], int], capfd: Any) -> None:
    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("train_vae:", "train_vea:"))
    before = set(project.iterdir())
    assert main() == 2
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and "train_vea" in captured.err
    assert set(project.iterdir()) == before


def test_while_mlflow_is_away_a_run_trains_and_a_later_one_registers(
    project: Path, main: Callable[[], int], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import pipeline

    monkeypatch.setattr(pipeline.register, "retry_delay_seconds", 0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with monkeypatch.context() as patch, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{bound.getsockname()[1]}")
        assert main() == 2
    captured = capfd.readouterr()
    assert captured.out.count("starts\n") == 3 and "Traceback" not in captured.err
    *others, last = captured.err.splitlines()
    (warning,) = (line for line in others if line.startswith("warning: MLFLOW_TRACKING_URI http://127.0.0.1:"))
    assert "a run goes on" in warning and "a later one delivers it" in warning
    assert last.startswith("error: MLFLOW_TRACKING_URI") and "the next run registers it, without training again" in last
    assert list((project / ".ldm/tracking").glob("*.jsonl"))
    assert main() == 0
    out = capfd.readouterr().out
    assert re.findall(r"(\w+) starts\n", out) == ["after"] and "models:/ldm/1 (new)" in out
    assert not list((project / ".ldm/tracking").glob("*.jsonl")) and sorted(statuses()) == ["FAILED", "FINISHED"]


@pytest.mark.parametrize("variable", ["LDM_STAGE_TIMEOUT", "LDM_PROCESSES"])
def test_a_variable_with_a_bad_value_ends_a_run_before_it_starts(
    variable: str, project: Path, main: Callable[[], int], capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "30m")
    assert main() == 2
    captured = capfd.readouterr()
    (error,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {variable} is '30m'; set it to") and "starts\n" not in captured.out


@pytest.mark.parametrize("module", ["flows.run", "flows.schedule", "flows.workspace"])
def test_help_reads_like_a_short_manual(module: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_ldm_run_that_is_signalled_ends_with_all_it_started(
    number: signal.Signals, code: int, project: Path, main: Callable[[], int], gone: Callable[[int], bool], tmp_path: Path
) -> None:
    """The command itself, from outside: nothing outlives it, and its MLflow run says what happened.

    Ctrl-C reaches one that has a temporary server; SIGTERM one that works with a server which was there before.
    """
    from prefect.settings import PREFECT_API_URL

    (project / "knob.txt").write_text("train_unet sleep")
    server = {"PREFECT_HOME": str(tmp_path / "prefect")}
    if number == signal.SIGTERM:
        server["PREFECT_API_URL"] = str(PREFECT_API_URL.value())
    command = [Path(sys.executable).with_name("ldm"), "run"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, env={**os.environ, **server}, start_new_session=True, **pipes)
    pid = project / "train_unet.pid"
    while not pid.exists() or not pid.read_text():
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    time.sleep(1)
    tasks = Path(f"/proc/{run.pid}/task").glob("*/children")
    started = [int(child) for children in tasks for child in children.read_text().split()]
    assert len(started) == (2 if number == signal.SIGINT else 1)  # DVC; a temporary server
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)  # Ctrl-C reaches all of a terminal's group
    _, err = run.communicate(timeout=60)
    assert run.returncode == code, err
    assert gone(int(pid.read_text())) and all(map(gone, started))
    assert statuses() == ["KILLED"]
    assert number != signal.SIGINT or "continues where this stopped" in err


def test_a_run_whose_prefect_server_dies_is_done_all_the_same(
    project: Path, main: Callable[[], int], tmp_path: Path, gone: Callable[[int], bool]
) -> None:
    """The command itself, from outside: registered, summarised, exit code 0, and soon."""
    (project / "knob.txt").write_text("train_unet wait")
    command, server = [Path(sys.executable).with_name("ldm"), "run"], {"PREFECT_HOME": str(tmp_path / "prefect")}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, env={**os.environ, **server}, **pipes)
    while not (project / "waits").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    children = psutil.Process(run.pid).children()
    (pid,) = (child.pid for child in children if "flows.server" in child.cmdline())
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    (project / "waits").unlink()
    out, err = run.communicate(timeout=60)
    assert (run.returncode, lookup("models:/ldm@champion").version) == (0, 1)
    assert "models:/ldm/1 (new)" in out and err.splitlines()[1:] == [run_module.GONE]  # the first: no commit yet
