"""Fixtures that more than one folder of tests uses."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import TINY, clone, environment, set_params

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny here: more threads only wait for each other

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def shell() -> Shell:
    """`shell(root, "dvc", "repro", NAME="value")` runs a command there and returns its result."""

    def run(root: Path, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=root, env=environment(**extra), capture_output=True, text=True, timeout=280)

    return run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A fresh clone with tiny settings; nothing in it has run."""
    root = clone(tmp_path / "project")
    set_params(root, TINY)
    return root
