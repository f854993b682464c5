"""A temporary Prefect server for a run without one: a child process that ends with the run.

Prefect can start such a server itself, but imports the whole server into this process for it, which takes seconds, and leaves
it behind if this process is killed.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass

from ldm.base.errors import InputError

START_SECONDS = 120
ENVIRONMENT = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}  # as Prefect's own


@dataclass(frozen=True)
class TemporaryServer:
    """A server that will listen at `url`."""

    url: str
    process: "subprocess.Popen[bytes]"  # its stdin is a pipe of which only this process holds the other end

    def wait(self) -> None:
        """Wait until it answers; `InputError` if it does not start."""
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{self.url}/health"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                hint = "`prefect server start` says why, or set PREFECT_API_URL"
                raise InputError(f"Prefect's temporary server does not start; {hint}")
            time.sleep(0.05)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


def start() -> TemporaryServer:
    """Start a server on a free port of this machine. It stops when this process ends, also by `kill -9`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(listening.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=(listening.fileno(),),
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,  # Ctrl-C reaches the terminal's whole group; this process handles it
        )
        return TemporaryServer(f"http://127.0.0.1:{listening.getsockname()[1]}/api", process)


def answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine's own server is behind no proxy
    try:
        with direct.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> None:
    """Serve on the listening socket whose file descriptor is the argument, until stdin closes."""
    listening = socket.socket(fileno=int(sys.argv[1]))
    import uvicorn

    app = "prefect.server.api.server:create_app"
    server = uvicorn.Server(uvicorn.Config(app, factory=True, log_level="error", lifespan="on"))

    def watch() -> None:
        while os.read(0, 1):
            pass
        server.should_exit = True
        time.sleep(5)
        os._exit(0)  # it would wait for open connections

    threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
