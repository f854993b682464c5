"""The whole pipeline as its users run it: real DVC, Prefect and MLflow, in clones, at tiny settings."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pytest
import yaml
from blobs import run_stages
from dvc.dependency.param import ParamsDependency
from dvc.stage import Stage
from PIL import Image
from tiny import REPOSITORY, TINY, clone, set_params

from ldm.collection.places import place_of
from ldm.stages.fingerprint import counted
from ldm.stages.stage import NAMES
from ldm.versioning.repository import open_repository

STAGES = NAMES[:-1]  # the last is optional
END = "that was one"
ALL_STAGES = f"""
import contextlib, importlib, pathlib, sys
for name in {STAGES}:
    with contextlib.redirect_stderr(sys.stdout):
        importlib.import_module(f"ldm.stages.{{name}}").run(pathlib.Path.cwd())
    print("{END}")
"""
UNREACHABLE = "http://127.0.0.1:9"  # the discard port: nothing answers there


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> dict[str, str]:
    """A home of Prefect's, whose database takes seconds to make."""
    return {"PREFECT_HOME": str(tmp_path_factory.mktemp("home") / "prefect")}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, shell, home) -> tuple[Path, str]:
    """A clone after its first `ldm run`, and what that printed."""
    root = clone(tmp_path_factory.mktemp("first") / "project")
    set_params(root, TINY)
    return root, succeed(shell(root, "ldm", "run", **home))


@pytest.fixture
def ran(first_run) -> Path:
    return first_run[0]


def test_metrics_hold_what_the_issue_asks_for(ran):
    metrics = json.loads((ran / "reports/metrics.json").read_text())
    frame = pd.read_csv(ran / "reports/bounds.csv")
    assert metrics["nats"] == pytest.approx(frame.nats.mean())
    assert metrics["bits_per_dim"] == pytest.approx(-metrics["nats"] / (32 * 32 * np.log(2)))
    assert metrics["nats"] == pytest.approx(metrics["reconstruction_nats"] + metrics["entropy_nats"] + metrics["prior_nats"])
    assert metrics["image"] == "32x32x1, lanczos"
    assert {"psnr", "fd", "fd_floor", "prompt_accuracy", "unseen_prompt_accuracy", "variance_ratio"} <= metrics.keys()
    assert metrics["classifier_accuracy"] > 0.97  # it is trained on real images, whatever the model is like


def test_every_file_of_a_project_is_at_a_place_that_purge_knows(ran):
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ran, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [path.relative_to(ran) for path in ran.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert [
        str(path) for path in files if str(path) not in tracked and not place_of(path, PurePosixPath("data/raw/source"))
    ] == []
    assert {"mlruns", "reports", "models"} <= {path.parts[0] for path in files}


def test_the_stages_alone_make_the_same_files_elsewhere(ran, tmp_path, shell):
    """In a clone that lies elsewhere, cannot import Prefect or DVC, and whose tracking server does not answer."""
    for name in ("dvc", "dvc_data", "prefect"):
        (tmp_path / f"absent/{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"absent/{name}.py").write_text(f"raise ImportError('{name} is not installed')")
    root = clone(tmp_path / "somewhere/else")
    set_params(root, TINY)
    absent = {"PYTHONPATH": str(tmp_path / "absent"), "MLFLOW_TRACKING_URI": UNREACHABLE}
    *printed, _ = succeed(shell(root, "python", "-c", ALL_STAGES, **absent)).split(f"{END}\n")
    for stage, text in zip(STAGES, printed, strict=True):
        assert stage == "code" or "goes on without tracking" in text
    for name in ("reports/metrics.json", "reports/samples.png", "reports/report.html"):
        assert (root / name).read_bytes() == (ran / name).read_bytes(), name
    succeed(shell(root, "dvc", "commit", "--force"))  # every file's hash, as a run by DVC records it
    assert (root / "dvc.lock").read_bytes() == (ran / "dvc.lock").read_bytes()
    assert "up to date" in succeed(shell(root, "dvc", "status"))


# what a change makes run


@pytest.fixture
def again(ran, tmp_path, shell):
    """A copy of the finished project, and a function that runs `dvc repro` and names the stages whose commands ran."""
    root = Path(shutil.copytree(ran, tmp_path / "again", symlinks=True))

    def run() -> list[str]:
        return re.findall(r"^Running stage '(\w+)':", succeed(shell(root, "dvc", "repro")), re.M)

    return root, run


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_comments_and_docstrings_run_nothing_and_neither_do_tools(ran, tmp_path, shell, home):
    root = Path(shutil.copytree(ran, tmp_path / "again", symlinks=True))
    for path in (*(root / "ldm").rglob("*.py"), *(root / "flows").rglob("*.py")):
        text = path.read_text()
        assert text.startswith('"""'), path
        path.write_text(text.replace('"""', '"""Edited. ', 1) + "\n# a comment\n")
    names = ("cli", "base/progress", "evaluation/gate", "versioning/repository")
    for name in (*names, "registry/versions", "registry/tracking", "registry/lineage"):
        append(root / f"ldm/{name}.py", "\n_EDITED = True\n")
    printed = succeed(shell(root, "ldm", "run", **home))
    assert re.findall(r"^(\w+) +executed", printed, re.M) == ["code"] and "registered before" in printed


def test_a_changed_sampler_is_evaluated_and_a_changed_source_trains_nothing_again_unless_its_images_changed(again):
    root, run = again
    append(root / "ldm/data/sources/digits.py", "\n_EDITED = True\n")
    path = root / "ldm/diffusion/samplers/dpmpp_2m.py"
    text = path.read_text()
    assert "x = estimate + " in text
    path.write_text(text.replace("x = estimate + ", "x = 0.9 * estimate + "))
    before = (root / "reports/samples.png").read_bytes()
    assert run() == ["code", "source", "evaluate"]
    assert (root / "reports/samples.png").read_bytes() != before and run() == []


@pytest.mark.soak  # tests/stages/test_fingerprint.py says for every module which stages it makes run
def test_a_changed_unet_is_trained_and_what_follows(again):
    root, run = again
    append(root / "ldm/nets/unet.py", "\n_EDITED = True\n")
    assert run() == ["code", "pretrained", "train_unet", "evaluate"]  # the first may fetch such a network


def test_a_project_elsewhere_runs_the_installed_package(tmp_path, shell):
    """It has no folder `ldm`: the stage `code` looks at the package each time, and what it finds decides as in a checkout."""
    text = (REPOSITORY / "dvc.yaml").read_text()
    deps = re.search(r"^    deps: \[ldm\].*$", text, re.M)
    assert deps
    (tmp_path / "dvc.yaml").write_text(text.replace(deps[0], "    always_changed: true"))
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    succeed(shell(tmp_path, "dvc", "init", "--no-scm", "--quiet"))
    for expected in (["code", "pretrained"], ["code"]):
        printed = succeed(shell(tmp_path, "dvc", "repro", "pretrained"))
        assert re.findall(r"^Running stage '(\w+)':", printed, re.M) == expected


def matrix(title: str) -> dict[str, list[str]]:
    """A table of the stages' README: its rows' names in code, and the stages that are marked."""
    readme = (REPOSITORY / "ldm/stages/README.md").read_text()
    head, _, *rows = re.search(rf"\| {title} \|.*?\n\n", readme, re.S)[0].strip().splitlines()
    stages = [cell.strip() for cell in head.strip("|").split("|")][1:]
    assert tuple(stages) == NAMES[1:]
    found = {}
    for row in rows:
        names, *marks = (cell.strip() for cell in row.strip("|").split("|"))
        found |= {
            name: [stage for stage, mark in zip(stages, marks, strict=True) if mark] for name in re.findall(r"`([^`]+)`", names)
        }
    return found


def test_the_readme_says_which_stages_every_module_makes_run():
    rows = matrix("changed code, in `ldm/`")
    folders = [row for row in rows if row.endswith("/")]  # all of their modules
    modules = {str(path.relative_to(REPOSITORY / "ldm").with_suffix("")): path for path in (REPOSITORY / "ldm").rglob("*.py")}
    real = {name: [stage for stage in NAMES[1:] if f"ldm.{name.replace('/', '.')}" in counted(stage)]
            for name, path in modules.items() if path.name != "__init__.py"}  # fmt: skip
    said = {name: rows.get(name, rows.get(next((f for f in folders if name.startswith(f)), ""))) for name in real}
    assert said == real
    assert all(row in real or any(name.startswith(row) for name in real) for row in rows)


def test_the_readme_says_which_stages_every_setting_makes_run(ran, tmp_path, shell):
    """Each key of params.yaml is changed in turn, and DVC asked."""
    root = Path(shutil.copytree(ran, tmp_path / "settings", symlinks=True))
    said, path = matrix("changed in `params.yaml`"), root / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["sample_posterior"] = ["sgld"]
    path.write_text(yaml.safe_dump(values))

    def changed(key: str = "") -> set[str]:
        """Where dvc.yaml has no `${key}`, a setting is nothing but a parameter of stages, and the rest is not asked for."""
        with open_repository(root) as repo, repo.lock:
            stages = [stage for stage in repo.index.stages if stage.cmd]
            whole = not key or f"${{{key}}}" in (root / "dvc.yaml").read_text()
            found = [stage for stage in stages if (stage.changed() if whole else any(dep.status() for dep in parameters(stage)))]
            return {stage.name.partition("@")[0] for stage in found}

    def parameters(stage: Stage) -> list[ParamsDependency]:
        return [dep for dep in stage.deps if isinstance(dep, ParamsDependency)]

    assert changed() == {"sample_posterior"}  # it never ran
    for name in ("models/posterior/sgld/a", "reports/posterior/sgld/a", "reports/posterior/sgld.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    succeed(shell(root, "dvc", "commit", "--force", "sample_posterior@sgld"))
    assert changed() == set()
    keys = list(leaves(values))
    for key in keys:
        edited = yaml.safe_load(yaml.safe_dump(values))
        *sections, last = key.split(".")
        place = edited
        for section in sections:
            place = place[section]
        place[last] = ["sgld", "sghmc"] if key == "sample_posterior" else "another"
        path.write_text(yaml.safe_dump(edited))
        if key == "data.path":
            (root / "another").mkdir()
        assert changed(key) == set(said[max((row for row in said if f"{key}.".startswith(f"{row}.")), key=len)]), key
    assert all(any(f"{key}.".startswith(f"{row}.") for key in keys) for row in said)


def leaves(values: dict, prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]


def test_run_registers_once_and_then_has_nothing_to_do(first_run, home, shell, ldm, tmp_path):
    ran, printed = first_run
    assert "models:/ldm/1 (new)" in printed and "promoted: no champion yet" in printed
    assert re.findall(r"^(\w+) +executed", printed, re.M) == [*STAGES, "register", "gate"]
    again = succeed(shell(ran, "ldm", "run", **home))
    assert "models:/ldm/1 (registered before)" in again and "executed" not in again
    listed = succeed(shell(ran, "ldm", "registry", "list"))
    assert len(listed.strip().splitlines()) == 2 and "challenger, champion" in listed
    tags = succeed(ldm(ran, "registry", "show"))
    lock = hashlib.sha256((ran / "dvc.lock").read_bytes()).hexdigest()
    index = hashlib.sha256((ran / "data/shards/index.json").read_bytes()).hexdigest()
    assert lock in tags and index in tags

    out = ran / "sheet.png"
    prompt = "a handwritten seven"
    succeed(shell(ran, "ldm", "sample", "--prompt", prompt, "-n", "3", "--seed", "5", "--out", str(out)))
    once = out.read_bytes()
    succeed(ldm(ran, "sample", "--prompt", prompt, "-n", "3", "--seed", "5", "--out", str(out)))
    assert out.read_bytes() == once
    succeed(ldm(ran, "sample", "--prompt", prompt, "-n", "3", "--seed", "6", "--out", str(out)))
    assert out.read_bytes() != once

    code = (
        "import mlflow.pyfunc, pandas, sys\n"
        "model = mlflow.pyfunc.load_model('models:/ldm@champion')\n"
        "png = model.predict(pandas.DataFrame({'prompt': ['a handwritten seven']}))['png'][0]\n"
        "again = model.predict(pandas.DataFrame({'prompt': ['a handwritten seven']}))['png'][0]\n"
        "assert png == again\n"
        "open(sys.argv[1], 'wb').write(png)\n"
    )
    png = tmp_path / "seven.png"
    succeed(shell(ran, sys.executable, "-c", code, str(png)))  # a plain MLflow user: no variable set
    assert Image.open(io.BytesIO(png.read_bytes())).size == (32, 32)

    walk = succeed(ldm(ran, "interpolate", prompt, "a handwritten one", "-n", "4", "--out", str(tmp_path / "walk")))
    assert "4 images" in walk and len(list((tmp_path / "walk").glob("*.png"))) == 4
    a, b = (str(ran / f"data/raw/source/{n:04d}.png") for n in (0, 1))
    succeed(ldm(ran, "interpolate", a, b, "--out", str(tmp_path / "images.png")))


def colour_folder(folder: Path, count: int) -> None:
    """JPEGs of unequal sizes: gradients between two colours, captioned by the first; no labels."""
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir(parents=True)
    rows = []
    for i in range(count):
        height, width = rng.integers(20, 90, 2)
        colours = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
        name = sorted(colours)[i % 3]
        ramp = np.linspace(0, 1, width)[None, :, None]
        pixels = np.array(colours[name]) * (1 - ramp) + rng.integers(0, 255, 3) * ramp
        Image.fromarray(np.broadcast_to(pixels, (height, width, 3)).astype(np.uint8)).save(folder / f"photos/{i:03d}.jpg")
        rows.append({"file_name": f"photos/{i:03d}.jpg", "text": f"a {name} gradient", "photographer": "nobody"})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)


def test_a_users_own_folder_needs_no_code_change(project, shell):
    colour_folder(project / "my/folder", 90)
    set_params(project, {"data": {"path": "my/folder", "channels": 3}})
    needed = set(re.findall(r'"(\w+)"', succeed(shell(project, "dvc", "dag", "--dot", "evaluate"))))
    assert needed == set(STAGES) - {"source"}
    run_stages(project, *(stage for stage in STAGES if stage in needed))
    succeed(shell(project, "dvc", "commit", "--force", "--with-deps", "evaluate"))  # fails where an out is missing
    assert "up to date" in succeed(shell(project, "dvc", "status", "--with-deps", "evaluate"))
    metrics = json.loads((project / "reports/metrics.json").read_text())
    assert metrics["image"] == "32x32x3, lanczos" and "prompt_accuracy" not in metrics
    assert not (project / "data/raw/source").exists()


BAD = {
    "unknown key": ({"train_vae": {"learning_rate": 1.0}}, None, "train_vae.learning_rate"),
    "mistyped key": ({"evaluate": {"sampels": 3}}, None, "did you mean evaluate.samples?"),
    "wrong value": ({"diffusion": {"kind": "epsilon"}}, None, "diffusion.kind"),
    "missing folder": ({"data": {"path": "my/folder"}}, None, "my/folder"),
    "empty folder": ({"data": {"path": "my/folder"}}, "empty", "holds no images"),
    "captions of missing images": ({"data": {"path": "my/folder"}}, "dangling", "gone.jpg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, project, shell, home):
    changes, folder, expected = BAD[case]
    set_params(project, changes)
    if folder:
        (project / "my/folder").mkdir(parents=True)
    if folder == "dangling":
        colour_folder(project / "my/folder", 6)
        with (project / "my/folder/metadata.csv").open("a") as file:
            file.write("photos/gone.jpg,a gone gradient,nobody\n")
    # One case goes through Prefect and DVC, two stop before; the others are run as the stage that would find them.
    alone = case in ("unknown key", "wrong value", "empty folder")
    result = shell(project, *(("python", "-m", "ldm.stages.shard") if alone else ("ldm", "run")), **home)
    output = result.stdout + result.stderr
    assert result.returncode == 2, output
    assert expected in output and "Traceback" not in output
    assert output.count("error:") == 1, output
    assert not (project / "data/shards").exists() and not list((project / "data").glob("*.partial"))


@pytest.mark.parametrize(
    "command", (["sample", "--prompt", "x", "--out", "x.png"], ["registry", "show"], ["registry", "rollback"])
)
def test_a_registry_without_champion_says_so(command, project, shell):
    result = shell(project, "ldm", *command)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error:") and "ldm run" in result.stderr
    assert not (project / "x.png").exists() and not (project / "mlflow.db").exists()
