"""The command line without a model: help, settings, and refusals that need none."""

import fcntl
import os
import resource
import shutil
import subprocess
import sys

import pytest
import yaml
from tiny import REPOSITORY, refused
from typer.testing import CliRunner

import ldm.cli
from ldm.base.errors import InputError
from ldm.base.options import keys
from ldm.cli import app
from ldm.commands.shared import table
from ldm.config import load_settings
from ldm.diffusion.options import Sampling

COMMANDS = (
    "run",
    "sample",
    "interpolate",
    "autoencoder sample",
    "autoencoder reconstruct",
    "autoencoder traverse",
    "checkpoints list",
    "checkpoints adopt",
    "checkpoints drop",
    "data check",
    "data stats",
    "data drift",
    "data ingest",
    "data purge",
    "registry list",
    "registry show",
    "registry register",
    "registry promote",
    "registry rollback",
)
HEAVY = ("torch", "mlflow", "prefect", "dvc", "pandas", "numpy", "scipy", "sklearn", "matplotlib", "transformers", "PIL")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_each_command(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0 and len(result.output.splitlines()) > 5


@pytest.mark.parametrize("command", ["sample", "interpolate"])
def test_help_names_every_sampling_setting(command):
    """From the schema: with the kinds of a choice, the values of a field and whose an option is."""
    output = CliRunner(env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"}).invoke(app, [command, "--help"]).output
    shown = " ".join(output.replace("│", " ").split())
    assert all(key.name in shown for key in keys(Sampling))
    assert "sampler.kind (ddim, ddpm, euler, dpmpp_2m, heun, langevin)" in shown
    assert "sampler.churn (of heun)" in shown and "schedule (karras, exponential, uniform)" in shown


def run_python(code: str, **options) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **options).stdout


@pytest.mark.parametrize(("arguments", "more"), [(["--help"], ["pydantic", "yaml"]), (["sample", "--help"], [])])
def test_help_does_not_wait_for_torch_or_mlflow(arguments, more):
    code = f"import sys, ldm.cli; ldm.cli.app({arguments}, standalone_mode=False); print(sorted(sys.modules))"
    assert {name for name in (*HEAVY, *more) if f"'{name}'" in run_python(code)} == set()


def test_help_takes_a_moment():
    """In CPU time, so that a busy machine does not matter; about 0.2 s, with torch it would be 1.5."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_python("import ldm.cli; ldm.cli.app(['--help'])")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.4


def test_a_model_that_is_not_there_is_refused_before_torch_is_imported(tmp_path):
    arguments = ["sample", "--prompt", "x", "--model", "no/such/folder", "--out", "x.png"]
    done = refused(arguments, tmp_path)
    assert done.stdout.startswith("no/such/folder: holds no model.json") and done.stdout.endswith("False\n")
    assert done.stderr == "loading no/such/folder …\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["sample", "--prompt", "x", "--out", "missing/folder/x.png"], "--out missing/folder/x.png: the folder missing/folder"),
        (["sample", "--prompt", "x", "--out", "x.jpg"], "x.jpg"),
        (["sample", "--prompt", "x", "--model", "no/such/folder", "--out", "x.png"], "no/such/folder"),
        (["interpolate", __file__, "a prompt", "--out", "x.png"], "two images or two prompts"),
        (["interpolate", "gone.png", "a prompt", "--out", "x.png"], "gone.png: no such file"),
        (["data", "stats", "--sheet", "missing/folder/x.png"], "--sheet missing/folder/x.png: the folder missing/folder"),
        (["checkpoints", "list"], "no dvc.yaml and params.yaml here or above"),
    ),
)
def test_refusals_name_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_picture(tmp_path, monkeypatch):
    (tmp_path / "x.png").mkdir()
    result = CliRunner().invoke(app, ["sample", "--prompt", "x", "--out", str(tmp_path / "x.png")])
    assert isinstance(result.exception, InputError) and "x.png: is a folder; give a file name" in str(result.exception)


OUTS = {  # what is at the place "out", and what is said of it
    "a file": ("plain", "plain: is a file; write a .png, or a new folder"),
    "a used folder": ("used", "used: is not empty, 0001.png is there; give a new folder, or an empty one"),
    "a link to nothing": ("dangling.png", "dangling.png: is a link to nothing"),
    "a link to nothing, no suffix": ("dangling", "dangling: is a link to nothing"),
    "below a file": ("plain/x.png", "plain/x.png: the folder plain does not exist"),
    "below a file, deeper": ("plain/below/x", "plain/below/x: the folder plain/below does not exist"),
    "a device": ("/dev/null", "/dev/null: is neither a file nor a folder"),
    "a device as a picture": ("pipe.png", "pipe.png: is neither a file nor a folder"),
    "nothing": ("", "--out .: give the name of a .png, or of a folder"),
    "the root": ("/", "--out /: give the name"),
    "another suffix": ("x.jpeg", "x.jpeg: write a .png, or a folder"),
    "too long": ("x" * 300 + ".png", "File name too long; give another place"),
    "a loop": ("loop", "loop: "),
    "no place for files": ("/proc/x.png", "/proc/x.png: No such file or directory; give another place"),
}


@pytest.mark.parametrize("case", OUTS)
@pytest.mark.parametrize(
    "command",
    [("sample", "--prompt", "x"), ("interpolate", "x", "y"), ("autoencoder", "sample"), ("autoencoder", "traverse", "a.png")],
    ids=lambda command: " ".join(command[:2]),
)
def test_where_no_pictures_can_go_is_said_first(command, case, tmp_path, monkeypatch):
    """Without a model: there is none."""
    monkeypatch.chdir(tmp_path)
    out, message = OUTS[case]
    (tmp_path / "plain").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/0001.png").write_text("of another prompt")
    os.symlink("gone.png", tmp_path / "dangling.png")
    os.symlink("gone", tmp_path / "dangling")
    os.symlink("loop", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.png")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, [*command, "--out", out])
    assert isinstance(result.exception, InputError) and message in str(result.exception), result.exception
    assert "\n" not in str(result.exception) and sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "plain").read_text() == "mine"


@pytest.mark.parametrize("out", ["folder/x.png", "folder/x", "folder", "mine.png"])
def test_a_place_without_permission_is_said_first(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.png").write_text("a picture")
    for path, mode in ((tmp_path / "folder", 0o555), (tmp_path / "mine.png", 0o444)):
        path.chmod(mode)
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        result = CliRunner().invoke(app, ["sample", "--prompt", "x", "--out", out])
    finally:
        os.seteuid(user)
    assert isinstance(result.exception, InputError) and f"--out {out}: Permission denied; give another" in str(result.exception)


@pytest.mark.parametrize("sheet", ["sheet", "sheet.jpg", ""])
def test_a_contact_sheet_is_a_picture(sheet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["data", "stats", "--sheet", sheet])
    assert isinstance(result.exception, InputError) and ".png" in str(result.exception) and "folder" not in str(result.exception)


# Settings


@pytest.fixture
def started(tmp_path, monkeypatch) -> list[list[str]]:
    """A folder with settings, in which the flow is not started; its command lines instead."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    commands: list[list[str]] = []
    monkeypatch.setattr(ldm.cli.os, "execv", lambda _, command: commands.append(command[1:]))
    return commands


def test_a_run_first_changes_settings(started, tmp_path):
    before = (tmp_path / "params.yaml").read_text()
    arguments = ["--set", "train_unet.lr=1e-3", "--set", "sampling.sampler.churn=3", "--set", "sampling.sampler.kind=heun"]
    result = CliRunner().invoke(app, ["run", *arguments], catch_exceptions=False)
    assert result.exit_code == 0 and started == [["-m", "flows.run"]]
    assert result.output.splitlines()[0] == "params.yaml: train_unet.lr: 0.002, now 0.001"
    assert all(line.startswith("params.yaml: sampling.sampler") for line in result.output.splitlines()[1:])
    text = (tmp_path / "params.yaml").read_text()
    assert yaml.safe_load(text)["sampling"]["sampler"] == {"kind": "heun", "churn": 3}
    assert load_settings(tmp_path).train_unet.lr == 1e-3
    changed = [(a, b) for a, b in zip(before.splitlines(), text.splitlines(), strict=True) if a != b]
    assert len(changed) == 2 and all(a.partition("#")[2] == b.partition("#")[2] for a, b in changed)  # comments are kept


def test_a_run_under_settings_that_are_not_valid_does_not_start(started, tmp_path):
    before = (tmp_path / "params.yaml").read_text()
    result = CliRunner().invoke(app, ["run", "--set", "train_unet.lr=1e-3", "--set", "train_unet.lrr=1"])
    assert isinstance(result.exception, InputError) and "did you mean train_unet.lr?" in str(result.exception)
    assert not started and (tmp_path / "params.yaml").read_text() == before


def test_settings_stay_while_a_run_is_under_way(started, tmp_path):
    before = (tmp_path / "params.yaml").read_text()
    (tmp_path / ".ldm").mkdir()
    with (tmp_path / ".ldm/pipeline.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = CliRunner().invoke(app, ["run", "--set", "train_unet.lr=1e-3"])
    assert isinstance(result.exception, InputError) and "runs the pipeline here" in str(result.exception)
    assert not started and (tmp_path / "params.yaml").read_text() == before


def test_a_run_ingests_a_folder_named_from_where_it_is_called(started, tmp_path):
    CliRunner().invoke(app, ["run", "--ingest", "inbox"], catch_exceptions=False)
    assert started == [["-m", "flows.run", "--ingest", str(tmp_path / "below/inbox")]]


def test_a_table_has_aligned_columns(capsys):
    table([{"version": "10", "aliases": "champion"}, {"version": "9", "aliases": ""}])
    assert capsys.readouterr().out == "version  aliases\n10       champion\n9\n"
