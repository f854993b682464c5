"""The schedule on this machine: a Prefect server, a worker, and who keeps both alive; `make schedule`, `make unschedule`."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from flows import server
from flows.workspace import FILE
from ldm import doctor
from ldm.base.errors import InputError, env_count, reason
from ldm.base.files import locked, write_text
from ldm.base.project import find_root
from ldm.config import load_settings
from ldm.versioning.git import git

STATE, LOCK, LOG = ".ldm/schedule.json", ".ldm/schedule.lock", ".ldm/schedule.log"
LOOK_SECONDS = 1.0  # between looks at the children, and at runs that died
START_SECONDS = 180.0
STOP_SECONDS = 90.0  # a training has 30 s to reach a checkpoint
DELAYS = (1, 5, 15, 60)  # seconds before a child that ended is started again, the last for all later times
LOG_BYTES = 10 * 2**20


def running(root: Path) -> dict[str, str]:
    """The server's address and the keeper's process id of a schedule that is on; empty if it is off."""
    if not (root / STATE).is_file():
        return {}
    try:
        with locked(root / LOCK, wait=False):
            return {}
    except BlockingIOError:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((root / STATE).read_text(encoding="utf-8")))
    return {}


def start(root: Path) -> None:
    """Start the keeper if it does not run, and apply infra/prefect.yaml."""
    load_settings(root)
    branch = git(root, "branch", "--show-current")
    if not branch:
        raise InputError(f"{root}: no branch is checked out, from which scheduled runs take code and settings; `git switch main`")
    for warning in doctor.before_run(root, data=False):
        if warning.subject == "Prefect":  # without it there is no schedule
            raise InputError(f"{warning.text}; or unset PREFECT_API_URL, and a server is started here")
        print(f"warning: {warning.text}", file=sys.stderr, flush=True)
    if changed := git(root, "diff", "--name-only", "--relative", "HEAD", "--", f":!{FILE}"):
        names = ", ".join(changed.splitlines()[:3])
        print(f"warning: {names}: changed since the last commit, from which scheduled runs take everything", file=sys.stderr)
    if not running(root):
        (root / LOG).parent.mkdir(exist_ok=True)
        (root / STATE).unlink(missing_ok=True)
        with (root / LOG).open("ab") as log:
            command = [sys.executable, "-m", "flows.schedule", "keep"]
            keeper = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while not running(root):
            if keeper.poll() is not None or time.monotonic() > deadline:
                tail = (root / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                raise InputError(f"the schedule did not start ({' '.join(tail).removeprefix('error: ')}); {root / LOG} says more")
            time.sleep(0.2)
    os.environ["PREFECT_API_URL"] = running(root)["url"]
    from prefect.client.orchestration import get_client  # reads it

    from flows.deployments import apply

    with get_client(sync_client=True) as client:
        apply(root, branch, client)
    url = running(root)["url"].removesuffix("/api")
    print(f"scheduled: {url}/deployments shows what runs when, {url}/runs what ran; `make unschedule` ends it")
    print(f"for Prefect's own commands: export PREFECT_API_URL={url}/api")


def stop(root: Path) -> None:
    """End the keeper, and with it worker, runs and server: a training stops at a checkpoint."""
    found = running(root)
    if not found:
        print("nothing is scheduled here")
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(found["pid"]), signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS + 30
    while running(root) or psutil.pid_exists(int(found["pid"])):
        if time.monotonic() > deadline:
            raise InputError(f"process {found['pid']} does not end; {root / LOG} may say why; `kill -9 {found['pid']}`")
        time.sleep(0.2)
    print("unscheduled; a run that was under way goes on from its last checkpoint when it is scheduled again")


class Child:
    """A child process that is started again when it has ended, later after each time that it ended soon."""

    def __init__(self, name: str, command: Callable[[], "subprocess.Popen[bytes]"]) -> None:
        self.name, self._command, self._due, self._ends = name, command, 0.0, 0
        self.process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def keep_alive(self) -> None:
        now = time.monotonic()
        if self.process and self.process.poll() is not None:
            self._ends = 1 if now - self._started > DELAYS[-1] else self._ends + 1
            self._due = now + DELAYS[min(self._ends, len(DELAYS)) - 1]
            print(f"{self.name}: ended with exit code {self.process.returncode}, starts again", flush=True)
            self.process = None
        if self.process is None and now >= self._due:
            self._started = now
            try:
                self.process = self._command()
            except InputError as error:  # its port is not free yet
                print(f"{self.name}: {error}", flush=True)
                self._due = now + DELAYS[1]

    def end(self) -> None:
        """By closing its stdin, after which it ends by itself; or else by force."""
        if self.process and self.process.stdin:
            self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
                return
            self.process.kill()


def keep(root: Path) -> None:
    """Keep server and worker alive until SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    children, port = list[Child](), env_count("LDM_PREFECT_PORT", 1, server.PORT)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(root / LOCK, wait=False))
        except BlockingIOError:
            raise InputError("another schedule starts or ends here at this moment; try again") from None
        stack.callback((root / STATE).unlink, missing_ok=True)
        if not os.environ.get("PREFECT_API_URL"):
            first = server.start(port)
            first.wait()
            os.environ["PREFECT_API_URL"] = first.url
            children.append(Child("server", lambda: server.start(port).process))
            children[0].process = first.process
        children.append(Child("worker", lambda: _worker(root)))
        for child in children:
            stack.callback(child.end)  # the worker first, which tells the server how its runs ended
        from prefect.client.orchestration import get_client  # reads PREFECT_API_URL

        from flows.deployments import Settler

        settler, said = Settler(root), ""
        write_text(root / STATE, json.dumps({"url": os.environ["PREFECT_API_URL"], "pid": str(os.getpid())}))
        while not stopped.wait(LOOK_SECONDS):
            with contextlib.suppress(OSError):  # a disk is full, or somebody has deleted the log
                for child in children:
                    child.keep_alive()
                _shorten(root / LOG)
                try:
                    with get_client(sync_client=True) as client:
                        settler.settle(client)
                except Exception as error:  # the server is away, or not yet back
                    if said != (said := reason(error)):
                        print(f"server: {said}", flush=True)


def _worker(root: Path) -> "subprocess.Popen[bytes]":
    from flows.deployments import pool  # imports Prefect

    command = [sys.executable, "-m", "flows.owned", "prefect", "worker", "start", "--pool", pool(root), "--type", "process"]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, start_new_session=True)


def _shorten(log: Path) -> None:
    """Keep the last part of a long log in a second file."""
    if log.stat().st_size > LOG_BYTES:
        os.replace(shutil.copyfile(log, log.with_suffix(".partial")), log.with_suffix(".1.log"))
        os.truncate(log, 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.schedule", description=__doc__)
    parser.add_argument("what", choices=["start", "stop", "keep"])
    options = parser.parse_args()
    try:
        root = find_root()
        {"start": start, "stop": stop, "keep": keep}[options.what](root)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
