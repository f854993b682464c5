"""Look-ups in MLflow's SQLite file beside MLflow's own client."""

import hashlib
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from ldm.base.errors import InputError
from ldm.registry import versions as registry
from ldm.registry.versions import find, lookup, read_sqlite

NAMES = ("ldm", 'it\'s 50 % "größer"', "モデル", "a.b-c_d")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with models of several versions, some of which lost tags, aliases or themselves."""
    root = tmp_path_factory.mktemp("store")
    places = [root / "plain", root / "a b%20c", root / "gone"]
    for place in places[:2]:
        place.mkdir()
    sources = [
        str(places[0]),
        places[0].as_uri(),
        places[1].as_uri(),
        str(places[1]),  # MLflow decodes paths too
        str(places[2]),
        "s3://bucket/model",
        "mlflow-artifacts:/1/models/m-1/artifacts",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        client = MlflowClient()
        for name in NAMES:
            client.create_registered_model(name)
            for number, source in enumerate(sources, start=1):
                tags = {"ldm.model": "a'b\"c\n" * number, "empty": "", "größe": "ü", f"only {number}": "x" * 5000}
                run_id = None if number % 2 else f"{number:032x}"
                client.create_model_version(name, source, run_id, tags=tags)
            for alias, number in {"champion": 3, "previous": 3, "challenger": 7, "lost": 2, "Ärger-1": 1, "dropped": 4}.items():
                client.set_registered_model_alias(name, alias, str(number))
            client.delete_model_version_tag(name, "1", "empty")
            client.set_model_version_tag(name, "1", "größe", "changed")
            client.delete_model_version(name, "2")  # and with it its alias
            client.delete_registered_model_alias(name, "dropped")
        client.create_registered_model("without versions")
        client.create_registered_model("deleted")
        client.create_model_version("deleted", sources[0])
        client.delete_registered_model("deleted")
    return root


@pytest.fixture
def store(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of its file."""
    file = tmp_path / "ml flow#1.db"
    file.write_bytes((filled / "mlflow.db").read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    return file


def aliases(versions: list[registry.Version]) -> dict[str, int]:
    return {alias: version.version for version in versions for alias in version.aliases}


@pytest.mark.parametrize("name", [*NAMES, "without versions", "deleted", "never made"])
def test_a_model_is_what_mlflow_says(store: Path, name: str) -> None:
    client, versions = MlflowClient(), read_sqlite(name)
    assert versions is not None
    query = f'name = "{name}"' if "'" in name else f"name = '{name}'"
    page = client.search_model_versions(query) if query.count('"') < 3 else []  # its query language has no such name
    numbers = {int(version.version) for version in page} or {version.version for version in versions}
    assert [version.version for version in versions] == sorted(numbers, reverse=True)
    known = {found.name: found.aliases for found in client.search_registered_models()}
    assert aliases(versions) == {alias: int(number) for alias, number in known.get(name, {}).items()}
    for found in versions:
        theirs = client.get_model_version(name, str(found.version))
        expected = (theirs.name, theirs.creation_timestamp, theirs.run_id, theirs.tags)
        assert (found.name, found.created.timestamp() * 1000, found.run_id, found.tags) == expected
    assert (name in NAMES) == bool(versions)


@pytest.mark.parametrize("name", NAMES)
def test_folders_are_where_mlflow_reads_them(store: Path, name: str) -> None:
    versions = read_sqlite(name)
    assert versions is not None
    for version in versions:
        place = Path(local_file_uri_to_path(MlflowClient().get_model_version_download_uri(name, str(version.version))))
        assert version.folder == (place if place.is_dir() else None)
    assert sum(version.folder is not None for version in versions) == 2  # version 2, the third, is deleted


def test_the_registry_answers_alike_through_mlflow(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[object]:
        known = [lookup(f"models:/ldm{which}") for which in ("@champion", "@Ärger-1", "/3", "/007")]
        known += [*find({}), *find({"größe": "ü", "only 5": "x" * 5000}), *find({"größe": "no"})]
        known += find({}, "never made")
        refusals = []
        for uri in ("models:/ldm@lost", "models:/ldm@champions", "models:/ldm/2"):
            with pytest.raises(InputError) as refused:
                lookup(uri)
            refusals.append(str(refused.value))
        return [replace(version, folder=None) for version in known] + refusals

    direct = answers()
    monkeypatch.setattr(registry, "REVISION", "of another MLflow")
    assert read_sqlite("ldm") is None
    assert answers() == direct


def test_a_hash_names_that_model_or_nothing(store: Path, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(b"a model").hexdigest()
    MlflowClient().set_model_version_tag("ldm", "3", "ldm.model", digest)
    version = lookup("models:/ldm/3")
    assert version.pinned == f"models:/ldm/3@{digest[:12]}"
    assert [lookup(f"models:/ldm/3@{digest[:digits]}") for digits in (12, 40, 64)] == [version] * 3
    with pytest.raises(InputError, match=r"'models:/ldm/3@\w{11}' is not a model"):
        lookup(f"models:/ldm/3@{digest[:11]}")
    for name in (f"models:/ldm/3@{'0' * 12}", f"models:/ldm/4@{digest}"):
        with pytest.raises(InputError, match=rf"(?s)^{name}: version \d of this registry has the hash .*; name a version of"):
            lookup(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{filled}/mlflow.db")  # where version 3 is another model
    with pytest.raises(InputError, match="another registry was meant, or it was made anew"):
        lookup(version.pinned)


def test_look_ups_import_nothing_heavy(store: Path) -> None:
    code = (
        "import sys; from ldm.registry.versions import lookup; print(lookup('models:/ldm@champion').version, sorted(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("3 ")
    assert not any(f"'{name}'" in output for name in ("mlflow", "sqlalchemy", "pandas", "numpy", "torch"))


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", ".", "..", "..a"])
def test_names_that_mlflow_refuses_are_left_to_it(store: Path, name: str) -> None:
    assert read_sqlite(name) is None


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "postgresql://localhost/mlflow", "sqlite:///{store}?timeout=1", "sqlite:///", "mlruns", ""]
)
def test_other_stores_are_left_to_mlflow(store: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(store=store))
    assert read_sqlite("ldm") is None


@pytest.mark.parametrize("variable", registry.ELSEWHERE)
def test_a_registry_that_lies_elsewhere_is_left_to_mlflow(store: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    assert read_sqlite("ldm") is None


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE alembic_version SET version_num = '0000'",
        "DELETE FROM alembic_version",
        "INSERT INTO registered_models (name, workspace) VALUES ('ldm', 'other')",
        "INSERT INTO model_version_tags (key, value, name, version) VALUES ('mlflow.prompt.is_prompt', 'true', 'ldm', 1)",
        "DROP TABLE model_version_tags",
    ],
)
def test_what_this_module_was_not_written_for_is_left_to_mlflow(store: Path, change: str) -> None:
    with sqlite3.connect(store) as database:
        database.execute(change)
    assert read_sqlite("ldm") is None


def test_a_file_that_is_no_store_is_left_to_mlflow_and_stays_as_it_is(store: Path) -> None:
    for content in (b"", b"not a database" * 1000):
        store.write_bytes(content)
        assert read_sqlite("ldm") is None and store.read_bytes() == content
    store.unlink()
    assert read_sqlite("ldm") is None and not store.exists()


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_a_writer_at_work_is_waited_for_or_not_seen(store: Path, journal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.locations, "BUSY_SECONDS", 0.1)
    writer = sqlite3.connect(store, isolation_level=None)
    writer.execute(f"PRAGMA journal_mode = {journal}")
    before = read_sqlite("ldm")
    writer.execute("BEGIN EXCLUSIVE")
    writer.execute("UPDATE registered_model_aliases SET version = 1")
    during = read_sqlite("ldm")
    assert before is not None
    assert during == (None if journal == "delete" else before)  # None: MLflow waits longer
    writer.execute("COMMIT")
    after = read_sqlite("ldm")
    assert after is not None and set(aliases(after).values()) == {1}
    writer.close()


def test_reading_leaves_no_trace(store: Path) -> None:
    before = store.read_bytes()
    assert read_sqlite("ldm")
    assert store.read_bytes() == before and os.listdir(store.parent) == [store.name]
