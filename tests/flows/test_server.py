"""The server does not outlive who started it. (That it serves a run, test_pipeline.py shows.)"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import server
from ldm.base.errors import InputError

ROOT = Path(__file__).parents[2]


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
