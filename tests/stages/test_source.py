"""The stage `source`: what `data.source` names comes to data/raw/source, also from a hub that runs here."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data_sets import COMMIT, TEXT, contents, encoded, rows, save, table_of
from hub import Hub, serving
from tiny import REPOSITORY, environment, set_params

OTHER = "f" * 40
DIGITS = {"kind": "digits"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches for this test alone."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))


def named(dataset: str) -> dict[str, str]:
    return {"kind": "huggingface", "dataset": dataset}


def run_stage(root: Path, source: dict[str, str], **extra: str) -> subprocess.CompletedProcess[str]:
    """The stage, in a folder that holds no more of the project than the settings."""
    root.mkdir(exist_ok=True)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, root)
    set_params(root, {"data": {"source": source}})
    command, home = [sys.executable, "-m", "ldm.stages.source"], {"HF_HOME": os.environ["HF_HOME"]}
    return subprocess.run(command, cwd=root, env=environment(**home | extra), capture_output=True, text=True, timeout=60)


def test_digits(tmp_path):
    result = run_stage(tmp_path / "project", DIGITS)
    assert result.stdout == "source: digits\nsource: 1797 images written to data/raw/source\n", result.stderr
    assert len(contents(tmp_path / "project/data/raw/source")) == 1797 + 2


def test_a_local_data_set(tmp_path):
    save(tmp_path / "project/my/photos", TEXT, train=rows(3, text=str))
    result = run_stage(tmp_path / "project", named("my/photos"))
    assert (result.stdout.splitlines()[-1], result.stderr) == ("source: 3 images written to data/raw/source", "")
    assert [line["text"] for line in table_of(tmp_path / "project/data/raw/source")] == ["0", "1", "2"]


def test_without_the_package_only_its_sources_are_refused(tmp_path):
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/datasets.py").write_text("raise ImportError('No module named datasets')")
    absent = {"PYTHONPATH": str(tmp_path / "absent")}
    assert run_stage(tmp_path / "project", DIGITS, **absent).returncode == 0
    before = contents(tmp_path / "project/data")
    result = run_stage(tmp_path / "project", named(f"me/tiny@{COMMIT}"), **absent)
    assert result.returncode == 2 and "written" not in result.stdout
    assert result.stderr.startswith("error: data.source.dataset") and result.stderr.count("\n") == 1
    assert "pip install 'ldm-pipeline[huggingface]'" in result.stderr
    assert contents(tmp_path / "project/data") == before


class DataSets(Hub):
    """As much of the hub's API as `datasets` asks for: one data set, `me/tiny`, at one commit."""

    def do_GET(self) -> None:
        api, resolve = "/api/datasets/me/tiny", f"/datasets/me/tiny/resolve/{COMMIT}/"
        path = self.path.split("?")[0]
        name = path.removeprefix(resolve)
        if path == f"{api}/revision/{COMMIT}":
            self.answer(json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": [], "tags": []}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            self.answer_tree()
        elif name in self.files:
            self.answer(self.files[name], ETag=f'"{name}"', X_Repo_Commit=COMMIT)
        else:
            entry, repo = path.startswith((resolve, api)), "me/tiny" in path
            self.answer(None, X_Error_Code="EntryNotFound" if entry else "RevisionNotFound" if repo else "RepoNotFound")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """`hub(files, dataset)` runs the stage where those files are all that the hub has."""
    with serving(DataSets) as served:

        def run(files: dict[str, bytes], dataset: str, **extra: str) -> subprocess.CompletedProcess[str]:
            DataSets.files = files
            return run_stage(tmp_path / "project", named(dataset), **served | extra)

        yield run


def parquet(folder: Path, members: list[dict[str, Any]]) -> dict[str, bytes]:
    """The files at the root of a data set of the hub."""
    blobs = contents(save(folder, TEXT, train=members))
    return {Path(name).name: blob for name, blob in blobs.items()}


def test_the_hub_is_read_at_its_commit_and_no_other(tmp_path, hub):
    members = rows(3, text=lambda i: f"tiny {i}")
    files = parquet(tmp_path / "tiny", members)
    (tmp_path / "project/me/tiny").mkdir(parents=True)  # a folder of that name is not what NAME@COMMIT means
    result = hub(files, f"me/tiny@{COMMIT}")
    assert (result.stdout.splitlines()[-1], result.stderr) == ("source: 3 images written to data/raw/source", "")
    out = tmp_path / "project/data/raw/source"
    before = contents(out)
    assert [line["text"] for line in table_of(out)] == ["tiny 0", "tiny 1", "tiny 2"]
    assert [before[f"train/{i:08d}.png"] for i in range(3)] == [row["image"]["bytes"] for row in members]
    for dataset, offline, words in (
        (f"me/tiny@{OTHER}", "0", f"Revision '{OTHER}' doesn't exist"),
        # Here `datasets` alone would take the commit that its cache has.
        (f"me/tiny@{OTHER}", "1", f"does not answer, and the latest copy in the cache is of commit {COMMIT}"),
        (f"me/tiny:large@{COMMIT}", "0", "'large' not found. Available: ['default']"),
        (f"me/small@{COMMIT}", "0", "'me/small' doesn't exist on the Hub"),
    ):
        result = hub(files, dataset, HF_HUB_OFFLINE=offline)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith(f"error: data.source.dataset '{dataset}'") and words in result.stderr
        assert contents(out) == before
    result = hub({}, f"me/tiny@{COMMIT}", HF_HUB_OFFLINE="1")  # the cache has just this commit
    assert result.returncode == 0 and contents(out) == before


def test_files_of_this_machine_are_no_part_of_a_commit(tmp_path, hub):
    (tmp_path / "secret.png").write_bytes(encoded(1))
    members = rows(1, text=str, image=lambda i: {"path": str(tmp_path / "secret.png")})
    result = hub(parquet(tmp_path / "tiny", members), f"me/tiny@{COMMIT}")
    assert result.returncode == 2 and "secret.png, which is not in the data set" in result.stderr
    assert list((tmp_path / "project/data/raw").iterdir()) == []


def test_an_image_folder_of_the_hub(tmp_path, hub):
    files = {"a.png": encoded(0), "b.jpg": encoded(1, "JPEG"), "metadata.csv": b"file_name,text\nb.jpg,bee\na.png,ant\n"}
    result = hub(files, f"me/tiny@{COMMIT}")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "project/data/raw/source"
    assert {line["text"]: (out / line["file_name"]).read_bytes() for line in table_of(out)} == {
        "ant": files["a.png"],
        "bee": files["b.jpg"],
    }
