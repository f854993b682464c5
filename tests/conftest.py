"""Fixtures that more than one folder of tests uses."""

import contextlib
import io
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import TINY, clone, environment, set_params

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny here: more threads only wait for each other

Shell = Callable[..., subprocess.CompletedProcess[str]]


LONG = ("test_end_to_end.py", "test_extensions.py", "test_resume.py", "test_sample_posterior.py", "test_unet.py", "test_fit.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: processes that take one file after the other then end together.

    Prefect's stay behind tests/data: children that are forked by a process which has used Prefect end with exit code 1.
    """
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def shell() -> Shell:
    """`shell(root, "dvc", "repro", NAME="value")` runs a command there and returns its result."""

    def run(root: Path, *command: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=root, env=environment(**extra), capture_output=True, text=True, timeout=280)

    return run


@pytest.fixture
def ldm(monkeypatch: pytest.MonkeyPatch) -> Shell:
    """`ldm(root, "registry", "list")` as `shell(root, "ldm", "registry", "list")`, but in this process, which saves seconds."""

    def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        from ldm.cli import main

        out, err, code = io.StringIO(), io.StringIO(), 0
        with monkeypatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            for name in os.environ.keys() - environment().keys():
                patch.delenv(name)
            for name, value in environment().items():
                patch.setenv(name, value)
            patch.setattr("sys.argv", ["ldm", *arguments])
            patch.chdir(root)
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        return subprocess.CompletedProcess(["ldm", *arguments], code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A fresh clone with tiny settings; nothing in it has run."""
    root = clone(tmp_path / "project")
    set_params(root, TINY)
    return root


@pytest.fixture(scope="session")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of blobs whose stages have run, with posterior samples by SGHMC; not to be changed."""
    from blobs import make_project, run_stages

    posterior = {"burn_in": 4, "thin": 2, "draws": 4, "batch_size": 8}
    root = make_project(tmp_path_factory.mktemp("sampled"), {"sample_posterior": ["sghmc"], "posterior": posterior})
    run_stages(root, "train_vae", "cache_latents", "train_unet", "evaluate", "sample_posterior sghmc")
    return root
