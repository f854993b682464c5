"""What counts as a change of a stage's code, and that nothing else decides about its outs."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml
from pydantic import BaseModel
from tiny import REPOSITORY, TINY, environment, set_params

from ldm.base.errors import InputError
from ldm.base.options import Choice, kinds
from ldm.config import Settings, load_settings
from ldm.stages import code
from ldm.stages.fingerprint import UNCOUNTED, _meaning, check_recorded, counted, fingerprint
from ldm.stages.stage import NAMES, stage_params

STAGES = [name for name in NAMES if name != "code"]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def is_of_choices(path: Path) -> bool:
    """Whether importing a module of this package imports all of them."""
    return path.parent.name != "ldm" and f"from {dotted(path)}." in path.read_text()


MODULES = {
    dotted(path): path.read_text()
    for path in sorted((REPOSITORY / "ldm").rglob("*.py"))
    if path.name != "__init__.py" or is_of_choices(path)
}
# what modules that count may use of those that do not: names that neither compute nor choose anything
USED = {
    "ldm.config": "settings as the file has them",
    "ldm.base.errors": "InputError check_space env_count env_positive env_switch megabytes",
    "ldm.base.lazy": "Tensor torch",
    "ldm.base.options": (
        "Choice Count Fraction NonNegative OneOf Positive Rate Section chosen explained keys kinds value_at"  # classes by kind
    ),
    "ldm.base.paths": "constants that dvc.yaml repeats",
    "ldm.base.progress": "Progress",
    "ldm.base.resources": "Resources",
    "ldm.registry.versions": "downloaded",
    "ldm.stages.checks": (
        "check_captions check_fetched check_initial check_latents_space check_lengths check_part check_sizes check_training_space"
        " size_of"
    ),
    "ldm.stages.stage": "stage_main stage_params stop_at_checkpoint",
    "ldm.stages.work": "Work identify opened",
    "ldm.registry.tracking": "Run stage_run use_default_store",
}


def fingerprints(**changed: str) -> dict[str, str]:
    """Of every stage, with the text of some modules changed."""
    texts = MODULES | {name.replace("__", "."): text for name, text in changed.items()}
    return {stage: fingerprint(stage, texts.__getitem__) for stage in STAGES}


def of(text: str, stage: str = "source") -> str:
    """Fingerprint of a stage whose module is this text."""
    return fingerprint(stage, lambda module: text if module == f"ldm.stages.{stage}" else MODULES[module])


def test_comments_docstrings_and_formatting_of_any_module_do_not_count():
    def dressed(text: str) -> str:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                described = node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
                node.body = [ast.Expr(ast.Constant("Another docstring.")), *node.body[bool(described) :]]
        return "# a comment\n\n\n" + ast.unparse(ast.fix_missing_locations(tree)) + "\n\n# another\n"

    texts = {name: dressed(text) for name, text in MODULES.items()}
    assert all(texts[name] != MODULES[name] for name in MODULES)
    assert {stage: fingerprint(stage, texts.__getitem__) for stage in STAGES} == fingerprints()


def test_a_change_of_meaning_changes_the_stages_that_import_the_module_and_no_others():
    before = fingerprints()
    for module in MODULES:
        after = fingerprints(**{module.replace(".", "__"): MODULES[module] + "\n_changed = 1\n"})
        changed = {stage for stage in STAGES if after[stage] != before[stage]}
        assert changed == {stage for stage in STAGES if module in counted(stage)}, module
        assert not (changed and module in UNCOUNTED)


BASE = "from ldm.base.errors import InputError\ndef run(x):\n    y = x + 1\n    return y\n"


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("print(f'{y} of {x}', flush=True)", False),
        ("print('a warning', file=sys.stderr)", False),
        ("print('a row', file=table)", True),
        ("print('a row', **where)", True),
        ("y += 0.0", True),
        ("'a string that nobody reads'", False),
        ("y = 'a string that somebody reads'", True),
    ],
)
def test_lines_for_people_do_not_count(line, counts):
    assert (of(BASE) != of(BASE.replace("    return", f"    {line}\n    return"))) == counts


@pytest.mark.parametrize(
    ("one", "other", "counts"),
    [
        ("raise InputError(f'{x}: too small')", "raise InputError('too small') ", False),
        ("raise InputError('a') from error", "raise InputError('a') from None", True),
        ("raise ValueError('a')", "raise ValueError('b')", True),  # some are caught, and written to an out
        ("raise InputError('a')", "raise ValueError('a')", True),
    ],
)
def test_the_texts_of_errors_that_end_a_run_do_not_count(one, other, counts):
    one, other = (BASE.replace("    return", f"    if x < 0:\n        {line}\n    return") for line in (one, other))
    assert (of(one) != of(other)) == counts


def test_an_import_counts_by_what_the_module_says_and_not_by_its_name(tmp_path):
    """A module that moves changes nothing; one that comes to mean another module does. In a copy, in processes of their own."""
    shutil.copytree(REPOSITORY / "ldm", tmp_path / "ldm", ignore=shutil.ignore_patterns("__pycache__"))
    show = f"from ldm.stages.fingerprint import fingerprint; print([fingerprint(stage) for stage in {STAGES}])"

    def shown() -> str:
        command = [sys.executable, "-B", "-c", show]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
        return done.stdout

    before = shown()
    assert before == str(list(fingerprints().values())) + "\n"  # wherever it lies
    (tmp_path / "ldm/base/pixels.py").rename(tmp_path / "ldm/data/digests.py")
    for path in (tmp_path / "ldm").rglob("*.py"):
        path.write_text(path.read_text().replace("ldm.base.pixels", "ldm.data.digests"))
    assert shown() == before
    path = tmp_path / "ldm/model.py"
    path.write_text(path.read_text().replace("from ldm.data.digests import", "from ldm.base.randomness import"))
    assert shown() != before


# the closure


@pytest.mark.parametrize("stage", STAGES)
def test_the_closure_is_what_an_independent_reader_of_imports_finds(stage):
    """Every import at whatever depth and wherever in a function, but no package's own file and what only a type checker sees."""
    assert reached(f"ldm.stages.{stage}", without=UNCOUNTED.keys()) == set(counted(stage))


@cache
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("ldm", exclude_type_checking_imports=True, cache_dir=None)


def reached(*modules: str, without: Collection[str] = ()) -> set[str]:
    found, pending = set(), set(modules)
    while pending:
        module = pending.pop()
        found.add(module)
        parents = {module.rsplit(".", depth)[0] for depth in range(1, module.count("."))}  # of choices, if in MODULES
        pending |= (imports().find_modules_directly_imported_by(module) | parents) & MODULES.keys() - found - set(without)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_importing_a_stage_loads_no_module_beyond_the_closure(stage, tmp_path):
    """What Python really loads: in a fork, which has the libraries and none of ours."""
    child = os.fork()
    if child == 0:
        try:
            for name in ours():
                del sys.modules[name]
            importlib.import_module(f"ldm.stages.{stage}")
            (tmp_path / "loaded").write_text("\n".join(ours()))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    loaded = {name for name in (tmp_path / "loaded").read_text().split() if name in MODULES}
    beside = reached(*UNCOUNTED)  # with what these need themselves
    assert f"ldm.stages.{stage}" in loaded and loaded <= counted(stage).keys() | beside


def ours() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in ("ldm", "flows")]


def test_packages_own_files_hold_public_names_and_nothing_that_computes():
    """They do not count, so nothing that counts may be there, or be imported from there."""
    for path in (REPOSITORY / "ldm").rglob("__init__.py"):
        body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)]
        if is_of_choices(path):
            assert {type(node) for node in body} == {ast.ImportFrom}, path
            continue
        assert [type(node) for node in body] in ([], [ast.ImportFrom, ast.Assign]), path
        assert not body or "exports(__name__" in ast.unparse(body[1]), path
    for name, text in MODULES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and f"{node.module}".startswith("ldm") and f"{node.module}" not in MODULES:
                assert all(f"{node.module}.{alias.name}" in MODULES for alias in node.names), (name, ast.unparse(node))
            assert not (isinstance(node, ast.ImportFrom) and node.level), name


def test_a_page_counts_with_the_module_that_fills_it_in(tmp_path, monkeypatch):
    package = Path(shutil.copytree(REPOSITORY / "ldm", tmp_path / "ldm"))
    monkeypatch.setattr("ldm.stages.fingerprint.PACKAGE", package)
    before = {stage: fingerprint(stage) for stage in STAGES}
    page = package / "report/templates/report.html"
    page.write_text(page.read_text() + "<!-- edited -->")
    _meaning.cache_clear()
    assert [stage for stage in STAGES if fingerprint(stage) != before[stage]] == ["evaluate"]
    _meaning.cache_clear()


# that what does not count decides nothing


COUNTED = sorted({module for stage in STAGES for module in counted(stage)})


def test_what_does_not_count_is_there_and_used_only_for_what_computes_nothing():
    assert set(MODULES) >= UNCOUNTED.keys()
    for name in COUNTED:
        for node in ast.walk(ast.parse(MODULES[name])):
            if isinstance(node, ast.ImportFrom) and f"{node.module}".startswith("ldm"):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    module = whole if whole in MODULES else str(node.module)
                    if module in UNCOUNTED and name not in UNCOUNTED and module not in ("ldm.config", "ldm.base.paths"):
                        assert module == whole or alias.name in USED[module].split(), f"{name} uses {whole}"


def test_settings_are_the_values_of_the_file_which_dvc_compares(tmp_path):
    """So nothing that `ldm.config` does can change what a stage computes while dvc.lock stays as it is."""
    for changes in ({}, TINY, {"posterior": {"part": ["conv_out"], "lr": 1e-7}, "data": {"path": "x"}}):
        shutil.copy(REPOSITORY / "params.yaml", tmp_path)
        set_params(tmp_path, changes)
        values = yaml.safe_load((tmp_path / "params.yaml").read_text())
        assert without_defaults(plain(load_settings(tmp_path).model_dump()), values) == values
    section = ast.parse(MODULES["ldm.config"])
    functions = [node for node in ast.walk(section) if isinstance(node, ast.ClassDef) for node in node.body
                 if isinstance(node, ast.FunctionDef)]  # fmt: skip
    assert {ast.unparse(node.decorator_list[0]) for node in functions} <= {"model_validator(mode='after')", "property"}
    for node in functions:  # a validator changes nothing
        assert "property" in ast.unparse(node.decorator_list[0]) or ast.unparse(node.body[-1]) == "return self"


def without_defaults(found: Any, given: Any) -> Any:
    """What the file gives; the rest are defaults of choices, which count with the code of the choice."""
    if isinstance(found, dict) and isinstance(given, dict):
        assert found.keys() == given.keys() or "kind" in given
        return {key: without_defaults(found[key], given[key]) for key in given}
    if isinstance(found, list) and isinstance(given, list):
        return [without_defaults(*pair) for pair in zip(found, given, strict=True)]
    return float(found) if isinstance(given, str) and isinstance(found, float) else found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_counts_the_code_of_all_that_its_settings_can_choose(stage):
    modules = set()
    keys = stage_params(REPOSITORY, stage, load_settings(REPOSITORY)).keys()
    for key in keys:
        field, section = key.split(".")[0], Settings
        for part in key.split("."):
            field = section.model_fields[part]
            section = next(models(field.annotation), section)
        modules |= {choice.__module__ for choice in models(field.annotation) if issubclass(choice, Choice)}
    if stage == "shard":  # reads all of `data` but this
        modules = {module for module in modules if not module.startswith("ldm.data.sources")}
    assert modules - {"ldm.base.options"} <= counted(stage).keys()
    assert modules or not {"text", "backbone", "sampling"} & keys


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every section and choice that a field can hold, at whatever depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for model in (annotation, *(kinds(annotation).values() if issubclass(annotation, Choice) else ())):
            yield model
            for field in model.model_fields.values():
                yield from models(field.annotation)
    for part in getattr(annotation, "__args__", ()):
        yield from models(part)


def plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def test_no_out_holds_the_text_of_an_error_that_does_not_count():
    """Who catches an `InputError` ends with it, raises another, or hands it on to be raised."""
    for name in COUNTED:
        for node in ast.walk(ast.parse(MODULES[name])):
            if isinstance(node, ast.ExceptHandler) and "InputError" in ast.unparse(node.type or ast.Constant(0)):
                rest = [other for statement in node.body for other in ast.walk(statement)
                        if not isinstance(statement, ast.Raise | ast.Return) and isinstance(other, ast.Name)]  # fmt: skip
                assert not any(other.id == node.name for other in rest), f"{name}: {ast.unparse(node)}"


def test_no_module_reads_its_own_docstring():
    for name in COUNTED:
        assert "__doc__" not in MODULES[name] and not re.search(r"\binspect\.(getsource|getdoc)", MODULES[name])


# the stage


def test_a_stage_refuses_to_run_other_code_than_dvc_will_record(tmp_path, monkeypatch):
    code.run(tmp_path)
    written = yaml.safe_load((tmp_path / ".ldm/code.yaml").read_text())
    assert written == fingerprints()
    check_recorded(tmp_path, "shard")
    (tmp_path / ".ldm/code.yaml").write_text(yaml.safe_dump({**written, "shard": "0"}))
    check_recorded(tmp_path, "source")
    with pytest.raises(InputError, match=r"code\.yaml: the code of shard has changed since it was written; `dvc repro`"):
        check_recorded(tmp_path, "shard")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    command = [sys.executable, "-m", "ldm.stages.shard"]
    env = environment(DVC_STAGE="shard", PYTHONPATH=str(REPOSITORY))
    refused = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "the code of shard" in refused.stderr
