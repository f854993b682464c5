"""The flow on a small project, with Prefect, DVC and MLflow as they are."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm import registry, tracking

pytestmark = pytest.mark.usefixtures("prefect_server")


def statuses(root: Path) -> list[str]:
    """Of every pipeline's run in MLflow, newest first."""
    client = tracking.mlflow_client()
    return [run.info.status for run in client.search_runs([tracking.experiment_id(client)], "tags.`ldm.stage` = 'pipeline'")]


def run_main(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    from flows import pipeline

    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["flows.pipeline"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")  # as it sets itself; undone after the test
    monkeypatch.setattr(pipeline.run_stage, "retry_delay_seconds", 0)
    return pipeline.main()


def test_a_run_registers_a_champion_and_the_next_one_has_nothing_to_do(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    assert run_main(project, monkeypatch) == 0
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if line.endswith("starts")] == ["shard starts", "train_unet starts", "evaluate starts"]
    for expected in ("1.2500 ± 0.0100", "2 test images of 32x32x1, lanczos", "97.5%", "models:/ldm/1 (new)", "no champion yet"):
        assert expected in out
    assert 'ldm sample --model models:/ldm@champion --prompt "a handwritten seven"' in out
    assert registry.lookup("models:/ldm@champion").version == 1
    assert statuses(project) == ["FINISHED"]

    assert run_main(project, monkeypatch) == 0
    out = capfd.readouterr().out
    assert "starts" not in out and "models:/ldm/1 (registered before)" in out
    assert len(registry.versions()) == 1
    assert "| evaluate | cached |" in _newest_artifact()


def _newest_artifact() -> str:
    from prefect.artifacts import Artifact

    artifact = Artifact.get("ldm-pipeline-summary")
    return str(artifact.data)  # type: ignore[union-attr]


def test_a_stage_that_fails_once_is_tried_again(project: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    (project / "knob.txt").write_text("train_unet once")
    assert run_main(project, monkeypatch) == 0
    assert capfd.readouterr().out.count("train_unet starts") == 2


@pytest.mark.parametrize(("code", "tries", "expected"), [(2, 1, 2), (7, 2, 1)])
def test_a_stage_that_fails_ends_the_run_with_its_own_words(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, code: int, tries: int, expected: int
) -> None:
    (project / "knob.txt").write_text(f"train_unet exit {code}")
    assert run_main(project, monkeypatch) == expected
    captured = capfd.readouterr()
    assert captured.out.count("train_unet starts") == tries and "evaluate starts" not in captured.out
    assert captured.err.splitlines()[-1] == "error: train_unet cannot"
    assert f"exit code {code}" in captured.err and "Traceback" not in captured.err
    assert statuses(project) == ["FAILED"]
    assert registry.versions().empty


def test_bad_settings_stop_everything_before_it_starts(project: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    (project / "params.yaml").write_text((project / "params.yaml").read_text().replace("train_vae:", "train_vea:"))
    before = set(project.iterdir())
    assert run_main(project, monkeypatch) == 2
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1 and "train_vea" in captured.err
    assert set(project.iterdir()) == before


def test_prefect_knows_the_edges_and_the_lines(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterTaskRunId
    from prefect.client.schemas.sorting import FlowRunSort

    assert run_main(project, monkeypatch) == 0
    with get_client(sync_client=True) as client:
        (flow_run,) = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        runs = {run.name: run for run in client.read_task_runs(flow_run_filter=only)}
        assert {"shard", "train_unet", "evaluate"} <= runs.keys()
        needed = {found.id for found in runs["evaluate"].task_inputs["wait_for"]}
        assert needed == {runs["shard"].id, runs["train_unet"].id}
        assert LogFilter(task_run_id=LogFilterTaskRunId(any_=[runs["shard"].id]))


def test_help_reads_like_a_short_manual() -> None:
    for module in ("flows.pipeline", "flows.serve"):
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout, json.dumps(done.stderr)
