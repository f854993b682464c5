"""Fixtures for tests of the flow: a small DVC project, Prefect's server, processes that must end."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dvc_project import project, template  # noqa: F401

import flows  # noqa: F401  # sets what Prefect reads on import

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts pytest in the background with SIGINT ignored


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def gone() -> Callable[[int], bool]:
    """Whether a process ends within some seconds."""
    import time

    def check(pid: int, seconds: float = 15) -> bool:
        deadline = time.monotonic() + seconds
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        return not alive(pid)

    return check


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One temporary Prefect server for all tests of flows."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
