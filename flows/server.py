"""Prefect's temporary server, for a run where nobody has named one: a process that ends with the one that started it.

Prefect can start such a server itself, but it imports the whole server for that, which takes seconds, and leaves it behind
when it is killed.
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
    """A server that listens at `url` as soon as it has started."""

    url: str
    process: "subprocess.Popen[bytes]"  # its stdin is a pipe that only this process holds open

    def wait(self) -> None:
        """Until it answers; `InputError` where it does not start."""
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{self.url}/health"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise InputError(
                    "Prefect's temporary server does not start; `prefect server start` says why, or set PREFECT_API_URL"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


def start() -> TemporaryServer:
    """Start a server on a free port of this machine. It stops when this process ends, whatever ends it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.server", str(listening.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=(listening.fileno(),),
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,  # Ctrl-C, which reaches all of a terminal's group, is for us to handle
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
    """Serve on the listening socket whose number is the argument, until stdin closes."""
    listening = socket.socket(fileno=int(sys.argv[1]))
    import uvicorn

    app = "prefect.server.api.server:create_app"
    server = uvicorn.Server(uvicorn.Config(app, factory=True, log_level="error", lifespan="on"))

    def watch() -> None:
        while os.read(0, 1):
            pass
        server.should_exit = True
        time.sleep(5)
        os._exit(0)  # it waits for connections that nobody will close

    threading.Thread(target=watch, daemon=True).start()
    server.run(sockets=[listening])


if __name__ == "__main__":
    main()
