"""What entry points set before libraries are imported, seen from a process of its own."""

import getpass
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from tiny import REPOSITORY
from users import USER, as_another_user, open_up

from ldm import environment
from ldm.environment import LOOPBACK, PLACES

CODE = "import json, os; from ldm import environment; environment.set_up(); print(json.dumps(dict(os.environ)))"


def set_up(folder: Path, **variables: str | None) -> dict[str, str]:
    """The environment after `set_up` in a project, with variables set, or removed (None) before."""
    for name in ("dvc.yaml", "params.yaml"):
        (folder / name).touch()
    env = {**os.environ, **variables, "PYTHONPATH": str(REPOSITORY)}
    env = {name: value for name, value in env.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=folder, env=env, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("given", [{}, {"NO_PROXY": "a.org, .b.org"}, {"no_proxy": "a.org"}, {"NO_PROXY": "*"}])
def test_this_machines_servers_are_asked_directly(given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set_up(tmp_path, **{"NO_PROXY": None, "no_proxy": None, **given}, HTTP_PROXY="http://127.0.0.1:9")
    assert found["NO_PROXY"] == found["no_proxy"] and found["HTTP_PROXY"] == "http://127.0.0.1:9"
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", found["no_proxy"])
    for host in (*LOOPBACK[:2], *("a.org",) * bool(given)):
        assert urllib.request.proxy_bypass_environment(f"{host}:4200")  # type: ignore[attr-defined]
    assert bool(urllib.request.proxy_bypass_environment("huggingface.co")) == (given == {"NO_PROXY": "*"})  # type: ignore[attr-defined]


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null", None])
def test_without_a_home_the_project_has_one(home: str | None, tmp_path: Path) -> None:
    """From a folder below the project, too. Without HOME, the user's entry in the system counts."""
    (tmp_path / "below").mkdir()
    set_up(tmp_path)
    found = set_up(tmp_path, HOME=home)
    if home:
        assert found["HOME"] == str(tmp_path / ".ldm/home/user") and os.access(found["HOME"], os.W_OK)
        assert "PREFECT_HOME" not in found
    else:
        assert "HOME" not in found


@pytest.mark.skipif(os.getuid() != 0, reason="changes the user id")
def test_a_user_without_name_and_home_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    os.chown(tmp_path, USER, USER)
    open_up(tmp_path)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", *PLACES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.chdir(tmp_path)

    def work() -> list[str]:
        environment.set_up()
        return [getpass.getuser(), *(os.environ[name] for name in ("HOME", "PREFECT_HOME", "MPLCONFIGDIR"))]

    ours = tmp_path / ".ldm/home"
    assert as_another_user(work) == [f"user{USER}", "/", str(ours / "prefect_home"), str(ours / "mplconfigdir")]


def test_what_is_set_stays_and_what_is_set_to_nothing_is_not_set(tmp_path: Path) -> None:
    found = set_up(tmp_path, HOME="/proc/none", PREFECT_HOME="/x", DO_NOT_TRACK="0", MLFLOW_TRACKING_URI="", PREFECT_API_URL="")
    assert (found["PREFECT_HOME"], found["DO_NOT_TRACK"]) == ("/x", "0")
    assert not {"MLFLOW_TRACKING_URI", "PREFECT_API_URL"} & found.keys()
