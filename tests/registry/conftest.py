"""An MLflow store for each test."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from ldm.registry.tracking import mlflow_client


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database; its migrations take seconds."""
    path = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        mlflow_client().search_experiments()
    return path


@pytest.fixture
def client(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a fresh store that `MLFLOW_TRACKING_URI` names."""
    shutil.copy(database, tmp_path)
    monkeypatch.delenv("LDM_PARENT_RUN", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return mlflow_client()
