"""What a team relies on at night, with the real stages at a tiny size: nights, cancelling, two deployments at once."""

import io
import itertools
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from inboxes import MINE, drop
from PIL import Image
from safetensors.torch import load_file
from schedules import Schedule
from sklearn.datasets import load_digits
from tiny import TINY, clone, set_params

from ldm.registry.tracking import experiment_id, mlflow_client
from ldm.registry.versions import find
from ldm.versioning.git import git

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
ENDS = ("Completed", "Nothing to do", "Failed", "Crashed", "Cancelled")
SECONDS = 10  # between two nights
NIGHTLY = 'schedules: [{cron: "0 3 * * *", timezone: UTC}]\n    parameters: {start: champion, ingest: null,'


def drop_digits(inbox: Path, start: int, stop: int) -> None:
    """Handwritten digits of scikit-learn with captions, as if they had lain there for a while."""
    digits = load_digits()
    for number in range(start, stop):
        buffer = io.BytesIO()
        Image.fromarray((digits.images[number] * 255 / 16).astype("uint8")).resize((32, 32)).save(buffer, "PNG")
        drop(inbox / f"{number:04d}.txt", f"a handwritten {digits.target[number]}")
        drop(inbox / f"{number:04d}.png", buffer.getvalue())


class Watch(threading.Thread):
    """Asks git again and again what has changed in the user's checkout."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        self.root, self.looks, self.seen, self.ended = root, 0, set[str](), threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.3):
            done = subprocess.run(["git", "status", "--porcelain"], cwd=self.root, capture_output=True, text=True)
            self.seen |= {done.stdout + done.stderr}
            self.looks += 1


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Schedule]:
    """A nightly deployment, due every few seconds, with an inbox."""
    root, inbox = clone(tmp_path / "project"), tmp_path / "inbox"
    set_params(root, TINY | {"data": {"path": MINE}})
    file = root / "infra/prefect.yaml"
    text = file.read_text()
    assert text.count(NIGHTLY) == 1
    file.write_text(
        text.replace(NIGHTLY, f"schedules: [{{interval: {SECONDS}}}]\n    parameters: {{start: champion, ingest: {inbox},")
    )
    git(root, "commit", "--quiet", "-am", "tiny")
    inbox.mkdir()
    (tmp_path / "hold").mkdir()
    made = Schedule(root, tmp_path / "hold")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        yield made
    finally:
        made.command("flows.schedule", "stop")
        assert made.processes() == {}


def nothing_to_do(schedule: Schedule) -> int:
    """How many runs have ended so."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateName

    wanted = FlowRunFilter(state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Nothing to do"])))
    with schedule.client() as client:
        return len(client.read_flow_runs(flow_run_filter=wanted))


def branch_of(schedule: Schedule, number: int, seconds: float = 300) -> str:
    """The branch of a slot's run of today, the first, the second, …, once it is there."""

    def there() -> str | None:
        found = [name for name in schedule.branches() if name.startswith("runs/nightly/")]
        return sorted(found, key=len)[-1] if len(found) == number else None

    return str(schedule.wait(there, seconds))


def stage_runs(stage: str) -> list[Any]:
    client = mlflow_client()
    return list(client.search_runs([experiment_id(client)], f"tags.`ldm.stage` = '{stage}'"))


def unet(version: int, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a registered version's U-Net, as MLflow hands its files out."""
    from mlflow.artifacts import download_artifacts

    found = Path(download_artifacts(artifact_uri=f"models:/ldm/{version}", dst_path=str(folder / str(version))))
    (path,) = found.rglob("unet/*.safetensors")
    return load_file(path)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return float(sum((one[name] - other[name]).square().sum() for name in one)) ** 0.5


def test_nights_take_in_what_came_and_go_on_from_the_champion(watched: Schedule, tmp_path: Path) -> None:
    root, inbox = watched.root, tmp_path / "inbox"
    drop_digits(inbox, 0, 300)
    watch = Watch(root)
    watch.start()
    watched.command("flows.schedule", "start")
    first = branch_of(watched, 1)
    watched.wait(lambda: nothing_to_do(watched), 60)
    assert [version.version for version in find({})] == [1] and len(watched.branches()) == 2  # the other has the collection
    store = {path.name: path.stat().st_mtime_ns for path in (root / ".ldm/store/latents").iterdir()}
    assert len(store) == 2  # of train and val

    drop_digits(inbox, 300, 360)
    second = branch_of(watched, 2)
    after = {path.name: path.stat().st_mtime_ns for path in (root / ".ldm/store/latents").iterdir()}
    assert store.items() <= after.items() and len(after) == 4  # only the new shards
    assert sorted(path.name for path in inbox.iterdir()) == []
    pinned = yaml.safe_load(git(root, "show", f"{second}:params.yaml"))
    champion = pinned["train_unet"]["init"]
    assert champion.startswith("models:/ldm/1@") and pinned["autoencoder"]["pretrained"] == champion
    assert pinned["train_vae"]["images"] == 0
    initial = load_file(next((root / ".ldm/worktrees/nightly/models/initial/unet").glob("*.safetensors")))
    one, two = unet(1, tmp_path), unet(2, tmp_path)
    assert distance(initial, one) == 0 < distance(two, one)
    locks = [yaml.safe_load(git(root, "show", f"{branch}:dvc.lock"))["stages"] for branch in (first, second)]
    autoencoders = [lock["train_vae"]["outs"][0]["md5"] for lock in locks]
    assert autoencoders[0] == autoencoders[1]
    for branch in (first, second):
        assert "gate: " in git(root, "log", "-1", "--format=%B", branch)
        assert "<html" in git(root, "show", f"{branch}:reports/decision.html")

    rebuilt = watched.state(watched.run("rebuild", settings=["seed=1"]), *ENDS, seconds=300)
    assert rebuilt.name == "Completed", rebuilt.message
    branch = rebuilt.message.split(": ")[0]
    lock = yaml.safe_load(git(root, "show", f"{branch}:dvc.lock"))["stages"]
    assert lock["shard"]["outs"] == locks[1]["shard"]["outs"]  # of all images
    assert lock["train_vae"]["outs"][0]["md5"] not in autoencoders
    assert yaml.safe_load(git(root, "show", f"{branch}:params.yaml"))["train_unet"]["init"] is None
    three = unet(3, tmp_path)
    assert distance(three, one) > 3 * distance(two, one)  # it started elsewhere
    assert [len(stage_runs(stage)) for stage in ("train_vae", "train_unet")] == [3, 3]
    watch.ended.set()
    watch.join()
    assert watch.seen == {""} and watch.looks > 50


GPU_STAGES = ("train_vae", "cache_latents", "train_unet", "evaluate")
DEPLOYMENTS: dict[str, list[str]] = {"rebuild": [], "on-demand": ["seed=1", "train_unet.lr=2e-3"]}  # with their settings
LOCKED = re.compile(r"(?i)\block(ed|s)?\b|lockerror")
Outcome = dict[str, tuple[str, ...]]  # of a deployment: its branch's dvc.lock, metrics and settings


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Schedule]:
    folder = tmp_path_factory.mktemp("pair")
    root = clone(folder / "project")
    set_params(root, TINY)
    git(root, "commit", "--quiet", "-am", "tiny")
    (folder / "hold").mkdir()
    made = Schedule(root, folder / "hold", TMPDIR=str(folder))
    try:
        yield made
    finally:
        made.command("flows.schedule", "stop")
        assert made.processes() == {}


def finish(schedule: Schedule, runs: dict[str, Any]) -> Outcome:
    """Wait for runs, and read what they have left."""
    found = {}
    for deployment, run in runs.items():
        state = schedule.state(run, *ENDS, seconds=400)
        assert state.name == "Completed", state.message
        branch = state.message.split(": ")[0]
        names = ("dvc.lock", "reports/metrics.json", "params.yaml")
        found[deployment] = tuple(git(schedule.root, "show", f"{branch}:{name}") for name in names)
    return found


@pytest.fixture(scope="module")
def alone(pair: Schedule) -> Outcome:
    """What each of the deployments makes if nothing else runs."""
    pair.command("flows.schedule", "start")
    found: Outcome = {}
    for deployment, settings in DEPLOYMENTS.items():
        pair.forget()
        found |= finish(pair, {deployment: pair.run(deployment, settings=settings)})
    pair.command("flows.schedule", "stop")
    return found


@pytest.mark.parametrize("turns", ["", "a machine's GPU", "a team's limit"])
def test_two_deployments_at_once_do_what_each_does_alone(
    turns: str, pair: Schedule, alone: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    from flows.gpus import LIMIT

    assert alone["rebuild"] != alone["on-demand"]
    root = pair.root
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    pair.forget()
    before = {run.info.run_id for stage in GPU_STAGES for run in stage_runs(stage)}
    (schedule_log := root / ".ldm/schedule.log").unlink()
    pair.command("flows.schedule", "start", **({"LDM_GPUS": "1" if "machine" in turns else "2"} if turns else {}))
    if "limit" in turns:
        with pair.client() as client:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))
    runs = {deployment: pair.run(deployment, settings=settings) for deployment, settings in DEPLOYMENTS.items()}
    assert finish(pair, runs) == alone
    for deployment in DEPLOYMENTS:
        assert not list((root / ".ldm/worktrees" / deployment / ".dvc").glob("cache/**/*"))  # they share the checkout's
    with pair.client() as client:
        logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=list(runs.values()))), limit=200)
    lines = [log.message for log in logs] + [line for line in schedule_log.read_text().splitlines() if " run '" in line]
    assert len(logs) > 20 and [line for line in lines if LOCKED.search(line)] == []
    stages = [run.info for stage in GPU_STAGES for run in stage_runs(stage) if run.info.run_id not in before]
    assert len(stages) == 2 * len(GPU_STAGES)
    times = sorted((run.start_time, run.end_time) for run in stages)
    overlapping = [later for earlier, later in itertools.pairwise(times) if later[0] < earlier[1]]
    assert not overlapping if turns else overlapping
    pair.command("flows.schedule", "stop")
