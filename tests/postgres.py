"""A PostgreSQL cluster of its own, from the system's packages."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian's place, which is on nobody's PATH


class Postgres:
    """Listens on a port of 127.0.0.1, without a password; `kill` ends it with SIGKILL, `start` recovers what it had."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._data, self._log = folder / "data", folder / "log"
        self._as: dict[str, Any] = {}
        if os.getuid() == 0:  # which PostgreSQL refuses to be
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._run("initdb", "--username=ldm", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(f"listen_addresses='127.0.0.1'\nport={self.port}\nunix_socket_directories='{folder}'\nfsync=off\n")
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(PROGRAMS[-1] / program), "-D", str(self._data), *arguments]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, **self._as)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        self._run("pg_ctl", "start", "--wait", f"--log={self._log}")

    def kill(self) -> int:
        """Returns the process id that it had."""
        pid = int((self._data / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.05)
        return pid

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "--mode=immediate")

    def url(self, database: str, driver: str) -> str:
        """SQLAlchemy's address of a database, which is made if it is missing."""
        command = [str(PROGRAMS[-1] / "createdb"), "-h", "127.0.0.1", "-p", str(self.port), "-U", "ldm", database]
        subprocess.run(command, cwd="/", capture_output=True)
        return f"postgresql+{driver}://ldm@127.0.0.1:{self.port}/{database}"


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    assert PROGRAMS, "no PostgreSQL in /usr/lib/postgresql: `apt-get install postgresql`"
    folder = Path(tempfile.mkdtemp(prefix="ldm-postgres-", dir="/tmp"))  # its user may not enter pytest's folders
    cluster = Postgres(folder)
    try:
        yield cluster
    finally:
        with contextlib.suppress(AssertionError):  # it was killed
            cluster.stop()
        shutil.rmtree(folder)
