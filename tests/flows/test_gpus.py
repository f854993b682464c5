"""Which GPUs a stage gets, and that runs take turns at them: those of a machine, and machines of a team."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.settings import PREFECT_API_URL, temporary_settings
from tiny import REPOSITORY, environment

from flows import gpus, server
from ldm.base.errors import InputError


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with two GPUs, and locks of its own."""
    for number in range(2):
        (tmp_path / f"nvidia/{number}").mkdir(parents=True)
    monkeypatch.setattr(gpus, "NVIDIA", tmp_path / "nvidia")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpus, "TURN_SECONDS", 0.05)
    for name in ("LDM_GPUS", "LDM_DEVICE", "LDM_PROCESSES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("meta", "environment", "expected"),
    [
        ({}, {}, {}),
        ({"gpus": 1}, {}, {"CUDA_VISIBLE_DEVICES": "0"}),
        ({"gpus": 2}, {}, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ({"gpus": 5}, {}, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ({"gpus": "ranks"}, {}, {"CUDA_VISIBLE_DEVICES": "0"}),
        ({"gpus": "ranks"}, {"LDM_PROCESSES": "2"}, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ({"gpus": 1}, {"LDM_DEVICE": "cpu"}, {}),
        ({"gpus": 1}, {"LDM_DEVICE": "cuda:1"}, {}),
        ({"gpus": 1}, {"CUDA_VISIBLE_DEVICES": "1"}, {"CUDA_VISIBLE_DEVICES": "1"}),
        ({"gpus": 1}, {"CUDA_VISIBLE_DEVICES": ""}, {}),
        ({"gpus": 1}, {"LDM_GPUS": "0"}, {"CUDA_VISIBLE_DEVICES": ""}),
        ({"gpus": 4}, {"LDM_GPUS": "1"}, {"CUDA_VISIBLE_DEVICES": "0"}),
    ],
)  # fmt: skip
def test_what_a_stage_sees(
    meta: dict[str, Any], environment: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with gpus.take(meta, threading.Event(), print) as found:
        assert found == expected


def test_runs_take_turns() -> None:
    lines, got, stop = list[str](), threading.Event(), threading.Event()

    def third() -> None:
        with gpus.take({"gpus": 1}, stop, lines.append) as found:
            assert found == {"CUDA_VISIBLE_DEVICES": "1"}
            got.set()

    with gpus.take({"gpus": 1}, stop, print):
        with gpus.take({"gpus": 1}, stop, print) as second:
            assert second == {"CUDA_VISIBLE_DEVICES": "1"}
            waiting = threading.Thread(target=third)
            waiting.start()
            assert not got.wait(0.3) and len(lines) == 1 and "another run has" in lines[0]
        assert got.wait(5)
    waiting.join()


def test_who_waits_can_be_stopped() -> None:
    stop = threading.Event()
    with gpus.take({"gpus": 2}, stop, print):
        stop.set()
        with pytest.raises(InputError, match="stopped"), gpus.take({"gpus": 1}, stop, print):
            pass


HOLDER = """
import sys, threading
from flows import gpus
with gpus.take({"gpus": 1}, threading.Event(), print):
    print("has it")
    sys.stdin.read()
"""
HAS_IT = "has it\n"


class Team:
    """A Prefect server with a limit of one GPU."""

    def __init__(self, folder: Path) -> None:
        for name in ("dvc.yaml", "params.yaml"):
            (folder / name).touch()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._folder, self.url = folder, f"http://127.0.0.1:{self._port}/api"
        self.start()

    def start(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self._folder)
            patch.setenv("PREFECT_HOME", str(self._folder / "prefect"))
            self._server = server.start(self._port)
        self._server.wait()

    def kill(self) -> None:
        self._server.process.kill()
        self._server.process.wait()

    @contextlib.contextmanager
    def machine(self, name: str) -> Iterator["subprocess.Popen[str]"]:
        """A process with a GPU of its own, which it holds until its stdin closes; it says when it has it."""
        (self._folder / name).mkdir(exist_ok=True)
        env = environment(PREFECT_API_URL=self.url, LDM_GPUS="1", TMPDIR=str(self._folder / name), PYTHONPATH=str(REPOSITORY))
        command = [sys.executable, "-uc", HOLDER]
        with subprocess.Popen(command, env=env, text=True, stdin=PIPE, stdout=PIPE, stderr=subprocess.STDOUT) as process:
            try:
                yield process
            finally:
                process.kill()


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    made = Team(tmp_path_factory.mktemp("team"))
    with temporary_settings({PREFECT_API_URL: made.url}):
        with get_client(sync_client=True) as client:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=gpus.LIMIT, limit=1))
        yield made
    made.kill()


def slots_taken() -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(gpus.LIMIT).active_slots


def says(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def release(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 0, process.stdout and process.stdout.read()


def test_machines_take_turns_at_a_teams_limit(team: Team) -> None:
    with team.machine("a") as first:
        assert says(first) == HAS_IT and slots_taken() == 1
        with team.machine("b") as second:
            assert says(second).startswith("waits for the GPUs")
            release(first)
            assert says(second) == HAS_IT and slots_taken() == 1
            release(second)
    assert slots_taken() == 0


def test_a_stage_that_needs_more_than_the_limit_takes_all_of_it_and_a_limit_of_none_is_a_pause(team: Team) -> None:
    lines, stop = list[str](), threading.Event()
    with gpus.take({"gpus": 2}, stop, lines.append) as found:
        assert found == {"CUDA_VISIBLE_DEVICES": "0,1"} and slots_taken() == 1
    with get_client(sync_client=True) as client:
        client.update_global_concurrency_limit(gpus.LIMIT, GlobalConcurrencyLimitUpdate(limit=0))
        threading.Timer(0.5, stop.set).start()
        with pytest.raises(InputError, match="stopped"), gpus.take({"gpus": 1}, stop, lines.append):
            pass
        client.update_global_concurrency_limit(gpus.LIMIT, GlobalConcurrencyLimitUpdate(limit=1))
    assert len(lines) == 1 and "prefect gcl inspect ldm-gpu" in lines[0]


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_server_that_goes_away_stops_nobody_and_comes_back_with_what_it_knew(team: Team) -> None:
    with team.machine("a") as first:
        assert says(first) == HAS_IT
        with team.machine("b") as second:
            assert says(second).startswith("waits for the GPUs")
            team.kill()
            time.sleep(2 * gpus.TURN_SECONDS)
            team.start()
            assert slots_taken() == 1
            release(first)
            assert says(second) == HAS_IT and slots_taken() == 1
            team.kill()
            release(second)
    with team.machine("c") as third:  # nobody can be asked
        assert says(third).startswith("goes on without")
        assert says(third) == HAS_IT
        release(third)
    team.start()


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("restarted", [False, True])
def test_the_slot_of_a_dead_holder_is_free_after_its_lease(restarted: bool, team: Team) -> None:
    """Also if the server has died with it: leases are on disk."""
    deadline = time.monotonic() + gpus.LEASE_SECONDS + 40
    while slots_taken():
        assert time.monotonic() < deadline
        time.sleep(1)
    with team.machine("a") as first:
        assert says(first) == HAS_IT
        time.sleep(gpus.RENEW_SECONDS + gpus.LEASE_SECONDS)
        assert slots_taken() == 1  # it lives, and renews
        first.send_signal(signal.SIGKILL)
        died = time.monotonic()
        if restarted:
            team.kill()
            team.start()
    with team.machine("b") as second:
        assert says(second).startswith("waits for the GPUs")
        assert says(second) == HAS_IT
        assert time.monotonic() - died < gpus.LEASE_SECONDS + 40
        release(second)
