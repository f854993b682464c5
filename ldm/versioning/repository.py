"""DVC's repository: opening it, locking its stages, the graph of dvc.yaml, dvc.lock and params.yaml."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ldm.base.errors import InputError
from ldm.base.files import locked
from ldm.versioning.branches import WORKTREES

RESTORE = "restore it; after a merge, keep one side: `git checkout --ours dvc.lock`"


@contextlib.contextmanager
def open_repository(root: Path, wait: bool = False) -> Iterator[Any]:
    """DVC's `Repo`; DVC's errors become `InputError`. With `wait`, wait for a lock that another process holds."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)  # the pipeline's own lines say what runs
    try:
        with Repo(str(root), _wait_for_lock=wait) as repo:
            yield repo
    except DvcException as error:
        said = " ".join(str(error).split())
        damaged = "dvc.lock" in said and ("validation failed" in said or "corrupted" in said)
        raise InputError(f"{root}: DVC says: {said}{f'; {RESTORE}' if damaged else ''}") from None


@contextlib.contextmanager
def held(repo: Any, *paths: Path, reading: bool = False) -> Iterator[None]:
    """Let no stage start meanwhile. `InputError` if one that writes `paths` is running or, unless `reading`, one that reads."""
    from dvc.lock import LockError
    from dvc.rwlock import rwlock

    files = [str(path) for path in paths]
    try:
        with repo.lock:
            _remove_empty(repo)
            read, written = (files, []) if reading else ([], files)
            with rwlock(repo.tmp_dir, repo.fs, "ldm", read, written, repo.config["core"]["hardlink_lock"]):
                yield
    except LockError as error:
        reason = " ".join(str(error).split()).partition(" If there are no processes")[0]
        raise InputError(f"a stage works here, or DVC itself: {reason}; try again when it has ended") from None


def _remove_empty(repo: Any) -> None:
    """DVC was killed between creating and writing its record of readers and writers, and cannot read an empty one."""
    from dvc.rwlock import RWLOCK_FILE

    record = Path(repo.tmp_dir, RWLOCK_FILE)
    if record.is_file() and not record.stat().st_size:
        record.unlink()


def forget(root: Path, pid: int) -> None:
    """Take a killed process out of DVC's record of readers and writers: its number may soon be that of one that lives."""
    from dvc.rwlock import _edit_rwlock

    with open_repository(root) as repo:
        _remove_empty(repo)
        with _edit_rwlock(repo.tmp_dir, repo.fs, repo.config["core"]["hardlink_lock"]) as record:
            others = {path: [one for one in readers if one["pid"] != pid] for path, readers in record["read"].items()}
            record["read"] = {path: readers for path, readers in others.items() if readers}
            record["write"] = {path: writer for path, writer in record["write"].items() if writer["pid"] != pid}


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Allow one run at a time in a folder: two would change the same files."""
    path = root / ".ldm/pipeline.lock"
    path.parent.mkdir(exist_ok=True)
    with contextlib.ExitStack() as held_until_the_end:
        try:
            held_until_the_end.enter_context(locked(path, wait=False))
        except BlockingIOError:
            raise InputError(f"{root}: process {path.read_text()} runs the pipeline here; wait for it or stop it") from None
        path.write_text(str(os.getpid()))
        yield


class Node(NamedTuple):
    """One stage of dvc.yaml."""

    name: str
    outs: tuple[str, ...]  # paths relative to the project's root
    upstream: frozenset[str] = frozenset()  # names of the stages whose outs it reads
    needs: frozenset[str] = frozenset()  # these and all that they need
    meta: Mapping[str, Any] = MappingProxyType({})  # hints for the runner: gpus, timeout (seconds), retries


def read_graph(root: Path) -> tuple[Node, ...]:
    """Every stage that has a command, each after those it depends on, otherwise in the order of the file."""
    import networkx

    nodes = []
    with open_repository(root) as repo:
        graph, order = repo.index.graph, list(repo.index.stages)  # DVC's edges point from a stage to what it depends on
        for stage in networkx.lexicographical_topological_sort(graph.reverse(), key=order.index):
            if stage.cmd:
                outs = (os.path.relpath(out.fs_path, repo.root_dir) if out.is_in_repo else out.def_path for out in stage.outs)
                needed = (graph.successors(stage), networkx.descendants(graph, stage))
                upstream, needs = (frozenset(stage_name(other) for other in others if other.cmd) for others in needed)
                nodes.append(Node(stage_name(stage), tuple(outs), upstream, needs, stage.meta or {}))
    return tuple(nodes)


def ancestors(nodes: tuple[Node, ...], target: str) -> tuple[Node, ...]:
    """`target` and every stage that it needs, in the order given."""
    needed = next((node.needs | {target} for node in nodes if node.name == target), None)
    if needed is None:
        raise InputError(f"dvc.yaml has no stage {target!r}; it has {', '.join(node.name for node in nodes)}")
    return tuple(node for node in nodes if node.name in needed)


def around(nodes: tuple[Node, ...], target: str) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """`ancestors`, and the stages that need `target`; others, such as a source that is not used, belong to no run."""
    return ancestors(nodes, target), tuple(node for node in nodes if target in node.needs)


def check_data(root: Path, path: str) -> None:
    """`InputError` if dvc.yaml is broken, or if the data folder neither exists nor is an out of a stage."""
    if not any(path in node.outs for node in read_graph(root)) and not (root / path).exists():
        if f"/{WORKTREES}/" in root.as_posix():
            advice = f"`dvc add {path}` in the checkout, and commit {path}.dvc"
            raise InputError(f"data.path {path}: not in the commit that this run works with; {advice}")
        raise InputError(f"data.path {path}: no such folder; set data.path in params.yaml to a folder of captioned images")


def stage_name(stage: Any) -> str:
    """The name that `dvc repro` takes in the project's root; DVC's own `addressing` depends on the working directory."""
    return stage.name if stage.path_in_repo == "dvc.yaml" else f"{stage.path_in_repo}:{stage.name}"


def locked_makers(root: Path, out: str) -> dict[str, dict[str, Any]]:
    """The dvc.lock entries of the stage that made `out` and of its ancestors, by stage name."""
    entries = read_yaml(root / "dvc.lock").get("stages", {})
    makers = {made["path"]: name for name, entry in entries.items() for made in entry.get("outs", [])}
    found: dict[str, dict[str, Any]] = {}
    wanted = [out]
    for path in wanted:  # it grows
        name = makers.get(path)
        if name and name not in found:
            found[name] = entry = entries[name]
            wanted += [needed["path"] for needed in entry.get("deps", [])] + list(entry.get("params", {}))
    return found


def read_yaml(path: Path) -> Any:
    """As DVC reads it: DVC writes 1.0e-7 as 1e-07, which other readers take for a string."""
    from dvc.exceptions import DvcException
    from dvc.utils.serialize import load_yaml

    found = None
    with contextlib.suppress(DvcException):
        found = load_yaml(str(path))
    if not isinstance(found, dict):
        raise InputError(f"{path}: damaged, no keys and values; {RESTORE}")
    return found
