"""DVC's Python interface, which only this module knows: the graph of dvc.yaml, dvc.lock, locks, and running one stage.

`python -m ldm.versioning STAGE` brings one stage up to date, as `dvc --wait-for-lock repro -s STAGE` does. It prints the
stage's own lines and DVC's warnings, and writes a `Reproduced` as JSON to the file descriptor that `LDM_RESULT_FD` names.
"""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.base.errors import InputError


@dataclass(frozen=True)
class Node:
    """One stage of dvc.yaml; paths are relative to the project's root."""

    name: str
    command: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    upstream: tuple[str, ...]  # names of the stages whose outs it reads


@dataclass(frozen=True)
class Reproduced:
    """How bringing a stage up to date ended."""

    status: Literal["executed", "restored", "cached"] = "cached"  # its command ran; DVC's run-cache had the outs; nothing changed
    exit_code: int = 0  # of its command, negative for a signal
    error: str = ""  # what DVC itself could not do


@contextlib.contextmanager
def open_repository(root: Path, wait: bool = False) -> Iterator[Any]:
    """DVC's own `Repo`; what it refuses is an `InputError`. `wait`: for a lock that another process holds."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)  # its account of what it does is of no use to who watches a pipeline
    try:
        with Repo(str(root), _wait_for_lock=wait) as repo:
            yield repo
    except DvcException as error:
        raise InputError(f"{root}: DVC says: {_in_one_line(error)}") from None


@contextlib.contextmanager
def held(repo: Any, *paths: Path) -> Iterator[None]:
    """For as long as it lasts, no stage starts; `InputError` where one that reads or writes `paths` runs now."""
    from dvc.lock import LockError
    from dvc.rwlock import RWLOCK_FILE, rwlock

    try:
        files, record = [str(path) for path in paths], Path(repo.tmp_dir, RWLOCK_FILE)
        with repo.lock:
            if record.is_file() and not record.stat().st_size:
                record.unlink()  # a kill came between DVC's opening and writing it, and DVC would stumble over it for ever
            with rwlock(repo.tmp_dir, repo.fs, "ldm", [], files, repo.config["core"]["hardlink_lock"]):
                yield
    except LockError as error:
        reason = _in_one_line(error).partition(" If there are no processes")[0]
        raise InputError(f"a stage works here, or DVC itself: {reason}; try again when it has ended") from None


def read_graph(root: Path) -> tuple[Node, ...]:
    """Every stage that has a command, each after those it depends on, otherwise in the order of the file."""
    import networkx

    with open_repository(root) as repo:
        graph = repo.index.graph.reverse()  # DVC's edges point from a stage to what it depends on
        order = {stage: number for number, stage in enumerate(repo.index.stages)}
        ordered = networkx.lexicographical_topological_sort(graph, key=order.__getitem__)
        return tuple(_node(stage, graph.predecessors(stage), root) for stage in ordered if stage.cmd)


def ancestors(nodes: Iterable[Node], target: str) -> tuple[Node, ...]:
    """`target` and all that it needs, in the order given."""
    nodes = tuple(nodes)
    needed = {target}
    if target not in {node.name for node in nodes}:
        raise InputError(f"dvc.yaml has no stage {target!r}; it has {', '.join(node.name for node in nodes)}")
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.upstream)
    return tuple(node for node in nodes if node.name in needed)


def descendants(nodes: Iterable[Node], target: str) -> tuple[Node, ...]:
    """All that need `target`, in the order given."""
    found: dict[str, Node] = {}
    for node in nodes:
        if {target, *found} & set(node.upstream):
            found[node.name] = node
    return tuple(found.values())


def locked_makers(root: Path, out: str) -> dict[str, dict[str, Any]]:
    """The entries of dvc.lock of the stage that made `out` and of all those before it, by name."""
    from dvc.utils.serialize import load_yaml  # DVC's own: it writes 1.0e-7 as 1e-07, a string to other readers

    entries = load_yaml(str(root / "dvc.lock")).get("stages", {})
    found: dict[str, dict[str, Any]] = {}
    wanted = {out}
    while wanted:
        made = {name: entry for name, entry in entries.items() if name not in found
                and wanted & {item["path"] for item in entry.get("outs", [])}}  # fmt: skip
        found |= made
        wanted = {item["path"] for entry in made.values() for item in entry.get("deps", [])}
        wanted |= {file for entry in made.values() for file in entry.get("params", {})}
    return found


def read_params(root: Path) -> Any:
    """params.yaml as DVC reads it."""
    from dvc.utils.serialize import load_yaml

    return load_yaml(str(root / "params.yaml"))


def check_data(root: Path, path: str) -> None:
    """Say now what DVC would say later, and worse: dvc.yaml is broken, or the data folder neither there nor made by a stage."""
    made = any(path in node.outs for node in read_graph(root))
    if not (root / path).exists() and not made:
        raise InputError(f"data.path {path}: no such folder; set data.path in params.yaml to a folder of captioned images")


class Status:
    """Which stages are up to date: DVC is asked once for all of them, and again for those that were when another one has run."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._fresh: set[str] | None = None
        self._asked = False

    def is_up_to_date(self, stage: str) -> bool:
        """Whether there is nothing to do for a stage; False where that is not sure."""
        if self._fresh is None or (stage in self._fresh and not self._asked):
            self._fresh, self._asked = self._ask(), True
        return stage in self._fresh

    def changed(self) -> None:
        """A stage is about to run: what is said of those after it may be true no more."""
        self._asked = False

    def _ask(self) -> set[str]:
        from dvc.lock import LockError

        def is_fresh(stage: Any) -> bool:
            try:
                return not stage.changed()
            except LockError:  # another process runs a stage that writes what this one reads or writes
                return False

        with open_repository(self._root) as repo:
            try:
                with repo.lock:
                    return {_name(stage) for stage in repo.index.stages if stage.cmd and is_fresh(stage)}
            except LockError:
                return set()


def reproduce(root: Path, stage: str) -> Reproduced:
    """Bring one stage up to date, in this process's children."""
    from dvc.exceptions import ReproductionError
    from dvc.stage.exceptions import StageCmdFailedError

    restored = False
    try:
        with open_repository(root, wait=True) as repo:
            restore = repo.stage_cache.restore

            def noted(*arguments: Any, **options: Any) -> None:
                nonlocal restored
                restore(*arguments, **options)  # raises where the run-cache has nothing
                restored = True

            repo.stage_cache.restore = noted
            try:
                done = repo.reproduce(stage, single_item=True)
                return Reproduced("restored" if restored else "executed" if done else "cached")
            except ReproductionError as error:
                if not isinstance(error.__cause__, StageCmdFailedError):
                    raise error.__cause__ or error from None
                return Reproduced("executed", int(str(error.__cause__).rpartition(" ")[2]))
    except InputError as error:
        return Reproduced(exit_code=1, error=str(error))


def _node(stage: Any, upstream: Iterable[Any], root: Path) -> Node:
    return Node(
        name=_name(stage),
        command=stage.cmd,
        deps=tuple(_path(dep, root) for dep in stage.deps),
        outs=tuple(_path(out, root) for out in stage.outs),
        upstream=tuple(sorted(_name(needed) for needed in upstream if needed.cmd)),
    )


def _name(stage: Any) -> str:
    """As `dvc repro` takes it in the project's root; DVC's own `addressing` depends on the working directory."""
    file = stage.path_in_repo
    return stage.name if file == "dvc.yaml" else f"{file}:{stage.name}"


def _path(output: Any, root: Path) -> str:
    return Path(output.fs_path).relative_to(root.resolve()).as_posix() if output.is_in_repo else output.def_path


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main() -> int:
    found = reproduce(Path.cwd(), sys.argv[1])
    if found.error:
        print(f"error: {found.error}", file=sys.stderr, flush=True)
    if "LDM_RESULT_FD" in os.environ:
        with open(int(os.environ["LDM_RESULT_FD"]), "w") as result:
            json.dump(asdict(found), result)
    return found.exit_code % 256


if __name__ == "__main__":
    sys.exit(main())
