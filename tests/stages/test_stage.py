"""What dvc.yaml says of a stage is what its module reads and writes."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldm.base import paths
from ldm.base.paths import CODE
from ldm.config import load_settings
from ldm.stages.stage import NAMES, stage_params

ROOT = Path(__file__).parents[2]
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def test_dvc_yaml_has_every_stage_in_its_order_and_can_be_read():
    assert tuple(DVC) == NAMES
    assert {path.stem for path in (ROOT / "ldm/stages").glob("*.py") if "\ndef run(root: Path" in path.read_text()} == set(NAMES)
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 140


@pytest.mark.parametrize("name", NAMES)
def test_dvc_yaml_names_the_paths_of_a_stage_and_no_others(name):
    """Those of `ldm.base.paths` that its module names, and the shards where it opens them."""
    said, item, text = DVC[name], "", (ROOT / f"ldm/stages/{name}.py").read_text()
    if "foreach" in said:
        assert said.keys() == {"foreach", "do"} and said["foreach"] == f"${{{name}}}"
        said, item = said["do"], " ${item}"
    assert said["cmd"] == f"python -m ldm.stages.{name}{item}"
    listed = [entry for kind in ("deps", "outs", "metrics", "plots") for entry in said.get(kind, [])]
    found = {str(next(iter(entry)) if isinstance(entry, dict) else entry) for entry in listed} - {"ldm", "${data.path}"}
    names = {alias.name for node in ast.parse(text).body if isinstance(node, ast.ImportFrom) and node.module == "ldm.base.paths"
             for alias in node.names} | {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)
                                         and ast.unparse(node.value) == "paths"}  # fmt: skip
    own = {getattr(paths, constant) for constant in names} | ({paths.SHARDS} if "stage_shards(" in text else set())
    assert {path.partition("/${item}")[0] for path in found} == {
        path for path in own if not path.startswith(".ldm/") or name == "code"
    }
    if name != "code":
        assert said["params"][-1] == {CODE: [name]}
        assert all(isinstance(key, str) for key in said["params"][:-1])


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
    tree = ast.parse((ROOT / f"ldm/stages/{name}.py").read_text())
    keys = stage_params(ROOT, name, load_settings(ROOT)).keys() if name != "code" else set()
    chains = {ast.unparse(node).removeprefix("settings.") for node in ast.walk(tree) if isinstance(node, ast.Attribute)
              and ast.unparse(node).startswith("settings.")}  # fmt: skip
    if "training(root, '" in ast.unparse(tree):  # which reads these
        chains |= {"precision", "compile"}
    read = {chain for chain in chains if not any(other.startswith(chain + ".") for other in chains)}
    assert {chain for chain in read if not any(f"{chain}.".startswith(f"{key}.") for key in keys)} == set()
    assert {key for key in keys if not any(f"{chain}.".startswith(f"{key}.") for chain in read)} == set()
