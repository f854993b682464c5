"""The command line without a model: help, and refusals that need none."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ldm.base.errors import InputError
from ldm.cli import app

COMMANDS = (
    "run",
    "sample",
    "interpolate",
    "autoencoder sample",
    "autoencoder reconstruct",
    "autoencoder traverse",
    "data check",
    "data stats",
    "data ingest",
    "data purge",
    "registry list",
    "registry show",
    "registry register",
    "registry promote",
    "registry rollback",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_each_command(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0 and len(result.output.splitlines()) > 5


def test_help_does_not_wait_for_torch_or_mlflow():
    code = "import sys, ldm.cli; ldm.cli.app(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not any(f"'{name}'" in output for name in ("torch", "mlflow", "prefect", "dvc", "pandas"))


def test_a_model_that_is_not_there_is_refused_before_torch_is_imported(tmp_path):
    arguments = ["sample", "--prompt", "x", "--model", "no/such/folder", "--out", "x.png"]
    code = f"""
import sys, ldm.cli
try:
    ldm.cli.app({arguments}, standalone_mode=False)
except ldm.cli.InputError as error:
    print(error, 'torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no/such/folder: holds no model.json") and done.stdout.endswith("False\n")
    assert done.stderr == "loading no/such/folder …\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["sample", "--prompt", "x", "--out", "missing/folder/x.png"], "missing/folder"),
        (["sample", "--prompt", "x", "--out", "x.jpg"], "x.jpg"),
        (["sample", "--prompt", "x", "--model", "no/such/folder", "--out", "x.png"], "no/such/folder"),
        (["interpolate", __file__, "a prompt", "--out", "x.png"], "two images or two prompts"),
    ),
)
def test_refusals_name_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert not list(tmp_path.iterdir())
