"""dvc.yaml must name everything a stage depends on, or DVC would take a stale result for a fresh one."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
import yaml

ROOT = Path(__file__).parents[2]
STAGES = {name: stage.get("do", stage) for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()}


def import_closure(stage: str) -> set[str]:
    """Files of every module of ours that the stage imports, at whatever depth and wherever in a function."""
    graph, closure, pending = grimp.build_graph("ldm"), set(), {f"ldm.stages.{stage}"}
    while pending:  # importing a.b.c runs a/__init__.py and a/b/__init__.py first
        module = pending.pop()
        closure.add(module)
        parent = {module.rpartition(".")[0]} - {""}
        pending |= (graph.find_modules_directly_imported_by(module) | parent) - closure
    return {str(file_of(module).relative_to(ROOT)) for module in closure}


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("stage", STAGES)
def test_every_imported_module_is_a_dependency_and_no_other(stage):
    named = {dep for dep in STAGES[stage]["deps"] if dep.startswith("ldm/")}
    assert named == import_closure(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_importing_a_stage_loads_no_module_beyond_its_dependencies(stage, tmp_path):
    """The static closure, checked against what Python really loads: in a fork, which has the libraries and none of ours."""
    child = os.fork()
    if child == 0:
        try:
            for name in ours():
                del sys.modules[name]
            importlib.import_module(f"ldm.stages.{stage}")
            (tmp_path / "loaded").write_text("\n".join(str(sys.modules[name].__file__) for name in ours()))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    loaded = {os.path.relpath(file, ROOT) for file in (tmp_path / "loaded").read_text().splitlines()}
    assert f"ldm/stages/{stage}.py" in loaded and loaded <= set(STAGES[stage]["deps"])


def ours() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in ("ldm", "flows")]


def test_stages_load_where_the_orchestration_is_absent(tmp_path):
    """The training core starts on a machine that has none of the orchestration installed."""
    for name in ("prefect", "dvc", "mlflow", "webdataset"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')")
    code = f"import {', '.join(f'ldm.stages.{stage}' for stage in STAGES)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)


def test_params_named_in_dvc_yaml_exist():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in STAGES.values():
        for name in stage.get("params", []):
            value = params
            for part in name.split("."):
                value = value[part]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_no_setting_that_dvc_yaml_does_not_name(stage):
    """Every `settings.a.b` of the stage's own module (others get values, never the settings) lies in one of its params."""
    tree = ast.parse((ROOT / f"ldm/stages/{stage}.py").read_text())
    chains = {ast.unparse(node).removeprefix("settings.") for node in ast.walk(tree) if isinstance(node, ast.Attribute)
              and ast.unparse(node).startswith("settings.")}  # fmt: skip
    read = {chain for chain in chains if not any(other.startswith(chain + ".") for other in chains)}
    params = STAGES[stage].get("params", [])
    assert {chain for chain in read if not any(f"{chain}.".startswith(f"{param}.") for param in params)} == set()
    unused = {param for param in params if not any(f"{chain}.".startswith(f"{param}.") for chain in read)}
    assert unused == set()
