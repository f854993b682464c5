"""dvc.yaml says of every stage what its module declares, and a module declares what it reads."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.base.paths import CODE
from ldm.config import load_settings
from ldm.stages.stage import NAMES, Stage

ROOT = Path(__file__).parents[2]
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def declared(name: str) -> Stage:
    stage = importlib.import_module(f"ldm.stages.{name}").STAGE
    assert isinstance(stage, Stage)
    return stage


def test_dvc_yaml_has_every_stage_in_its_order_and_can_be_read():
    assert tuple(DVC) == NAMES
    assert {path.stem for path in (ROOT / "ldm/stages").glob("*.py") if "STAGE = Stage(" in path.read_text()} == set(NAMES)
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 140


@pytest.mark.parametrize("name", NAMES)
def test_dvc_yaml_says_what_the_stage_declares(name):
    stage, said = declared(name), DVC[name]
    item = ""
    if stage.for_each:
        assert said.keys() == {"foreach", "do"} and said["foreach"] == f"${{{stage.for_each}}}"
        said, item = said["do"], " ${item}"
    paths = [
        next(iter(out)) if isinstance(out, dict) else out for kind in ("outs", "metrics", "plots") for out in said.get(kind, [])
    ]
    assert stage.name == name and said["cmd"] == f"python -m ldm.stages.{name}{item}"
    assert tuple(said.get("deps", ())) == stage.inputs
    assert sorted(paths) == sorted(stage.outs)
    code = [{CODE: [name]}] if name != "code" else []
    assert said.get("params", []) == [*stage.settings, *code]


def test_dvc_yaml_names_no_file_of_the_package():
    assert not [dep for stage in DVC.values() for dep in stage.get("do", stage).get("deps", []) if dep.startswith("ldm/")]


def test_stages_load_where_the_orchestration_is_absent(tmp_path):
    """The training core starts on a machine that has none of the orchestration installed."""
    for name in ("prefect", "dvc", "mlflow", "webdataset"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')")
    code = f"import {', '.join(f'ldm.stages.{stage}' for stage in NAMES)}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_reads_the_settings_that_it_declares_and_no_others(name):
    """Every `settings.a.b` of the stage's own module (others get values, never the settings) lies in one of its settings."""
    tree, stage = ast.parse((ROOT / f"ldm/stages/{name}.py").read_text()), declared(name)
    chains = {ast.unparse(node).removeprefix("settings.") for node in ast.walk(tree) if isinstance(node, ast.Attribute)
              and ast.unparse(node).startswith("settings.")}  # fmt: skip
    if "training(root, STAGE, settings" in ast.unparse(tree):  # which reads these
        chains |= {"precision", "compile"}
    read = {chain for chain in chains if not any(other.startswith(chain + ".") for other in chains)}
    assert {chain for chain in read if not any(f"{chain}.".startswith(f"{key}.") for key in stage.settings)} == set()
    assert {key for key in stage.settings if not any(f"{chain}.".startswith(f"{key}.") for chain in read)} == set()
    assert stage.params(load_settings(ROOT)).keys() == set(stage.settings)
