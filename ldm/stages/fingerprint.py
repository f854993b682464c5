"""A fingerprint of the code that a stage computes with: every module that it imports, by meaning. README.md says what counts."""

import ast
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ldm.base import paths
from ldm.base.errors import InputError
from ldm.base.files import content_hash

PACKAGE = Path(__file__).parents[1]
UNCOUNTED = {  # why what a stage computes does not depend on it; tests/stages/test_fingerprint.py holds the modules to it
    "ldm.base.lazy": "public names; the stages import from the modules themselves",
    "ldm.base.options": "checks settings and returns the file's own values, which DVC compares",
    "ldm.config": "checks settings and returns the file's own values, which DVC compares",
    "ldm.base.errors": "ends a run; reads environment variables, none of which changes what is meant",
    "ldm.registry.lineage": "describes a run",
    "ldm.base.paths": "dvc.yaml names the same paths, which DVC compares",
    "ldm.base.progress": "prints",
    "ldm.base.resources": "measures what a training uses",
    "ldm.registry.versions": "fetches a version, which never changes",
    "ldm.stages.checks": "ends a run before it computes",
    "ldm.stages.fingerprint": "compares code",
    "ldm.stages.stage": "reads what dvc.yaml says; starts and ends the process",
    "ldm.stages.work": "names a checkpoint, or a file of latents, by all that it depends on",
    "ldm.registry.tracking": "records",
}
Source = Callable[[str], str]  # the text of a module


def counted(stage: str, source: Source | None = None) -> dict[str, str]:
    """Every module that a stage computes with, and the hash of its own meaning."""
    return {name: own for name, (own, _) in sorted(_closure(stage, source).items())}


def fingerprint(stage: str, source: Source | None = None) -> str:
    """One hash of those modules and of which imports which."""
    found = _closure(stage, source)
    numbers = {name: number for number, name in enumerate(found)}  # by the order of imports, whatever the names
    return _hash([[own, [numbers[target] for target in targets]] for own, targets in found.values()])[:32]


def check_recorded(root: Path, stage: str) -> None:
    """Under DVC, raise an `InputError` if the stage's code is no longer what the stage `code` found: DVC would record that."""
    file = root / paths.CODE
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if found.get(stage) != fingerprint(stage):
        raise InputError(f"{file}: the code of {stage} has changed since it was written; `dvc repro` (without -s), or `ldm run`")


def _closure(stage: str, source: Source | None) -> dict[str, tuple[str, list[str]]]:
    """`_meaning` of the stage's module and of all that it imports, the nearest first."""
    found, pending = {}, [f"ldm.stages.{stage}"]
    for name in pending:  # which grows
        if name not in found:
            found[name] = _meaning(name, (source or _text)(name))
            pending += found[name][1]
    return found


@cache
def _text(module: str) -> str:
    return _file(module).read_text(encoding="utf-8")


def _file(module: str) -> Path:
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _is_module(name: str) -> bool:
    return _file(name).is_file() and _file(name).name != "__init__.py"


@cache
def _meaning(module: str, text: str) -> tuple[str, list[str]]:
    """Hash of what counts of a module's text, and templates that it fills in; the modules of ours that it imports, in order."""
    try:
        reduced, tree = _Reduced(), ast.parse(text)
    except SyntaxError as error:
        raise InputError(f"{_file(module)}:{error.lineno}: {error.msg}") from None
    fills = any(isinstance(node, ast.Constant) and node.value == "templates" for node in ast.walk(tree))
    pages = sorted(_file(module).parent.glob("templates/*")) if fills else ()
    return _hash([_plain(reduced.visit(tree)), *(page.read_text(encoding="utf-8") for page in pages)]), reduced.targets


class _Reduced(ast.NodeTransformer):
    """Takes out of a tree what does not count; `targets` are the modules that it imports."""

    def __init__(self) -> None:
        self.targets: list[str] = []

    def visit_Pass(self, node: ast.Pass) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Without docstrings and lines printed to stdout or stderr."""
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print":
            files = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in ("file", None)]
            return node if set(files) - {"sys.stderr", "sys.stdout"} else None
        return None if isinstance(call, ast.Constant) else node

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        if isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) == "InputError":
            node.exc = node.exc.func
        return node

    def visit_If(self, node: ast.If) -> ast.If | None:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
        self.generic_visit(node)
        calls = any(isinstance(part, ast.Call | ast.NamedExpr | ast.Await) for part in ast.walk(node.test))
        return node if node.body or node.orelse or calls else None  # None: it only asked whether to print

    def visit_Import(self, node: ast.Import) -> ast.Import:
        for alias in node.names:
            self._follow(alias.name)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if not f"{node.module}.".startswith("ldm."):
            return node
        names = []
        for alias in node.names:
            module = f"{node.module}.{alias.name}"
            number = self._follow(module if _is_module(module) else str(node.module))
            names.append(ast.alias(f"{number}.{'' if _is_module(module) else alias.name}", alias.asname or alias.name))
        return ast.ImportFrom("ldm", names, 0)  # a number instead of the module's name: what it is, its own hash says

    def _follow(self, module: str) -> int:
        """Its number among the modules that count; -1 where it does not."""
        if not f"{module}.".startswith("ldm.") or module in UNCOUNTED:
            return -1
        if not _is_module(module):  # a public name, or one made at run time
            raise ValueError(f"import from the module itself: {module} has no file of its own")
        parts = module.split(".")  # to import a module of a package of choices is to import all of them, as Python does
        packages = [".".join(parts[:depth]) for depth in range(2, len(parts))]
        choices = [package for package in packages if re.search(rf"^from {package}\.", _text(package), re.MULTILINE)]
        self.targets += [name for name in (module, *choices) if name not in self.targets]
        return self.targets.index(module)


def _plain(node: Any) -> Any:
    """A tree as nested lists, the same for every version of Python."""
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment"))
        return [type(node).__name__, *([name, value] for name, value in fields if value not in (None, []))]
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return None if node is None else repr(node)


def _hash(value: Any) -> str:
    return content_hash(json.dumps(value).encode())
