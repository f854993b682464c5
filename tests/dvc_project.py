"""A small DVC project with the shape of the real one, whose stages take no time: the fixture `project`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import REPOSITORY

DVC_YAML = """
stages:
  evaluate:
    cmd: python stage.py evaluate
    deps: [models/ldm, data/shards]
    outs: [reports/report.html, reports/bounds.csv, reports/metrics.csv]
    metrics: [reports/metrics.json: {cache: false}]
  shard:
    cmd: python stage.py shard
    deps: [knob.txt]
    outs: [data/shards]
  train_unet:
    cmd: python stage.py train_unet
    deps: [data/shards]
    outs: [models/ldm]
  after:
    cmd: python stage.py after
    deps: [reports/bounds.csv]
    outs: [after.txt]
  aside:
    cmd: python stage.py aside
    deps: [data/shards]
    outs: [aside.txt]
"""

STAGE = """
import json, os, pathlib, sys, tarfile, threading, time
import yaml

def watch():  # what the real stages do: see ldm/stages/stage.py
    while os.read(0, 1): pass
    os._exit(130)

if os.environ.get("LDM_OWNER_PIPE"):
    threading.Thread(target=watch, daemon=True).start()
name = sys.argv[1]
pathlib.Path(f"{name}.pid").write_text(str(os.getpid()))
print(f"{name} starts")
knob = pathlib.Path("knob.txt").read_text().split()
if knob[0] == name:  # how this stage misbehaves: "NAME sleep", "NAME wait", "NAME exit CODE", "NAME once"
    if knob[1] == "sleep":
        time.sleep(600)
    if knob[1] == "wait":  # until somebody deletes the file
        pathlib.Path("waits").touch()
        while pathlib.Path("waits").exists():
            time.sleep(0.1)
    if knob[1] == "exit" or (knob[1] == "once" and not pathlib.Path("tried").exists()):
        pathlib.Path("tried").touch()
        print(f"error: {name} cannot", file=sys.stderr)
        sys.exit(int(knob[2]) if knob[1] == "exit" else 1)
for folder in ("data/shards", "models/ldm", "reports/plots"):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
if name == "shard":
    pathlib.Path("data/shards/index.json").write_text(json.dumps({"splits": {"train": [0, 2], "test": [2, 4]}, "knob": knob}))
    pathlib.Path("seven.txt").write_text("a handwritten seven")
    with tarfile.open("data/shards/train-00000.tar", "w") as tar:
        tar.add("seven.txt")
if name == "train_unet":
    sampling = yaml.safe_load(pathlib.Path("params.yaml").read_text())["sampling"]
    pathlib.Path("models/ldm/model.json").write_text(json.dumps({"sampling": sampling, "knob": knob}))
if name == "evaluate":
    pathlib.Path("reports/report.html").write_text("<p>fine</p>")
    pathlib.Path("reports/bounds.csv").write_text("key,nats\\na,-1.5\\nb,-2.5\\n")
    pathlib.Path("reports/metrics.json").write_text(json.dumps({
        "bits_per_dim": 1.25, "bits_per_dim_se": 0.0123, "made_up": 0.975, "test_images": 2, "image": "32x32x1, lanczos"}))
    pathlib.Path("reports/metrics.csv").write_text(
        "name,value,error,unit,title,reading,note,headline\\n"
        'bits_per_dim,1.25,0.0123,bits/dim,bits/dim,lower is better,"2 test images of 32x32x1, lanczos",True\\n'
        "made_up,0.975,,share,something new,higher is better,,True\\n")
if name in ("aside", "after"):
    pathlib.Path(f"{name}.txt").write_text("")
"""


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "project"
    folder.mkdir()
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "stage.py").write_text(STAGE)
    (folder / "knob.txt").write_text("none")
    shutil.copy(REPOSITORY / "params.yaml", folder)
    (folder / "data/raw/source").mkdir(parents=True)  # the data.path of those settings
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=folder, check=True)
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's folder, with nothing run yet and no tracking address set."""
    for name in ("MLFLOW_TRACKING_URI", "LDM_PARENT_RUN", "LDM_STAGE_TIMEOUT", "LDM_STAGE_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "true")
    return Path(shutil.copytree(template, tmp_path / "project", symlinks=True))
