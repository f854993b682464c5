"""`ldm doctor`: all is well in a sound project, and each planted fault is the one line that is not."""

import contextlib
import http.server
import os
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dvc_project import project, template  # noqa: F401
from typer.testing import CliRunner
from users import USER, as_another_user, open_up

from ldm import doctor
from ldm.base.errors import InputError
from ldm.cli import app
from ldm.doctor import VARIABLES, before_run, examine

ENV = pytest.MonkeyPatch


def settings(root: Path, old: str, new: str) -> None:
    text = (root / "params.yaml").read_text()
    assert old in text
    (root / "params.yaml").write_text(text.replace(old, new))


def lose_a_champion(root: Path, env: ENV) -> None:
    from ldm.registry.versions import connect

    env.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    client = connect(create=True)
    client.create_registered_model("ldm")
    client.create_model_version("ldm", str(root / "mlruns/ldm/models/m-1/artifacts"))
    client.set_registered_model_alias("ldm", "champion", "1")


def fill_the_disk(free: float) -> Callable[[Path, ENV], None]:
    usage = shutil.disk_usage("/")
    return lambda root, env: env.setattr(shutil, "disk_usage", lambda place: usage._replace(free=int(free)))


def other_owner(root: Path, env: ENV) -> None:
    env.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own


PLANTED: dict[str, tuple[Callable[[Path, ENV], object], str, str, str]] = {  # what is done; level, subject, words of the line
    "library": (
        lambda root, env: (root / "pyproject.toml").write_text('[project]\ndependencies = ["numpy>=99", "no-such-package"]'),
        "fault", "Python", "no-such-package is missing",
    ),
    "pyproject.toml": (lambda root, env: (root / "pyproject.toml").write_text("<<<"), "fault", "Python", "cannot be checked"),
    "dvc.lock": (lambda root, env: (root / "dvc.lock").write_text("<<<<<<< HEAD\n"), "fault", "data", "--ours dvc.lock`"),
    "code": (lambda root, env: (root / "ldm").mkdir(), "fault", "code", "other code would run; `make install`"),
    "shards": (lambda root, env: env.setenv("LDM_SHARDS", "/nowhere"), "fault", "environment", "LDM_SHARDS is '/nowhere'"),
    "proxy": (lambda root, env: env.setenv("HTTP_PROXY", "ftp://a:1"), "fault", "proxy", "HTTP_PROXY is 'ftp://a:1'"),
    "socks": (lambda root, env: env.setenv("all_proxy", "socks5://a:1"), "fault", "proxy", "uv pip install 'httpx[socks]'"),
    "owner": (other_owner, "warning", "git", "git config --global --add safe.directory"),
    "commit": (lambda root, env: None, "warning", "git", "no commit yet"),
    "git": (lambda root, env: shutil.rmtree(root / ".git"), "fault", "DVC", "`git init` makes one"),
    "dvc": (lambda root, env: shutil.rmtree(root / ".dvc"), "fault", "DVC", "`dvc init` makes one"),
    "broken": (lambda root, env: (root / ".dvc/config").write_text("[core"), "fault", "DVC", "DVC says"),
    "settings": (lambda root, env: settings(root, "seed: 0", "seed: x"), "fault", "params.yaml", "seed: found 'x'"),
    "address": (lambda root, env: env.setenv("MLFLOW_TRACKING_URI", "foo://x"), "fault", "MLflow", "foo://x: cannot be used"),
    "champion": (lose_a_champion, "warning", "MLflow", "the files of models:/ldm/1, the champion, are gone"),
    "data": (lambda root, env: settings(root, "data/raw/source", "data/mine"), "fault", "data", "data/mine: no such folder"),
    "disk": (fill_the_disk(5e6), "fault", "disk", "nothing can be written"),
    "space": (fill_the_disk(1e8), "warning", "disk", "a run from the start needs about"),
    "device": (lambda root, env: env.setenv("LDM_DEVICE", "gpu"), "fault", "device", "LDM_DEVICE gpu: not usable here"),
}  # fmt: skip


@pytest.fixture
def sound(project: Path, monkeypatch: ENV) -> Path:  # noqa: F811
    """A project in which all is well, with an image."""
    for name in ("NO_PROXY", *VARIABLES, "PREFECT_API_URL", "PREFECT_API_KEY", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/mlflow.db")  # undone after the test
    (project / "data/raw/source/0.png").touch()
    return project


def commit(root: Path) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@t")
    subprocess.run(["git", *who, "commit", "--quiet", "--allow-empty", "-m", "start"], cwd=root, check=True)


def test_a_sound_project_is_sound_within_seconds(sound: Path, monkeypatch: ENV) -> None:
    commit(sound)
    monkeypatch.chdir(sound / "data")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0 and {line.split()[0] for line in result.output.splitlines()} == {"ok"}, result.output
    subjects = {"code", "environment", *(subject for _, _, subject, _ in PLANTED.values())}
    assert {line.split()[1] for line in result.output.splitlines()} == subjects | {"folders", "Prefect"}
    start = time.process_time()
    assert before_run(sound) == []
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("fault", PLANTED)
def test_each_fault_is_one_line(fault: str, sound: Path, monkeypatch: ENV) -> None:
    plant, level, subject, words = PLANTED[fault]
    if fault != "commit":
        commit(sound)
    plant(sound, monkeypatch)
    found = [finding for finding in examine(sound, device=fault == "device") if finding.level != "ok"]
    here = [finding for finding in found if finding.subject == subject]
    assert [finding.level for finding in here] == [level] and words in here[0].text and "\n" not in here[0].text
    if fault not in ("settings", "git", "dvc", "broken", "dvc.lock"):  # which other checks need
        assert found == here
    if fault == "device":
        monkeypatch.chdir(sound)
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == 1 and f"\nfault    device       {here[0].text}\n" in result.output
    elif level == "fault":
        with pytest.raises(InputError):
            before_run(sound)
    else:
        assert before_run(sound) == here


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_with_a_bad_value_ends_a_run_at_its_start(name: str, sound: Path, monkeypatch: ENV) -> None:
    for value in ("30m", "-1", "1e", "nan", "0.5.1"):
        monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=f"{name} is '{value}'; set it to "):
            before_run(sound)


@pytest.mark.skipif(os.getuid() != 0, reason="changes the user id")
@pytest.mark.parametrize("place", [".", "data", ".dvc/tmp", "mlflow.db"])
def test_what_cannot_be_written_is_named(place: str, sound: Path) -> None:
    open_up(sound)
    (sound / "mlflow.db").touch()
    for path in (sound, *sound.rglob("*")):
        os.chown(path, USER, USER)

    def work() -> list[str]:
        return [text for _, text in doctor.check_folders(sound)]

    assert "are writable" in as_another_user(work)[0]
    os.chown(sound / place, 0, 0)
    (sound / place).chmod(0o755)
    said = as_another_user(work)
    assert f"{(sound / place)}: not writable for user id {USER}, it belongs to root; `sudo chown -R {USER} {sound}`" in said


# Servers


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers each request with the status that the server has."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(kind: str | int) -> Iterator[str]:
    """The address of a server that answers with a status, is silent, or is not there."""
    if isinstance(kind, int):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        server.status = kind  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.server_close()
        return
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if kind == "silent":
            bound.listen()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize(
    ("kind", "level", "words"),
    [
        (401, "fault", "refuses the login (status 401)"),
        (403, "fault", "refuses the login (status 403)"),
        (502, "warning", "status 502"),
        ("silent", "warning", "does not answer (timed out)"),
        ("absent", "warning", "does not answer (Connection refused)"),
    ],
)
@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
def test_a_server_that_refuses_ends_a_run_and_one_that_is_away_does_not(
    name: str, kind: str | int, level: str, words: str, sound: Path, monkeypatch: ENV
) -> None:
    for variable, value in {"TIMEOUT": "1", "MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{variable}", value)
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 1)
    commit(sound)
    with serving(kind) as address:
        monkeypatch.setenv(name, f"{address}/api" if name == "PREFECT_API_URL" else address)
        (finding,) = (finding for finding in examine(sound, device=False) if finding.level != "ok")
    assert finding.level == level and name in finding.text and words in finding.text
    assert "\n" not in finding.text and finding.subject in ("MLflow", "Prefect")


def test_a_database_of_another_mlflow_is_a_fault(sound: Path) -> None:
    with contextlib.closing(sqlite3.connect(sound / "mlflow.db")) as store, store:
        store.execute("CREATE TABLE alembic_version (version_num)")
        store.execute("CREATE TABLE experiments (experiment_id)")
        store.execute("INSERT INTO alembic_version VALUES ('of another')")
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI sqlite.*: cannot be used"):
        before_run(sound)
