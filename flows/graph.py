"""The stages of dvc.yaml and their edges, read through DVC itself."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import InputError


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml; paths are relative to the project's root."""

    name: str
    command: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    upstream: tuple[str, ...]  # names of the stages whose outs it reads


def read_graph(root: Path) -> tuple[Stage, ...]:
    """Every stage that has a command, each after those it depends on, otherwise in the order of the file."""
    import networkx
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            graph = repo.index.graph.reverse()  # DVC's edges point from a stage to what it depends on
            order = {stage: number for number, stage in enumerate(repo.index.stages)}
            ordered = networkx.lexicographical_topological_sort(graph, key=order.__getitem__)
            return tuple(_stage(stage, graph.predecessors(stage), root) for stage in ordered if stage.cmd)
    except DvcException as error:
        raise InputError(f"{root / 'dvc.yaml'}: {error}") from None


def ancestors(stages: Iterable[Stage], target: str) -> tuple[Stage, ...]:
    """`target` and all that it needs, in the order given."""
    stages = tuple(stages)
    needed = {target}
    if target not in {stage.name for stage in stages}:
        raise InputError(f"dvc.yaml has no stage {target!r}; it has {', '.join(stage.name for stage in stages)}")
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stage.upstream)
    return tuple(stage for stage in stages if stage.name in needed)


def _stage(stage: Any, upstream: Iterable[Any], root: Path) -> Stage:
    return Stage(
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
