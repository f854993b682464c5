"""A project that versions its own images, and an inbox."""

import shutil
from pathlib import Path

import pytest
from inboxes import MINE
from tiny import TINY, clone, set_params

from ldm.collection import ingest as module


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = clone(tmp_path_factory.mktemp("template") / "project")
    set_params(root, TINY | {"data": {"path": MINE}})
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "project", symlinks=True))


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


@pytest.fixture
def unversioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is moved: without `dvc add`, which takes a second."""
    monkeypatch.setattr(module, "version", lambda root, collection: f"{MINE}.dvc")
