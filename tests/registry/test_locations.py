"""MLflow's stores in folders that are moved, copied and shared; the referee is MLflow's own client."""

import contextlib
import hashlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest
from mlflow.entities import LoggedModelStatus
from mlflow.tracking._tracking_service import utils

from ldm.registry import locations
from ldm.registry.tracking import Records, experiment_id, mlflow_client, stage_run
from ldm.registry.versions import find, lookup

NAMES = ("new", "größe #1, 100%", "mlruns")


def move(old: Path, new: Path) -> None:
    old.rename(new)


def copy(old: Path, new: Path) -> None:
    shutil.copytree(old, new)


@contextlib.contextmanager
def rows(folder: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a folder's store, committed at the end."""
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store, store:
        yield store


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Makes a folder's store the one that is used, as in a new process; returns MLflow's client."""

    def use(folder: Path) -> Any:
        utils._artifact_repos_cache.clear()  # by the ids of runs
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        monkeypatch.chdir(folder)
        return mlflow_client()

    return use


@pytest.fixture
def old(database: Path, tmp_path: Path) -> Path:
    """A folder with a store in which nothing was recorded."""
    folder = tmp_path / "projects/old"
    folder.mkdir(parents=True)
    (folder / "dvc.yaml").touch()  # a project's
    shutil.copy(database, folder)
    with rows(folder) as store:  # the experiment that comes with a store lies beside it, too
        store.execute("UPDATE experiments SET artifact_location = ?", (str(folder / "mlruns/0"),))
    return folder


def fill(client: Any, text: str = "of the old") -> str:
    """A run with a file, and a registered model with a file, as `ldm.registry.registration` makes them; returns the run's id."""
    experiment = experiment_id(client)
    run = client.create_run(experiment).info.run_id
    client.log_text(run, text, "run.txt")
    model = client.create_logged_model(experiment, "ldm", run).model_id
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.txt").write_text(text)
        client.log_model_artifacts(model, folder)
    client.finalize_logged_model(model, LoggedModelStatus.READY)
    if not client.search_registered_models():
        client.create_registered_model("ldm")
    version = client.create_model_version("ldm", f"models:/{model}", run, model_id=model).version
    client.set_registered_model_alias("ldm", "champion", version)
    return str(run)


def stored(folder: Path) -> list[str]:
    with rows(folder) as store:
        found = [store.execute(f"SELECT {column} FROM {table}").fetchall() for table, column in locations.COLUMNS]
    return [value for values in found for (value,) in values if value]


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [move, copy])
def test_a_store_is_read_and_written_where_it_is(how: Any, name: str, old: Path, use: Callable[[Path], Any]) -> None:
    run = fill(use(old))
    new = old.parent / name
    how(old, new)
    before = contents(old) if how is copy else {}
    client = use(new)
    assert {version.folder.relative_to(new).parts[:2] for version in find({}) if version.folder} == {("mlruns", "ldm")}
    assert Path(mlflow.artifacts.download_artifacts("models:/ldm@champion/model.txt")).read_text() == "of the old"
    assert Path(client.download_artifacts(run, "run.txt")).read_text() == "of the old"
    fill(client, "of the new")
    client.log_text(run, "later", "later.txt")
    assert str(lookup("models:/ldm@champion").folder).startswith(f"{new}/")
    assert all(str(old) not in location for location in stored(new))
    assert (before == contents(old)) if how is copy else not old.exists()


@pytest.mark.parametrize("how", [move, copy])
def test_one_whose_first_run_stored_nothing_is_moved_too(how: Any, old: Path, use: Callable[[Path], Any]) -> None:
    client = use(old)
    client.create_run(experiment_id(client))
    new = old.parent / "new"
    how(old, new)
    fill(use(new))
    assert not (old / "mlruns").exists() and (new / "mlruns/ldm/models").is_dir()


@pytest.mark.parametrize("absent", [False, True])
def test_what_lies_elsewhere_on_purpose_stays_there(absent: bool, old: Path, tmp_path: Path, use: Callable[[Path], Any]) -> None:
    """In another folder, which may be a disk that is not mounted now, or in a bucket."""
    other = tmp_path / "disk"
    other.mkdir()
    client = use(old)
    client.create_experiment("ldm", artifact_location=str(other / "mlruns/ldm"))
    client.create_experiment("bucket", artifact_location="s3://bucket/mlruns/bucket")
    fill(client)
    client.create_model_version("ldm", "s3://bucket/mlruns/ldm/m-1")
    new = old.parent / "new"
    move(old, new)
    (new / "mlruns/ldm").mkdir(parents=True)
    if absent:
        other.rename(tmp_path / "unmounted")
    before = sorted(location for location in stored(new) if "/0" not in location[-2:])
    use(new)
    found = find({})
    assert sorted(location for location in stored(new) if "/0" not in location[-2:]) == before
    assert [version.folder is None for version in found] == [True, absent]
    assert [version.lost is not None for version in found] == [False, absent]


def test_a_link_to_the_folder_changes_nothing(old: Path, tmp_path: Path, use: Callable[[Path], Any]) -> None:
    fill(use(old))
    before = stored(old)
    (tmp_path / "link").symlink_to(old)
    use(tmp_path / "link")
    assert lookup("models:/ldm@champion").folder and stored(old) == before


def test_a_store_that_cannot_be_written_is_read(old: Path, use: Callable[[Path], Any]) -> None:
    fill(use(old))
    new = old.parent / "new"
    move(old, new)
    with rows(new) as holder:
        holder.execute("BEGIN IMMEDIATE")  # another process writes, for longer than we wait
        holder.execute("UPDATE experiments SET lifecycle_stage = lifecycle_stage")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(locations, "BUSY_SECONDS", 0.1)
            patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{new}/mlflow.db")
            before = stored(new)
            assert str(lookup("models:/ldm@champion").folder).startswith(f"{new}/")
            assert stored(new) == before and any(str(old) in location for location in before)


def test_records_that_wait_for_a_server_move_along(
    old: Path, use: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (old / "result.txt").write_text("made before the move")
    monkeypatch.setenv("LDM_RECORDS", str(old / ".ldm/tracking"))
    with stage_run("train_vae", {}) as run:
        run.artifact(old / "result.txt")
    new = old.parent / "new"
    move(old, new)
    client = use(new)
    Records(new / ".ldm/tracking").deliver()
    (stored,) = client.search_runs([experiment_id(client)])
    assert [file.path for file in client.list_artifacts(stored.info.run_id)] == ["result.txt"]
    assert os.listdir(new / ".ldm/tracking") == []


def test_a_store_in_no_project_is_shared_and_only_read(old: Path, use: Callable[[Path], Any]) -> None:
    """What it names may lie on the machines of others."""
    client = use(old)
    client.create_run(experiment_id(client))
    (old / "dvc.yaml").unlink()
    new = old.parent / "shared"
    move(old, new)
    before = stored(new)
    use(new)
    assert find({}) == [] and stored(new) == before


def test_a_copy_never_writes_where_the_original_goes_on(old: Path, use: Callable[[Path], Any]) -> None:
    client = use(old)
    client.create_run(experiment_id(client))
    new = old.parent / "new"
    copy(old, new)
    fill(use(old), "of the original")
    before = contents(old)
    fill(use(new), "of the copy")
    assert contents(old) == before and (new / "mlruns/ldm/models").is_dir()
