"""The server does not outlive who started it, and keeps no runs for ever. (That it serves a run, test_pipeline.py shows.)"""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from flows import server
from ldm.base.errors import InputError

ROOT = Path(__file__).parents[2]
TABLES = ("flow_run", "flow_run_state", "task_run", "task_run_state", "log", "artifact")


@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_it_ends_with_an_owner_killed_with_9(seconds: float, tmp_path: Path, gone: Callable[[int], bool]) -> None:
    """At once, while it still imports; and later."""
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    code = "from flows import server; print(server.start().process.pid, flush=True); import time; time.sleep(60)"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path)}
    owner = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    time.sleep(seconds)
    owner.send_signal(signal.SIGKILL)
    assert owner.wait() == -signal.SIGKILL
    owner.stdout.close()
    assert gone(pid)


def test_one_that_does_not_start_is_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "TEMPORARY", {"PREFECT_LOGGING_LEVEL": "no level"})
    found = server.start()
    with pytest.raises(InputError, match="Prefect's server does not start"):
        found.wait()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=r"port \d+: .*; set LDM_PREFECT_PORT"):
        server.start(taken.getsockname()[1])


def test_old_runs_are_removed_with_all_that_belongs_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS", "1")
    monkeypatch.delenv(server.DATABASE, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = server.start(port)
    try:
        started.wait()
        with httpx.Client(base_url=f"{started.url}/", timeout=30) as api:

            def create(kind: str, **values: object) -> str:
                return str(post(kind, values).json()["id"])

            def post(kind: str, values: object) -> httpx.Response:
                deadline = time.monotonic() + 60
                while (answer := api.post(f"{kind}/", json=values)).status_code == 503:  # SQLite is busy
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                assert answer.is_success, answer.text
                return answer

            flow, done = create("flows", name="nightly"), {"type": "COMPLETED"}
            old, young = (create("flow_runs", flow_id=flow, name=name, state=done) for name in ("old", "young"))
            for run in (old, young):
                create("task_runs", flow_run_id=run, task_key="stage", dynamic_key="0", state=done)
                create("artifacts", flow_run_id=run, key="summary", type="markdown", data="fine")
                entry = {"name": "ldm", "level": 20, "message": run, "timestamp": "2026-01-01T00:00:00Z", "flow_run_id": run}
                post("logs", [entry])
        with contextlib.closing(sqlite3.connect(tmp_path / ".ldm/prefect.db", timeout=30)) as database:
            rows = lambda: {table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}  # noqa: E731
            assert rows() == dict.fromkeys(TABLES, 2)
            long_ago = f"{datetime.now(UTC) - timedelta(days=91):%Y-%m-%d %H:%M:%S.%f}"
            database.execute("UPDATE flow_run SET end_time = ? WHERE name = 'old'", [long_ago])
            database.commit()
            deadline = time.monotonic() + 60
            while rows() != dict.fromkeys(TABLES, 1):
                assert time.monotonic() < deadline, rows()
                time.sleep(0.2)
            assert database.execute("SELECT name FROM flow_run").fetchall() == [("young",)]
            assert uuid.UUID(database.execute("SELECT message FROM log").fetchone()[0]) == uuid.UUID(young)
    finally:
        assert started.process.stdin
        started.process.stdin.close()
        started.process.wait(30)
