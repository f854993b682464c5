"""The schedule itself: keeper, server, worker and deployments as `make schedule` starts them, on a small project."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from postgres import postgres
from schedules import Schedule
from tiny import REPOSITORY

from ldm.registry.versions import find
from ldm.versioning.git import git

pytestmark = pytest.mark.timeout(280)
HOLD = """
hold = pathlib.Path(os.environ["HOLD"], name)
if hold.exists():
    hold.write_text("here")
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def schedule(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Schedule]:
    folder = tmp_path_factory.mktemp("schedule")
    root = Path(shutil.copytree(template, folder / "project", symlinks=True))
    stage = root / "stage.py"
    text = stage.read_text().replace("for folder in (", f"{HOLD}for folder in (", 1)
    late = '"32x32x1, " + pathlib.Path("late.txt").read_text()'  # models are not compared: they are no models
    stage.write_text(text.replace('"32x32x1, lanczos"', late))
    graph, deps = root / "dvc.yaml", "deps: [models/ldm, data/shards"
    graph.write_text(graph.read_text().replace(deps, f"{deps}, late.txt"))
    (root / "late.txt").write_text("first")
    shutil.copytree(REPOSITORY / "infra", root / "infra")
    (root / "data/raw/source/picture.txt").write_text("a picture")
    (root / ".gitignore").write_text(
        "/.ldm/\n/data/shards\n/models/\n/reports/*\n/aside.txt\n/after.txt\n/*.pid\n/seven.txt\n/mlruns/\n/mlflow.db*\n"
    )
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a project")
    (folder / "hold").mkdir()
    with postgres() as database:
        made = Schedule(root, folder / "hold", PREFECT_SERVER_DATABASE_CONNECTION_URL=database.url("prefect", "asyncpg"))
        made.command("flows.schedule", "start")
        try:
            yield made
        finally:
            made.command("flows.schedule", "stop")
            assert made.processes() == {}


def test_a_run_leaves_a_commit_and_the_next_one_has_nothing_to_do(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    first = schedule.state(schedule.run("nightly"), "Completed", "Failed", "Crashed")
    assert first.name == "Completed", first.message
    (branch,) = schedule.branches()
    assert first.message.startswith(f"{branch}: ")
    assert branch.startswith("runs/nightly/2")
    changed = git(schedule.root, "diff", "--name-only", "HEAD", branch).splitlines()
    assert {"dvc.lock", "reports/metrics.json", "reports/report.html"} <= set(changed)
    assert git(schedule.root, "show", f"{branch}:reports/report.html") == "<p>fine</p>"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{schedule.root}/mlflow.db")
    (version,) = find({})
    assert (
        version.tags["ldm.git_commit"] == git(schedule.root, "rev-parse", f"{branch}~1")
        and version.tags["ldm.git_dirty"] == "false"
    )
    second = schedule.state(schedule.run("nightly"), "Nothing to do", "Completed", "Failed", "Crashed")
    assert second.name == "Nothing to do" and branch in second.message
    assert schedule.branches() == [branch] and len(find({})) == 1
    assert git(schedule.root, "status", "--porcelain") == "" and not (schedule.root / "data/shards").exists()


def test_a_run_works_with_the_commit_that_it_began_with_and_a_second_one_is_skipped(schedule: Schedule) -> None:
    """The checkout changes in mid-run, and the deployment is started again."""
    root, hold = schedule.root, schedule.held("evaluate")
    schedule.commit("late.txt", "before")
    run = schedule.run("rebuild")
    schedule.reach(run, "evaluate")
    schedule.commit("late.txt", "after")
    (root / "stage.py").write_text((root / "stage.py").read_text() + "\nraise SystemExit('not this')\n")
    assert schedule.state(schedule.run("rebuild"), "Skipped", "Completed", "Failed", "Crashed").name == "Skipped"
    hold.unlink()
    (pid,) = schedule.at_work("stage.py evaluate")
    os.kill(pid, signal.SIGKILL)  # a retry finds nothing that holds it up
    state = schedule.state(run, "Completed", "Failed", "Crashed")
    assert state.name == "Completed", state.message
    branch = next(name for name in schedule.branches() if name.startswith("runs/rebuild/"))
    assert git(root, "show", f"{branch}:late.txt") == "before"
    assert "32x32x1, before" in git(root, "show", f"{branch}:reports/metrics.json")
    git(root, "checkout", "-q", "stage.py")


@pytest.mark.parametrize("who", ["prefect.engine", "flows.owned", "flows.server"])
def test_whoever_is_killed_the_run_ends_completed(who: str, schedule: Schedule) -> None:
    """The flow's process, the worker, the server: in mid-stage."""
    root, hold = schedule.root, schedule.held("evaluate")
    schedule.commit("late.txt", who)
    run = schedule.run("rebuild")
    schedule.reach(run, "evaluate")
    (victim,) = schedule.at_work(who)
    assert schedule.at_work("stage.py evaluate")
    hold.unlink()
    os.kill(victim, signal.SIGKILL)
    if who == "flows.server":  # the stage went on
        schedule.wait(lambda: schedule.at_work(who) not in ([], [victim]))
        (stage,) = schedule.at_work("stage.py evaluate")
        os.kill(stage, signal.SIGKILL)
    state = schedule.state(run, "Completed", "Failed")
    assert state.name == "Completed", state.message
    assert who in git(root, "show", f"{state.message.split(': ')[0]}:reports/metrics.json")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("quiet_days: 14}", "quiet_day: 14}", "nightly: no parameter 'quiet_day'; there are ingest, quiet_days, settings, start"),
        ("parameters: {start: nothing, settings: []}", "parameters: {start: nothing", "cannot be read"),
        ('cron: "0 3 * * *"', 'cron: "0 3 * *"', "nightly: Invalid cron string: .0 3 \\* \\*."),
        ("work_pool: *machine", "work_pool: {name: ldm-none}", "Prefect refuses it"),
    ],
)
def test_a_mistake_in_the_deployments_is_one_line(old: str, new: str, message: str, schedule: Schedule) -> None:
    path = schedule.root / "infra/prefect.yaml"
    text = path.read_text()
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(AssertionError, match=rf"error: .*infra/prefect\.yaml: {message}"):
        schedule.command("flows.schedule", "start")
    path.write_text(text)


def test_a_cancelled_run_ends_soon_and_leaves_no_process(schedule: Schedule) -> None:
    from prefect.states import Cancelling

    hold = schedule.held("shard")
    schedule.commit("knob.txt", "cancelled")
    run = schedule.run("on-demand", settings=["registry.level=0.01"])
    schedule.reach(run, "shard")
    with schedule.client() as client:
        client.set_flow_run_state(run, Cancelling())
    assert schedule.state(run, "Cancelled", "Failed", "Crashed", seconds=30).name == "Cancelled"
    schedule.wait(lambda: not schedule.at_work("stage.py") + schedule.at_work("prefect.engine"), 30)
    hold.unlink()
    assert not any(name.startswith("runs/on-demand") for name in schedule.branches())


@pytest.fixture
def received(schedule: Schedule) -> Iterator[list[str]]:
    """What is sent to a block of Prefect's, custom-webhook/team."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    found = list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.append(f"{sent['subject']}: {sent['body']}")
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with schedule.client():
        url, texts = f"http://127.0.0.1:{server.server_port}", {"subject": "{{subject}}", "body": "{{body}}"}
        CustomWebhookNotificationBlock(name="team", url=url, json_data=texts).save("team")
    yield found
    server.shutdown()


def test_after_the_keepers_death_the_run_goes_on_and_news_and_failures_are_sent(schedule: Schedule, received: list[str]) -> None:
    """The keeper is killed in mid-stage, leaves nothing, and is started again with a block of Prefect's to notify."""
    hold = schedule.held("evaluate")
    schedule.commit("late.txt", "reboot")
    run = schedule.run("rebuild")
    schedule.reach(run, "evaluate")
    hold.unlink()
    (keeper,) = schedule.at_work("flows.schedule keep")
    os.kill(keeper, signal.SIGKILL)
    schedule.wait(lambda: not schedule.processes(), 60)
    schedule.command("flows.schedule", "start", LDM_NOTIFY="custom-webhook/team")
    with pytest.raises(AssertionError, match="no such block"):
        schedule.command("flows.schedule", "start", LDM_NOTIFY="custom-webhook/nobody")
    state = schedule.state(run, "Completed", "Failed")
    assert state.name == "Completed", state.message
    schedule.wait(lambda: any(text.startswith("ldm.rejected: models:/ldm/") for text in received), 30)
    schedule.commit("knob.txt", "shard exit 2")
    assert schedule.state(schedule.run("rebuild"), "Completed", "Failed", "Crashed").name == "Failed"
    schedule.wait(lambda: any(text.startswith("rebuild: Failed: shard cannot") for text in received), 30)
