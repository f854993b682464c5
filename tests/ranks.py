"""Two ranks that train together, in the environment that `LDM_PROCESSES` and torchrun give them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tiny import REPOSITORY


def run_two_ranks(folder: Path, code: str, modules: Path) -> None:
    """Run `code` in `folder` as rank 0 and as rank 1, which can import what lies in `modules`; both have to succeed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {
        "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", modules))),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-c", code]
    environments = [{**os.environ, **common, "RANK": str(rank)} for rank in range(2)]
    processes = [subprocess.Popen(command, cwd=folder, env=environment) for environment in environments]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
