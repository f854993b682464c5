"""`mlflow server` as a process of a test's own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class MlflowServer:
    """On a port of 127.0.0.1. `freeze` leaves requests unanswered, which are carried out later; `kill` ends it with SIGKILL."""

    def __init__(self, folder: Path, store: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self.url, self._log = f"http://127.0.0.1:{port}", folder / "mlflow.log"
        places = ["--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]
        where = ["--host", "127.0.0.1", "--port", port, "--workers", "1"]
        self._command = [sys.executable, "-m", "mlflow", "server", *places, *where]
        self.start()

    def start(self) -> None:
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # of GenAI's: more processes
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True, env=env)
        deadline = time.monotonic() + 120
        first = f"{self.url}/api/2.0/mlflow/experiments/search?max_results=1"  # it opens the store
        while True:
            try:
                return urllib.request.urlopen(first, timeout=60).close()
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.1)

    def freeze(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
