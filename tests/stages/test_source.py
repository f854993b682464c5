"""data/raw/source: scikit-learn's digits, and what the package `datasets` opens, on a disk or from a hub that runs here."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hub import Hub, serving
from PIL import Image
from sklearn.datasets import load_digits
from tiny import REPOSITORY, environment, set_params

from ldm.base.errors import InputError
from ldm.data import open_shards, write_shards
from ldm.data.huggingface import write_huggingface

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "BMP": "bmp", "TIFF": "tiff", "GIF": "gif"}
PICTURE = datasets.Image()
STRING, NAMES = Value("string"), ClassLabel(names=["cat", "dog"])


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this test alone: for child processes by the environment, for this one as it is too late for that."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home/datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "home/datasets/downloads")
    datasets.disable_progress_bars()


def encoded(number: int, kind: str = "PNG") -> bytes:
    """A file of noise."""
    file, noise = io.BytesIO(), np.random.default_rng(number).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    more = {"save_all": True, "append_images": [Image.fromarray(noise[1])]} if kind == "MPO" else {}
    Image.fromarray(noise[0]).save(file, kind, **more)
    return file.getvalue()


def rows(count: int, **columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    image = {"image": lambda i: {"bytes": encoded(i), "path": None}}
    return [{name: value(i) for name, value in (image | columns).items()} for i in range(count)]


def save(folder: Path, features: dict[str, Any], **splits: list[dict[str, Any]]) -> Path:
    """A local data set: a parquet file for each split."""
    (folder / "data").mkdir(parents=True)
    for split, members in splits.items():
        table = Dataset.from_list(members, features=Features(features))
        # Not `to_parquet`, which would put the contents of files in the place of their names.
        pq.write_table(table.data.table, folder / f"data/{split}-00000-of-00001.parquet")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n")[:-1]]


def run_stage(root: Path, source: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """The stage, in a folder that holds no more of the project than the settings."""
    root.mkdir(exist_ok=True)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(REPOSITORY / name, root)
    set_params(root, {"data": {"source": source}})
    command, home = [sys.executable, "-m", "ldm.stages.source"], {"HF_HOME": os.environ["HF_HOME"]}
    return subprocess.run(command, cwd=root, env=environment(**home | extra), capture_output=True, text=True, timeout=60)


def test_digits_are_scikit_learns(tmp_path):
    result = run_stage(tmp_path / "project", "digits")
    assert result.stdout == "source: 1797 images written to data/raw/source\n", result.stderr
    out, digits = tmp_path / "project/data/raw/source", load_digits()
    table = pd.read_csv(out / "metadata.csv")
    words = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    assert list(table.label) == list(words[digits.target])
    assert all(
        word in text or str(digit) in text for word, digit, text in zip(table.label, digits.target, table.text, strict=True)
    )
    for name, scan in zip(table.file_name, digits.images, strict=True):
        file = io.BytesIO()
        Image.fromarray((scan * 255 / 16).round().astype(np.uint8)).save(file, "PNG")
        assert (out / name).read_bytes() == file.getvalue()
    prompts = pd.read_csv(out / "prompts.csv")
    assert set(prompts.label) == set(words) and not set(prompts.text) & set(table.text)
    assert len(contents(out)) == 1797 + 2


COLUMNS = {
    "image": PICTURE,
    "caption": List(STRING),
    "kind": NAMES,
    "file_name": STRING,  # a name that metadata.jsonl needs for itself
    "width": Value("int32"),
    "score": Value("float64"),
    "is_drawn": Value("bool"),
    "boxes": List(Value("float32")),
    "taken": Value("timestamp[s]"),
}


def photos(count: int, first: int) -> list[dict[str, Any]]:
    def image(i: int) -> dict[str, Any] | None:
        blob = b"" if i == first + 8 else b"no image" if i == first + 9 else encoded(i, list(SUFFIXES)[i % len(SUFFIXES)])
        return None if i == first + 7 else {"bytes": blob, "path": f"{i}.tif"}

    return [
        {
            "image": image(i),
            "caption": [f"photo {i}, “schön”\n\u2028", "second caption"],
            "kind": i % 2,
            "file_name": f"DSC{i}.tif",
            "width": None if i == first else 2 * i,
            "score": [0.1, float("nan"), float("inf")][i % 3],
            "is_drawn": i % 2 == 0,
            "boxes": [1.0],
            "taken": i,
        }
        for i in range(first, first + count)
    ]


def test_a_data_set_keeps_bytes_captions_labels_and_scalars(tmp_path):
    splits = {"train": photos(60, 0), "test": photos(20, 100)}
    save(tmp_path / "project/my/photos", COLUMNS, **splits)
    result = run_stage(tmp_path / "project", "huggingface:my/photos")
    assert result.stdout.splitlines()[-1] == "source: 80 images written to data/raw/source", result.stderr
    assert result.stderr == ""
    out = tmp_path / "project/data/raw/source"
    written = table_of(out)
    for (split, number), line in zip([("test", i) for i in range(20)] + [("train", i) for i in range(60)], written, strict=True):
        row = splits[split][number]
        blob = row["image"]["bytes"] if row["image"] else b""
        kind = list(SUFFIXES)[int(row["file_name"][3:-4]) % len(SUFFIXES)] if blob not in (b"", b"no image") else "PNG"
        assert line == {
            "file_name": f"{split}/{number:08d}.{SUFFIXES[kind]}",
            "text": row["caption"][0],
            "label": ("cat", "dog")[row["kind"]],
            "source_file_name": row["file_name"],
            "width": row["width"],
            "score": row["score"] if row["score"] == 0.1 else None,
            "is_drawn": row["is_drawn"],
        }
        assert (out / line["file_name"]).read_bytes() == blob
    assert len(contents(out)) == len(written) + 1

    options: dict[str, Any] = {
        "image_size": 8,
        "channels": 3,
        "resize_filter": "lanczos",
        "shard_size": 50,
        "max_bad_fraction": 0.1,
    }
    index = write_shards(out, tmp_path / "shards", val_fraction=0.3, test_fraction=0.3, **options)
    assert index["found"] == 80
    counts = {split: stop - start for split, (start, stop) in index["splits"].items()}
    assert sum(counts.values()) == 80 - 6  # no image, an empty file and none that anyone knows, in both splits
    captions = open_shards(tmp_path / "shards", "train").captions
    assert set(captions.text) <= {line["text"] for line in written} and set(captions.label) == {"cat", "dog"}


def test_an_image_folder(tmp_path):
    names = [f"{split}/{kind}/{i}.png" for split in ("train", "test") for kind in ("elk", "owl") for i in range(2)]
    files = {name: encoded(i) for i, name in enumerate(names)}
    for name, blob in files.items():
        (tmp_path / "zoo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "zoo" / name).write_bytes(blob)
    assert write_huggingface(f"huggingface:{tmp_path / 'zoo'}", tmp_path, tmp_path / "out") == 8
    written = table_of(tmp_path / "out")
    assert [line["text"] for line in written] == [line["label"] for line in written] == ["elk", "elk", "owl", "owl"] * 2
    assert [(tmp_path / "out" / line["file_name"]).read_bytes() for line in written] == [files[n] for n in sorted(names)]
    (tmp_path / "zoo/train/owl/0.png").write_bytes(encoded(99))  # the cache of `datasets` must not answer for the folder
    (tmp_path / "zoo/train/owl/2.png").write_bytes(encoded(100))
    assert write_huggingface("huggingface:zoo", tmp_path, tmp_path / "out") == 9
    assert encoded(99) in contents(tmp_path / "out").values()


def test_a_local_data_set_may_name_its_files(tmp_path):
    save(tmp_path / "named", {"image": PICTURE, "text": STRING}, train=rows(2, image=lambda i: {"path": f"{i}.jpg"}, text=str))
    for i in range(2):
        (tmp_path / f"named/{i}.jpg").write_bytes(encoded(i, "JPEG"))
    write_huggingface("huggingface:named", tmp_path, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == {"train/00000000.jpg", "train/00000001.jpg", "metadata.jsonl"}
    assert (tmp_path / "out/train/00000001.jpg").read_bytes() == encoded(1, "JPEG")


def test_two_runs_in_different_places_write_the_same_bytes(tmp_path, monkeypatch):
    save(tmp_path / "here/photos", COLUMNS, train=photos(12, 0), test=photos(12, 100))
    shutil.copytree(tmp_path / "here/photos", tmp_path / "there/deeper/copy")
    write_huggingface("huggingface:photos", tmp_path / "here", tmp_path / "here/out")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another cache")
    write_huggingface("huggingface:deeper/copy", tmp_path / "there", tmp_path / "there/out")
    assert contents(tmp_path / "here/out") == contents(tmp_path / "there/out")


CHOICES = {
    "text before caption": ({"caption": STRING, "text": STRING}, {"text": "text 0", "caption": "caption 0"}),
    "the only column of strings": ({"title": STRING, "size": Value("int8")}, {"text": "title 0", "size": 0}),
    "names of the only classes": (
        {"a": STRING, "b": STRING, "kind": NAMES},
        {"text": "cat", "label": "cat", "a": "a 0", "b": "b 0"},
    ),
    "two columns of classes": ({"text": STRING, "k": NAMES, "l": NAMES}, {"text": "text 0", "k": "cat", "l": "cat"}),
    "a label that is no class": ({"text": STRING, "label": Value("int8")}, {"text": "text 0", "label": 0}),
    "text that is no string": ({"text": Value("int8"), "caption": STRING}, {"text": "caption 0", "source_text": 0}),
}


@pytest.mark.parametrize("case", CHOICES)
def test_which_columns_are_read(case, tmp_path):
    features, expected = CHOICES[case]
    values = {n: (lambda i, n=n: f"{n} {i}") if f == STRING else (lambda i: i) for n, f in features.items()}
    save(tmp_path / "it", {"image": PICTURE, **features}, train=rows(2, **values))
    write_huggingface("huggingface:it", tmp_path, tmp_path / "out")
    assert table_of(tmp_path / "out")[0] == {"file_name": "train/00000000.png", **expected}


TEXT = {"image": PICTURE, "text": STRING}
REFUSED: dict[str, tuple[str, dict[str, Any] | None, dict[str, Callable[[int], Any]], list[str]]] = {
    "a name alone": ("huggingface:me/tiny", None, {}, ["me/tiny'", "no such folder", "NAME@COMMIT", "40 hex", "which data"]),
    "a branch": ("huggingface:me/tiny@main", None, {}, ["NAME@COMMIT", "or a branch, would not say which data"]),
    "a short commit": ("huggingface:me/tiny@0123456", None, {}, ["40 hex digits of a commit"]),
    "no such folder": ("huggingface:not/here/at/all", None, {}, ["not/here/at/all", "no such folder"]),
    "an empty folder": ("huggingface:empty", None, {}, ["huggingface:empty", "EmptyDatasetError"]),
    "no network": (f"huggingface:me/tiny@{COMMIT}", None, {}, ["me/tiny", "ConnectionError", "Couldn't reach"]),
    "a damaged file": ("huggingface:damaged", None, {}, ["huggingface:damaged", "Parquet magic bytes"]),
    "files that differ": ("huggingface:unlike", None, {}, ["huggingface:unlike", "column names don't match"]),
    "an unknown configuration": ("huggingface:it:large", TEXT, {"text": str}, ["'large' not found", "default"]),
    "no image column": ("huggingface:it", {"image": STRING, "n": Value("int8")}, {"image": str, "n": int},
                        ["expected one column of images, found 0", "image (string), n (int8)"]),
    "two image columns": ("huggingface:it", {**TEXT, "mask": PICTURE}, {"text": str, "mask": lambda i: None},
                          ["found 2", "image (Image), text (string), mask (Image)"]),
    "two for captions": ("huggingface:it", {"image": PICTURE, "a": STRING, "b": List(STRING)}, {"a": str, "b": lambda i: []},
                         ["which column holds the captions?", "a (string), b (list of string)"]),
    "no captions": ("huggingface:it", {"image": PICTURE, "n": Value("int8")}, {"n": int}, ["captions?", "n (int8)"]),
    "two columns of classes": ("huggingface:it", {"image": PICTURE, "k": NAMES, "l": NAMES}, {"k": lambda i: 0, "l": lambda i: 0},
                               ["captions?", "k (ClassLabel), l (ClassLabel)"]),
    "a row without caption": ("huggingface:it", TEXT, {"text": lambda i: None if i == 2 else "x"},
                              ["split train, row 2: column 'text' is empty", "every image needs its text"]),
    "a row with a list of none": ("huggingface:it", {"image": PICTURE, "caption": List(STRING)}, {"caption": lambda i: ["x"][i:]},
                                  ["split train, row 1: column 'caption' is empty"]),
    "a hidden class": ("huggingface:it", {**TEXT, "kind": NAMES}, {"text": str, "kind": lambda i: -1 if i == 1 else 0},
                       ["split train, row 1: column 'kind' is empty", "needs its label"]),
    "a file that is gone": ("huggingface:it", TEXT, {"text": str, "image": lambda i: {"path": f"gone/{i}.png"}},
                            ["split train, row 0", "gone/0.png", "No such file"]),
    "a file elsewhere on the net": ("huggingface:it", TEXT, {"text": str, "image": lambda i: {"path": "https://example.org/a.png"}},
                                    ["split train, row 0", "https:/example.org/a.png", "cannot be read"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case, tmp_path, monkeypatch):
    source, features, columns, words = REFUSED[case]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for folder, names in {"empty": [], "damaged": ["train.parquet"], "unlike": ["train/0.jsonl", "train/1.jsonl"]}.items():
        (tmp_path / folder / "train").mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).write_text(json.dumps({f"column of {name}": 1}))
    if features is not None:
        save(tmp_path / "it", features, train=rows(3, **columns))
    (tmp_path / "raw/source").mkdir(parents=True)
    (tmp_path / "raw/source/before.txt").write_text("as it was")
    with pytest.raises(InputError) as refusal:
        write_huggingface(source, tmp_path, tmp_path / "raw/source")
    message = str(refusal.value)
    assert message.startswith(f"data.source '{source}'") and "\n" not in message
    assert [word for word in words if word not in message] == [], message
    assert contents(tmp_path / "raw") == {"source/before.txt": b"as it was"} and len(list((tmp_path / "raw").iterdir())) == 1


def test_without_the_package_only_its_sources_are_refused(tmp_path):
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent/datasets.py").write_text("raise ImportError('No module named datasets')")
    absent = {"PYTHONPATH": str(tmp_path / "absent")}
    assert run_stage(tmp_path / "project", "digits", **absent).returncode == 0
    before = contents(tmp_path / "project/data")
    result = run_stage(tmp_path / "project", f"huggingface:me/tiny@{COMMIT}", **absent)
    assert result.returncode == 2 and "written" not in result.stdout
    assert result.stderr.startswith("error: data.source") and result.stderr.count("\n") == 1
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
    """`hub(files, source)` runs the stage where those files are all that the hub has."""
    with serving(DataSets) as served:

        def run(files: dict[str, bytes], source: str, **extra: str) -> subprocess.CompletedProcess[str]:
            DataSets.files = files
            return run_stage(tmp_path / "project", source, **served | extra)

        yield run


def parquet(folder: Path, members: list[dict[str, Any]]) -> dict[str, bytes]:
    """The files at the root of a data set of the hub."""
    blobs = contents(save(folder, TEXT, train=members))
    return {Path(name).name: blob for name, blob in blobs.items()}


def test_the_hub_is_read_at_its_commit_and_no_other(tmp_path, hub):
    members = rows(3, text=lambda i: f"tiny {i}")
    files = parquet(tmp_path / "tiny", members)
    (tmp_path / "project/me/tiny").mkdir(parents=True)  # a folder of that name is not what NAME@COMMIT means
    result = hub(files, f"huggingface:me/tiny@{COMMIT}")
    assert (result.stdout.splitlines()[-1], result.stderr) == ("source: 3 images written to data/raw/source", "")
    out = tmp_path / "project/data/raw/source"
    before = contents(out)
    assert [line["text"] for line in table_of(out)] == ["tiny 0", "tiny 1", "tiny 2"]
    assert [before[f"train/{i:08d}.png"] for i in range(3)] == [row["image"]["bytes"] for row in members]
    for source, offline, words in (
        (f"huggingface:me/tiny@{OTHER}", "0", f"Revision '{OTHER}' doesn't exist"),
        # Here `datasets` alone would take the commit that its cache has.
        (f"huggingface:me/tiny@{OTHER}", "1", f"does not answer, and the latest copy in the cache is of commit {COMMIT}"),
        (f"huggingface:me/tiny:large@{COMMIT}", "0", "'large' not found. Available: ['default']"),
        (f"huggingface:me/small@{COMMIT}", "0", "'me/small' doesn't exist on the Hub"),
    ):
        result = hub(files, source, HF_HUB_OFFLINE=offline)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith(f"error: data.source '{source}'") and words in result.stderr
        assert contents(out) == before
    result = hub({}, f"huggingface:me/tiny@{COMMIT}", HF_HUB_OFFLINE="1")  # the cache has just this commit
    assert result.returncode == 0 and contents(out) == before


def test_files_of_this_machine_are_no_part_of_a_commit(tmp_path, hub):
    (tmp_path / "secret.png").write_bytes(encoded(1))
    members = rows(1, text=str, image=lambda i: {"path": str(tmp_path / "secret.png")})
    result = hub(parquet(tmp_path / "tiny", members), f"huggingface:me/tiny@{COMMIT}")
    assert result.returncode == 2 and "secret.png, which is not in the data set" in result.stderr
    assert list((tmp_path / "project/data/raw").iterdir()) == []


def test_an_image_folder_of_the_hub(tmp_path, hub):
    files = {"a.png": encoded(0), "b.jpg": encoded(1, "JPEG"), "metadata.csv": b"file_name,text\nb.jpg,bee\na.png,ant\n"}
    result = hub(files, f"huggingface:me/tiny@{COMMIT}")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "project/data/raw/source"
    assert {line["text"]: (out / line["file_name"]).read_bytes() for line in table_of(out)} == {
        "ant": files["a.png"],
        "bee": files["b.jpg"],
    }
