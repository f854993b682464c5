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

    with open_repository(root) as repo:
        graph = repo.index.graph.reverse()  # DVC's edges point from a stage to what it depends on
        order = {stage: number for number, stage in enumerate(repo.index.stages)}
        ordered = networkx.lexicographical_topological_sort(graph, key=order.__getitem__)
        return tuple(_node(stage, graph.predecessors(stage), root) for stage in ordered if stage.cmd)


def ancestors(nodes: Iterable[Node], target: str) -> tuple[Node, ...]:
    """`target` and every stage that it needs, in the order given."""
    nodes = tuple(nodes)
    needed = {target}
    if target not in {node.name for node in nodes}:
        raise InputError(f"dvc.yaml has no stage {target!r}; it has {', '.join(node.name for node in nodes)}")
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.upstream)
    return tuple(node for node in nodes if node.name in needed)


def descendants(nodes: Iterable[Node], target: str) -> tuple[Node, ...]:
    """Every stage that needs `target`, in the order given."""
    found: dict[str, Node] = {}
    for node in nodes:
        if {target, *found} & set(node.upstream):
            found[node.name] = node
    return tuple(found.values())


def check_data(root: Path, path: str) -> None:
    """`InputError` if dvc.yaml is broken, or if the data folder neither exists nor is an out of a stage."""
    made = any(path in node.outs for node in read_graph(root))
    if not (root / path).exists() and not made:
        raise InputError(f"data.path {path}: no such folder; set data.path in params.yaml to a folder of captioned images")


def stage_name(stage: Any) -> str:
    """The name that `dvc repro` takes in the project's root; DVC's own `addressing` depends on the working directory."""
    file = stage.path_in_repo
    return stage.name if file == "dvc.yaml" else f"{file}:{stage.name}"


def _node(stage: Any, upstream: Iterable[Any], root: Path) -> Node:
    return Node(
        name=stage_name(stage),
        command=stage.cmd,
        deps=tuple(_path(dep, root) for dep in stage.deps),
        outs=tuple(_path(out, root) for out in stage.outs),
        upstream=tuple(sorted(stage_name(needed) for needed in upstream if needed.cmd)),
    )


def _path(output: Any, root: Path) -> str:
    return Path(output.fs_path).relative_to(root.resolve()).as_posix() if output.is_in_repo else output.def_path
