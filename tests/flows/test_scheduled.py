"""The flow `collect`, on a small project."""

import time
from pathlib import Path

import httpx
import pytest
from dvc.repo import Repo
from prefect.settings import PREFECT_API_URL
from tiny import set_params

from ldm.versioning.cache import path_of
from ldm.versioning.git import git

MINE = "data/raw/mine"


@pytest.fixture
def deleted(project: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, whose collection had an image until a moment ago."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")
    set_params(project, {"data": {"path": MINE}})
    (project / MINE).mkdir(parents=True)
    for name in ("stays", "goes"):
        (project / MINE / f"{name}.png").write_text(name)
    for message in ("both", "one"):
        with Repo(str(project)) as repo:
            repo.add([MINE])
        git(project, "add", f"{MINE}.dvc", "params.yaml")
        git(project, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "--message", message)
        (project / MINE / "goes.png").unlink(missing_ok=True)
    return project


def contents(project: Path) -> set[str]:
    files = (project / ".dvc/cache/files/md5").glob("*/*")
    return {path.read_text() for path in files if path.suffix != ".dir"} & {"stays", "goes"}


def test_it_purges_what_was_deleted_some_days_ago(deleted: Path) -> None:
    from flows.scheduled import collect

    assert collect(return_state=True).message.startswith("0 deleted images purged; ")
    assert contents(deleted) == {"stays", "goes"}
    state = collect(purge_days=0, return_state=True)
    assert state.name == "Completed" and state.message.startswith("1 deleted images purged; "), state.message
    assert contents(deleted) == {"stays"}


def test_what_it_cannot_purge_is_in_its_message_and_sent_as_news(deleted: Path) -> None:
    from flows.scheduled import collect

    listing = git(deleted, "show", f"HEAD:{MINE}.dvc").partition("md5: ")[2].split()[0]
    path_of(deleted / ".dvc/cache", listing).unlink()
    state = collect(purge_days=0, return_state=True)
    said = "could not be purged and are tried again next time (the collection: "
    assert state.name == "Completed" and said in state.message and "missing or damaged" in state.message
    assert contents(deleted) == {"stays", "goes"}
    with httpx.Client(base_url=PREFECT_API_URL.value(), timeout=30) as api:
        deadline = time.monotonic() + 30
        while not (found := api.post("/events/filter", json={"filter": {"event": {"name": ["ldm.left"]}}}).json()["events"]):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert said in found[0]["payload"]["message"] and found[0]["resource"]["prefect.resource.id"] == "ldm.collect"
