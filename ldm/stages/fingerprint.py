"""A fingerprint of the code that a stage computes with: every module that it imports, by meaning.

A module counts by its syntax tree without comments, docstrings, formatting, type-checking imports, printed lines and the
texts of `InputError`s, and by content, not by name: a module that only moves changes no fingerprint. To import a module of a
package of choices is to import all of them, as Python does. Modules in `UNCOUNTED` decide nothing about a stage's outs. The
stage `code` writes the fingerprints to `.ldm/code.yaml`, where `dvc.yaml` reads them as parameters, so DVC runs a stage again
only if its own fingerprint changed.
"""

import ast
import hashlib
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ldm.base import paths
from ldm.base.errors import InputError

PACKAGE = Path(__file__).parents[1]
UNCOUNTED = {  # why what a stage computes does not depend on it; tests/stages/test_fingerprint.py holds the modules to it
    "ldm.base.lazy": "public names; the stages import from the modules themselves",
    "ldm.base.options": "checks settings and returns the file's own values, which DVC compares",
    "ldm.config": "checks settings and returns the file's own values, which DVC compares",
    "ldm.base.errors": "ends a run",
    "ldm.registry.lineage": "describes a run",
    "ldm.base.paths": "dvc.yaml names the same paths, which DVC compares",
    "ldm.base.progress": "prints",
    "ldm.registry.versions": "fetches a version, which never changes",
    "ldm.stages.fingerprint": "compares code",
    "ldm.stages.runtime": "starts and ends the process",
    "ldm.stages.stage": "declares what dvc.yaml says",
    "ldm.stages.work": "names a checkpoint, or a file of latents, by all that it depends on",
    "ldm.registry.tracking": "records",
}
Source = Callable[[str], str]


def counted(stage: str, source: Source | None = None) -> dict[str, str]:
    """Every module that a stage computes with, and the hash of its own meaning. `source` gives a module's text."""
    read, found = source or _text, {}
    pending = [f"ldm.stages.{stage}"]
    while pending:
        name = pending.pop()
        if name not in found:
            found[name], targets = _of(name, read)
            pending += targets
    return dict(sorted(found.items()))


def fingerprint(stage: str, source: Source | None = None) -> str:
    """The stage's module hashed together with those that it imports, each of them in the same way."""
    read, done = source or _text, {}

    def combined(name: str) -> str:
        if name not in done:
            own, targets = _of(name, read)
            done[name] = own  # stands for the module in a circle of imports
            done[name] = _hash([own, *map(combined, targets)])
        return done[name]

    return combined(f"ldm.stages.{stage}")[:32]


def _of(module: str, read: Source) -> tuple[str, tuple[str, ...]]:
    """As `_meaning`, of a module."""
    try:
        return _meaning(read(module))
    except SyntaxError as error:
        raise InputError(f"{_file(module)}:{error.lineno}: {error.msg}") from None


@cache
def _text(module: str) -> str:
    return _file(module).read_text(encoding="utf-8")


def _file(module: str) -> Path:
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@cache
def _choices(module: str) -> tuple[str, ...]:
    """The packages around a module that import all their modules: packages of choices."""
    parts = module.split(".")
    packages = (".".join(parts[:depth]) for depth in range(2, len(parts)))
    return tuple(package for package in packages if re.search(rf"^from {package}\.", _text(package), re.MULTILINE))


@cache
def _meaning(text: str) -> tuple[str, tuple[str, ...]]:
    """Hash of the part of a module's text that counts, and the modules of ours that count among its imports, in order."""
    tree = ast.parse(text)
    reduced = _Reduced()
    tree = reduced.visit(tree)
    return _hash(_plain(tree)), tuple(reduced.targets)


class _Reduced(ast.NodeTransformer):
    """Takes out of a tree what does not count; `targets` are the modules that it imports."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) or _is_printed(node.value):  # a docstring, or a line for people
            return ast.Pass()
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        error = node.exc
        if isinstance(error, ast.Call) and isinstance(error.func, ast.Name) and error.func.id == "InputError":
            node.exc = error.func
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
        self.generic_visit(node)
        empty = all(isinstance(statement, ast.Pass) for statement in (*node.body, *node.orelse))
        calls = any(isinstance(part, ast.Call | ast.NamedExpr | ast.Await) for part in ast.walk(node.test))
        return ast.Pass() if empty and not calls else node  # it only asked whether to print

    def visit_Import(self, node: ast.Import) -> ast.AST:
        for alias in node.names:
            self._follow(alias.name)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if (node.module or "").partition(".")[0] != "ldm":
            return node
        names = []
        for alias in node.names:
            module = f"{node.module}.{alias.name}"
            is_module = _file(module).is_file() and _file(module).name != "__init__.py"
            number = self._follow(module if is_module else str(node.module))
            names.append(ast.alias(f"{number}.{'' if is_module else alias.name}", alias.asname or alias.name))
        return ast.ImportFrom("ldm", names, 0)  # a number instead of the module's name: what it is, its own hash says

    def _follow(self, module: str) -> int:
        """Its number among the modules that count; -1 where it does not."""
        if module.partition(".")[0] != "ldm" or module in UNCOUNTED:
            return -1
        if not _file(module).is_file() or _file(module).name == "__init__.py":  # a public name, or one made at run time
            raise ValueError(f"import from the module itself: {module} has no file of its own")
        self.targets += [name for name in (module, *_choices(module)) if name not in self.targets]
        return self.targets.index(module)


def _is_printed(call: ast.expr) -> bool:
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"):
        return False
    to = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in ("file", None)]
    return all(name in ("sys.stderr", "sys.stdout") for name in to)


def _plain(node: Any) -> Any:
    """A tree as nested lists, the same for every version of Python. Bodies lose `pass`."""
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment"))
        return [type(node).__name__, *([name, value] for name, value in fields if value not in (None, []))]
    if isinstance(node, list):
        return [_plain(item) for item in node if not isinstance(item, ast.Pass)]
    return None if node is None else repr(node)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def check_recorded(root: Path, stage: str) -> None:
    """Under DVC, raise an `InputError` if the stage's code is no longer what the stage `code` found: DVC would record that."""
    file = root / paths.CODE
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get(stage) != fingerprint(stage):
        raise InputError(f"{file}: the code of {stage} has changed since it was written; `dvc repro` (without -s), or `ldm run`")
