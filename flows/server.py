"""A Prefect server in a child process that ends with its owner: Prefect's own takes seconds of imports and outlives a kill."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass

from ldm.base.errors import InputError
from ldm.base.project import find_root

START_SECONDS = 120
PORT = 4200  # of the pages, unless `LDM_PREFECT_PORT` names another
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"  # if it is not set: the project's own
LEASES = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"  # if it is not set: see `flows.leases`
ORIGINS = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"  # whose pages may ask it for runs: by default any page in the user's browser
VACUUM = "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED"  # removes events after 7 days, runs with their logs after 90
TEMPORARY = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"}  # no pages, no scheduler: as Prefect's own


@dataclass(frozen=True)
class Server:
    """A server that will listen at `url`."""

    url: str
    process: "subprocess.Popen[bytes]"  # its stdin is a pipe of which only this process holds the other end

    def wait(self) -> None:
        """Wait until it answers; `InputError` if it does not start."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine's own server is behind no proxy
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                return direct.open(f"{self.url}/health", timeout=2).close()
            time.sleep(0.05)
        raise InputError("Prefect's server does not start; `prefect server start` says why, or set PREFECT_API_URL")


def environment(url: str) -> dict[str, str]:
    """Of a server with pages: its own address; and unless they are set, what it keeps in the project, and for how long."""
    (database := find_root() / ".ldm/prefect.db").parent.mkdir(exist_ok=True)
    pages = url.removesuffix("/api")
    defaults = {DATABASE: f"sqlite+aiosqlite:///{database}", LEASES: "flows.leases", VACUUM: "events,flow_runs"}
    defaults |= {ORIGINS: pages, "PREFECT_UI_URL": pages}  # the latter: in notifications
    return {"PREFECT_UI_API_URL": url} | {name: os.environ.get(name) or value for name, value in defaults.items()}


def start(port: int | None = None) -> Server:
    """Start a server on a port of this machine; with no port given, one for a single run, on a free port."""
    try:
        listening = socket.create_server(("127.0.0.1", port or 0))
    except OSError as error:
        raise InputError(f"port {port}: {error.strerror}; set LDM_PREFECT_PORT to another, or PREFECT_API_URL") from None
    with listening:
        url, file = f"http://127.0.0.1:{listening.getsockname()[1]}/api", listening.fileno()
        kind = environment(url) | (TEMPORARY if port is None else {})
        env, command = {**os.environ, **kind, "PREFECT__SERVER_FINAL": "1"}, [sys.executable, "-m", "flows.server", str(file)]
        # in a session of its own: Ctrl-C reaches the terminal's whole group, and this process handles it
        return Server(url, subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[file], env=env, start_new_session=True))


def main() -> None:
    """Serve on the listening socket whose file descriptor is the argument, until stdin closes; without one, for `make ui`."""
    if len(sys.argv) > 1:
        listening = socket.socket(fileno=int(sys.argv[1]))
    else:
        listening = socket.create_server(("127.0.0.1", PORT))
        os.environ.update(environment(f"http://127.0.0.1:{PORT}/api"))
    import uvicorn

    app = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    server = uvicorn.Server(app)

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written
        server.should_exit = True
        time.sleep(5)
        os._exit(0)  # it would wait for open connections

    if len(sys.argv) > 1:
        threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
