"""A schedule as `make schedule` starts it, for tests: asked for runs, watched, and looked through for what is left."""

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from tiny import REPOSITORY, environment

from ldm.versioning.git import git


class Schedule:
    """A project with a schedule that is on. Stages of tests/dvc_project.py wait while `hold` has a file of their name."""

    def __init__(self, root: Path, hold: Path, **variables: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.root, self.hold = root, hold
        self.env = environment(
            LDM_PREFECT_PORT=str(self.port), PREFECT_WORKER_QUERY_SECONDS="1", HOLD=str(hold), PREFECT_HOME=str(hold / "prefect"),
            PYTHONPATH=str(REPOSITORY), **variables,
        )  # fmt: skip

    def command(self, *arguments: str, **variables: str) -> str:
        env = self.env | variables
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=self.root, env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{self.port}/api"}), get_client(sync_client=True) as client:
            yield client

    def run(self, deployment: str, **parameters: Any) -> Any:
        """Ask for a run; returns its id."""
        with self.client() as client:
            found = client.read_deployment_by_name(f"ldm/{deployment}")
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def state(self, run: Any, *names: str, seconds: float = 100) -> Any:
        """The state of a run once it has one of these names."""
        return self.wait(lambda: self._state(run, names), seconds)

    def _state(self, run: Any, names: tuple[str, ...]) -> Any:
        with contextlib.suppress(httpx.HTTPError), self.client() as client:  # the server was killed, and is started again
            state = client.read_flow_run(run).state
            return state if state.name in names else None
        return None

    def wait(self, what: Callable[[], Any], seconds: float = 100) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, (self.root / ".ldm/schedule.log").read_text()[-3000:]
            time.sleep(0.2)
        return found

    def commit(self, name: str, text: str) -> None:
        """Change what stages read: all of them knob.txt, `evaluate` also late.txt."""
        (self.root / name).write_text(text)
        git(self.root, "commit", "-qam", text)

    def forget(self) -> None:
        """As if nothing had ever run here: every stage runs again."""
        for branch in self.branches():
            git(self.root, "branch", "-D", branch)
        shutil.rmtree(self.root / ".ldm/worktrees", ignore_errors=True)
        git(self.root, "worktree", "prune")
        for place in (".ldm/work", ".ldm/store", ".dvc/cache"):
            shutil.rmtree(self.root / place, ignore_errors=True)

    def held(self, stage: str) -> Path:
        """The file that holds up a stage, which says so in it."""
        (self.hold / stage).touch()
        return self.hold / stage

    def reach(self, run: Any, stage: str) -> None:
        """Wait until a run is at a stage that is held up."""
        state = self.wait(lambda: (self.hold / stage).read_text() == "here" or self._state(run, ("Failed", "Crashed", "Skipped")))
        assert state is True, f"{state.name}: {state.message}"

    def processes(self) -> dict[int, str]:
        """All that works for this project: by its environment."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOLD") == str(self.hold) and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = " ".join(process.cmdline())
        return found

    def at_work(self, *words: str) -> list[int]:
        """The Python processes whose command lines hold all of these words: without shells that only wait for one."""
        found = {pid: line.split(" ") for pid, line in self.processes().items()}
        lines = {pid: " ".join(rest) for pid, (program, *rest) in found.items() if Path(program).name.startswith("python")}
        return sorted(pid for pid, line in lines.items() if all(word in line for word in words))

    def branches(self) -> list[str]:
        return git(self.root, "for-each-ref", "--format=%(refname:short)", "refs/heads/runs/").splitlines()
