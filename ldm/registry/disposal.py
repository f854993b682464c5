"""Versions, models and runs of MLflow that are not kept: how they are found and deleted.

First all are marked as deleted, then their files are deleted, then their rows: what a kill leaves is marked, and found again.
A store behind a server is only marked; `mlflow gc`, run by its owner, deletes the rest.
"""

import contextlib
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from ldm.base import clock
from ldm.base.errors import reason
from ldm.base.sizes import bytes_of
from ldm.registry import locations
from ldm.registry.tracking import experiment_id
from ldm.registry.versions import Version, connect

ENDED = ("FINISHED", "FAILED", "KILLED")
MODEL_ID = re.compile(r"m-[0-9a-f]{32}")
DELETED = "deleted"  # MLflow's name of the stage of life of what is marked


@dataclass(frozen=True)
class Disposal:
    """Something of MLflow that goes."""

    kind: str
    name: str
    size: int
    why: str
    mark: Callable[[], object]
    erase: Callable[[], object]


def has_store() -> bool:
    """Whether there is a store; only one in a file of this machine can be missing, any other has to answer."""
    database = locations.database_file(os.environ["MLFLOW_TRACKING_URI"])
    return not database or database.exists()


class Store:
    """The store that `MLFLOW_TRACKING_URI` names, which has to answer."""

    def __init__(self) -> None:
        from mlflow.tracking._tracking_service.utils import _get_store

        self.uri = os.environ["MLFLOW_TRACKING_URI"]
        self.client = connect()
        self.experiment = experiment_id(self.client)
        self.left: list[tuple[str, str]] = []  # what was marked and could not be deleted, and why
        self._database = locations.database_file(self.uri)
        store = _get_store(self.uri)
        self._rows: Any = store if hasattr(store, "_hard_delete_run") else None  # None: behind a server
        self._marked = set(self._rows._get_deleted_logged_models()) if self._rows else set()
        self._sources = [  # name, version and source of every version of every model
            (found.name, int(found.version), str(found.source)) for found in _pages(self.client.search_model_versions)
        ]

    def copied(self, name: str) -> set[int]:
        """Versions of a model whose files a version of another model uses: MLflow copies versions without their files."""
        sources = [re.fullmatch(rf"models:/{re.escape(name)}/(\d+)", source) for _, _, source in self._sources]
        return {int(match[1]) for match in sources if match}

    def versions(self, going: Collection[Version], why: str) -> list[Disposal]:
        """Versions, with their files."""
        numbers = {(version.name, version.version) for version in going}
        ids = {(name, version): match[0] for name, version, source in self._sources if (match := MODEL_ID.search(source))}
        shared = {model_id for version, model_id in ids.items() if version not in numbers}
        found = []
        for version in going:
            model_id = ids.get((version.name, version.version))
            model = self._model(model_id) if model_id and model_id not in shared else None
            size = self._size(model.artifact_location) if model else 0

            mark = partial(self._mark_version, version, model)
            found.append(Disposal("version", version.uri, size, why, mark, partial(self._erase_model, model)))
        return found

    def models(self, name: str, before: datetime, why: str) -> list[Disposal]:
        """Stored models of that name of which there is no version: a registration, or a deletion, was killed before `before`."""
        registered = {match[0] for *_, source in self._sources if (match := MODEL_ID.search(source))}
        filters = f"name = '{name}'"
        models = list(_pages(lambda **page: self.client.search_logged_models([self.experiment], filters, **page)))
        if self._rows:
            marked = map(self._model, self._marked)
            models += [model for model in marked if model and (str(model.experiment_id), model.name) == (self.experiment, name)]
        return [
            Disposal("model", model.model_id, self._size(model.artifact_location), why,
                     partial(self._mark_model, model), partial(self._erase_model, model))
            for model in models
            if model.model_id not in registered and clock.at(model.creation_timestamp / 1000) < before
        ]  # fmt: skip

    def runs(self, name: str, keep: int, makers: Collection[str | None], why: str) -> list[Disposal]:
        """Ended runs of the pipeline that registers `name`, with their stages' runs, but for the `keep` newest and `makers`."""
        from mlflow.entities import ViewType

        children = defaultdict[str | None, list[Any]](list)
        view = ViewType.ALL if self._rows else ViewType.ACTIVE_ONLY  # for a server, what is marked is done
        newest_first = {"run_view_type": view, "order_by": ["attributes.start_time DESC"]}
        for run in _pages(lambda **page: self.client.search_runs([self.experiment], **newest_first, **page)):
            children[run.data.tags.get("mlflow.parentRunId")].append(run)
        pipelines = [
            run for run in children[None] if "ldm.stage" in run.data.tags and run.data.params.get("registry.name") == name
        ]
        recent = [run for run in pipelines if run.info.lifecycle_stage != DELETED][:keep]
        oldest = min((run.info.start_time for run in recent), default=0)
        going = []
        for run in pipelines:
            family = [run, *children[run.info.run_id]]
            ended = all(one.info.status in ENDED for one in family)
            if run.info.start_time < oldest and run.info.run_id not in makers and ended:
                going += family[::-1]  # children first: they are found by their parent
        return [
            Disposal("run", f"{run.info.run_name} {run.info.run_id}", self._size(run.info.artifact_uri), why,
                     partial(self._mark_run, run), partial(self._erase_run, run))
            for run in going
        ]  # fmt: skip

    def _model(self, model_id: str) -> Any:
        """A stored model, also one that is marked as deleted; None if it is gone."""
        from mlflow import MlflowException

        with contextlib.suppress(MlflowException):
            return (
                self._rows.get_logged_model(model_id, allow_deleted=True)
                if self._rows
                else self.client.get_logged_model(model_id)
            )
        return None

    def _mark_version(self, version: Version, model: Any) -> None:
        self.client.delete_model_version(version.name, str(version.version))
        self._mark_model(model)

    def _mark_model(self, model: Any) -> None:
        if model and model.model_id not in self._marked:
            self.client.delete_logged_model(model.model_id)

    def _mark_run(self, run: Any) -> None:
        if run.info.lifecycle_stage != DELETED:
            self.client.delete_run(run.info.run_id)

    def _erase_model(self, model: Any) -> None:
        if model and self._erased(model.model_id, model.artifact_location):
            self._rows._hard_delete_logged_model(model.model_id)

    def _erase_run(self, run: Any) -> None:
        if self._erased(run.info.run_id, run.info.artifact_uri):
            self._rows._hard_delete_run(run.info.run_id)

    def _erased(self, name: str, location: str) -> bool:
        """Delete the files of a run or model; whether they are gone, so that its rows may go."""
        if not self._rows:
            self.left.append((self.uri, "marked as deleted; the server's owner deletes the rest by `mlflow gc`"))
            return False
        path = self._path(location)
        if path and self._database and not path.is_relative_to(self._database.parent):
            self.left.append((name, f"marked as deleted; its files lie outside of {self._database.parent}: {path}"))
            return False
        try:
            if path:
                shutil.rmtree(path, ignore_errors=not path.exists())
                with contextlib.suppress(OSError):  # it holds something else
                    path.parent.rmdir()
            else:
                from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

                get_artifact_repository(location).delete_artifacts()
        except Exception as error:  # each kind of storage has its own
            self.left.append((name, f"marked as deleted; its files at {location} cannot be deleted ({reason(error)})"))
            return False
        return True

    def _path(self, location: str) -> Path | None:
        return locations.current(location, self._database) if self._database else locations.local_path(location)

    def _size(self, location: str) -> int:
        path = self._path(location)
        return bytes_of(path) if path else 0


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All results of one of MLflow's searches."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return
