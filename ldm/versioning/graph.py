"""The stages of dvc.yaml and what each depends on."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.base.errors import InputError
from ldm.versioning.repository import open_repository


@dataclass(frozen=True)
class Node:
    """One stage of dvc.yaml; paths are relative to the project's root."""

    name: str
    command: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    upstream: tuple[str, ...]  # names of the stages whose outs it reads


def read_graph(root: Path) -> tuple[Node, ...]:
    """Every stage that has a command, each after those it depends on, otherwise in the order of the file."""
    import networkx

    def paths(items: Iterable[Any]) -> tuple[str, ...]:
        return tuple(Path(i.fs_path).relative_to(root.resolve()).as_posix() if i.is_in_repo else i.def_path for i in items)

    nodes = []
    with open_repository(root) as repo:
        graph, order = repo.index.graph, list(repo.index.stages)  # DVC's edges point from a stage to what it depends on
        for stage in networkx.lexicographical_topological_sort(graph.reverse(), key=order.index):
            if stage.cmd:
                upstream = sorted(stage_name(needed) for needed in graph.successors(stage) if needed.cmd)
                nodes.append(Node(stage_name(stage), stage.cmd, paths(stage.deps), paths(stage.outs), tuple(upstream)))
    return tuple(nodes)


def ancestors(nodes: tuple[Node, ...], target: str) -> tuple[Node, ...]:
    """`target` and every stage that it needs, in the order given."""
    needed = {target}
    if target not in {node.name for node in nodes}:
        raise InputError(f"dvc.yaml has no stage {target!r}; it has {', '.join(node.name for node in nodes)}")
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.upstream)
    return tuple(node for node in nodes if node.name in needed)


def descendants(nodes: tuple[Node, ...], target: str) -> tuple[Node, ...]:
    """Every stage that needs `target`, in the order given."""
    affected = {target}
    for node in nodes:
        if affected & set(node.upstream):
            affected.add(node.name)
    return tuple(node for node in nodes if node.name in affected - {target})


def check_data(root: Path, path: str) -> None:
    """`InputError` if dvc.yaml is broken, or if the data folder neither exists nor is an out of a stage."""
    if not any(path in node.outs for node in read_graph(root)) and not (root / path).exists():
        raise InputError(f"data.path {path}: no such folder; set data.path in params.yaml to a folder of captioned images")


def stage_name(stage: Any) -> str:
    """The name that `dvc repro` takes in the project's root; DVC's own `addressing` depends on the working directory."""
    return stage.name if stage.path_in_repo == "dvc.yaml" else f"{stage.path_in_repo}:{stage.name}"
