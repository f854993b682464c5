"""Whatever is killed in mid-work, a scheduled run ends completed, with the bytes and the curves of an undisturbed one.

The whole pipeline at a tiny size, two ranks a training, Prefect and MLflow on PostgreSQL: what `make soak` runs for an hour.
"""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import MlflowServer
from postgres import Postgres, postgres
from schedules import Schedule
from tiny import TINY, clone, set_params

from ldm.base.files import locked
from ldm.registry.tracking import experiment_id, mlflow_client
from ldm.versioning.git import git

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
STAGES = ("train_vae", "cache_latents", "train_unet", "evaluate")
VICTIMS = {  # what their command lines hold
    "stage": "-m ldm.stages.{stage}", "rank": "-m ldm.stages.{stage}", "supervisor": "ldm.versioning.reproduce {stage}",
    "flow": "prefect.engine", "worker": "flows.owned", "keeper": "flows.schedule keep", "Prefect": "flows.server",
    "MLflow": "", "PostgreSQL": "",
}  # fmt: skip
Outcome = tuple[str, str, dict[str, dict[str, list[tuple[int, float]]]]]  # dvc.lock, metrics.json, history by stage and metric


class World:
    """The project on its schedule, and the servers around it."""

    def __init__(self, folder: Path, database: Postgres) -> None:
        self.database, self.root = database, clone(folder / "project")
        set_params(self.root, TINY)
        git(self.root, "commit", "--quiet", "-am", "tiny")
        (folder / "hold").mkdir()
        self.mlflow = MlflowServer(folder, database.url("mlflow", "psycopg2"))
        variables = {"MLFLOW_TRACKING_URI": self.mlflow.url, "LDM_PROCESSES": "2"}
        variables["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database.url("prefect", "asyncpg")
        self.schedule = Schedule(self.root, folder / "hold", **variables)
        self.schedule.command("flows.schedule", "start")

    def kill(self, victim: str, stage: str, rng: random.Random) -> None:
        """Kill it while the stage is at work, and bring back what nobody but an administrator starts again."""
        pattern = VICTIMS[victim].format(stage=stage)
        found = self.schedule.at_work(pattern)
        assert self.schedule.at_work(f"-m ldm.stages.{stage}"), f"{stage} had ended"
        if victim in ("MLflow", "PostgreSQL"):
            server: Any = self.mlflow if victim == "MLflow" else self.database
            server.kill()
            time.sleep(rng.uniform(1, 8))
            server.start()
            return
        assert found, self.schedule.processes()
        os.kill(max(found) if victim == "rank" else min(found), signal.SIGKILL)
        if victim == "keeper":
            self.schedule.wait(lambda: not self.schedule.processes(), 90)
            self.schedule.command("flows.schedule", "start")

    def outcome(self, state: Any) -> Outcome:
        branch = state.message.split(": ")[0]
        return (*(git(self.root, "show", f"{branch}:{name}") for name in ("dvc.lock", "reports/metrics.json")), self.curves())

    def curves(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Of the newest run of each training: every point of every metric, but for how fast it was."""
        client, found = mlflow_client(), {}
        experiment = experiment_id(client)
        for stage in ("train_vae", "train_unet"):
            run = client.search_runs([experiment], f"tags.`ldm.stage` = '{stage}'", order_by=["attributes.start_time DESC"])[0]
            assert run.info.status == "FINISHED", (stage, run.info.status)
            names = sorted(name for name in run.data.metrics if not name.startswith("system/"))
            histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
            found[stage] = {name: sorted((point.step, point.value) for point in points) for name, points in histories.items()}
        return found

    def check_that_nothing_is_left(self) -> None:
        workers = ("ldm.stages", "ldm.versioning", "prefect.engine")
        self.schedule.wait(lambda: not [line for line in self.schedule.processes().values() if any(map(line.count, workers))], 20)
        client = mlflow_client()
        assert not client.search_runs([experiment_id(client)], "attributes.status = 'RUNNING'")
        lock = self.root / ".ldm/slots/rebuild.lock"
        assert lock.is_file()
        self.schedule.wait(lambda: _free(lock), 5)  # the kernel frees memory before files
        record = self.root / ".ldm/worktrees/rebuild/.dvc/tmp/rwlock"
        assert not any(json.loads(record.read_text() or "{}").values())


def _free(path: Path) -> bool:
    with contextlib.suppress(BlockingIOError), locked(path, wait=False):
        return True
    return False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with postgres() as database, pytest.MonkeyPatch.context() as patch:
        made = World(tmp_path_factory.mktemp("chaos"), database)
        patch.setenv("MLFLOW_TRACKING_URI", made.mlflow.url)
        try:
            yield made
        finally:
            made.schedule.command("flows.schedule", "stop")
            made.mlflow.kill()
            assert made.schedule.processes() == {}


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Outcome:
    state = world.schedule.state(world.schedule.run("rebuild"), "Completed", "Failed", "Crashed", seconds=300)
    assert state.name == "Completed", state.message
    return world.outcome(state)


@pytest.mark.parametrize("seed", range(24))
def test_a_killed_run_ends_as_an_undisturbed_one(seed: int, world: World, undisturbed: Outcome) -> None:
    rng = random.Random(seed)
    victim, stage = list(VICTIMS)[seed % len(VICTIMS)], rng.choice(STAGES)
    stage = rng.choice(("train_vae", "train_unet")) if victim == "rank" else stage
    world.schedule.forget()
    run = world.schedule.run("rebuild")
    world.schedule.wait(lambda: world.schedule.at_work(f"-m ldm.stages.{stage}"), 240)
    time.sleep(rng.uniform(0, 4))
    world.kill(victim, stage, rng)
    state = world.schedule.state(run, "Completed", "Failed", seconds=300)
    assert state.name == "Completed", (victim, stage, state.message)
    dvc_lock, metrics, curves = world.outcome(state)
    assert (dvc_lock, metrics) == undisturbed[:2], (victim, stage)
    assert curves == undisturbed[2], (victim, stage)
    world.check_that_nothing_is_left()
    again = world.schedule.state(world.schedule.run("rebuild"), "Nothing to do", "Completed", "Failed", "Crashed", seconds=60)
    assert again.name == "Nothing to do"
