"""Two processes that train together, as `LDM_PROCESSES` or torchrun would start them."""

import os
import subprocess
import sys
from pathlib import Path

from tiny import REPOSITORY


def run_two_ranks(folder: Path, code: str, modules: Path) -> None:
    """Run `code` as rank 0 and as rank 1, which meet in `folder`, with what lies in `modules` to import; both have to succeed."""
    common = {
        "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", modules))),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "LDM_RENDEZVOUS": f"file://{folder}/rendezvous",
    }
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
