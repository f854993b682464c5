"""`ldm data check` finds every planted damage; `ldm data stats` counts what pandas counts."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from image_folders import OPTIONS, make_folder, numbered
from PIL import Image

from ldm.base.errors import InputError
from ldm.base.files import file_hash
from ldm.data.inspect import TILE, check_shards, inspect
from ldm.data.reader import open_shards
from ldm.data.shards import write_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    make_folder(tmp_path / "source", numbered(40) + numbered(10, "b"))
    write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)
    return tmp_path / "shards"


def test_sound_shards_have_no_problems(shards: Path) -> None:
    assert list(check_shards(shards)) == []


def altered(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("seed", range(8))
def test_any_altered_byte_is_found(seed: int, shards: Path) -> None:
    random = np.random.default_rng(seed)
    path = random.choice([path for path in sorted(shards.iterdir()) if path.name not in ("index.json", "duplicates.csv")])
    altered(path, 128 if path.suffix == ".npy" else int(random.integers(path.stat().st_size)))
    assert any(str(path) in problem for problem in check_shards(shards))


@pytest.mark.parametrize("name", ["index.json", "offsets.npy"])
def test_whatever_becomes_of_an_index_is_a_problem_or_one_error(name: str, shards: Path) -> None:
    random, sound = np.random.default_rng(0), (shards / name).read_bytes()
    for _ in range(120):
        blob = bytearray(sound)
        if random.random() < 0.3:
            del blob[random.integers(len(blob)) :]
        for place in random.integers(0, max(1, min(len(blob), 300)), 3):
            blob[place : place + 1] = random.bytes(1)
        (shards / name).write_bytes(blob)
        try:
            problems = list(check_shards(shards))
        except InputError as error:
            problems = [str(error)]
        assert problems or name == "index.json"  # which may say another thing about how images were made


def test_each_kind_of_damage_is_named(shards: Path) -> None:
    tars = sorted(shards.glob("*.tar"))
    tars[0].unlink()
    os.truncate(tars[1], 3000)
    (shards / "stray.tar").write_bytes(b"")
    index = json.loads((shards / "index.json").read_text())
    index["shards"][2]["count"] += 1
    (shards / "index.json").write_text(json.dumps(index))
    problems = "\n".join(check_shards(shards))
    for words in (
        f"{tars[0]}: missing",
        f"{tars[1]}: 3000 bytes, the index says",
        "stray.tar: not in the index",
        "the index says",
    ):
        assert words in problems


def test_offsets_that_point_elsewhere_are_found(shards: Path) -> None:
    offsets = np.load(shards / "offsets.npy")
    offsets[5, 1] += 512
    np.save(shards / "offsets.npy", offsets)
    assert any("its sha256 is not that of the index" in problem for problem in check_shards(shards))
    index = json.loads((shards / "index.json").read_text())
    index["files"]["offsets.npy"]["sha256"] = file_hash(shards / "offsets.npy")
    (shards / "index.json").write_text(json.dumps(index))
    problems = list(check_shards(shards))
    assert any("where offsets.npy has the image of sample 5" in problem for problem in problems)


def test_stats_of_a_folder_and_of_its_shards(shards: Path) -> None:
    (shards.parent / "source/007.png").write_bytes(b"damaged")
    found = inspect(shards.parent / "source")
    assert len(found.images) == 49 and found.unreadable.file_name.tolist() == ["007.png"]
    assert (found.images.width == 8).all() and found.images.bytes.sum() == sum(
        path.stat().st_size
        for path in (shards.parent / "source").rglob("*.png")
        if path.name != "007.png" or path.parent.name == "b"
    )
    summary = dict(found.summary())
    assert (
        summary["images"] == "49"
        and summary["unreadable"] == "1"
        and summary["captions"].startswith("50 from tables; 5 distinct, 0 empty")
    )
    assert found.sheet.shape == (48, 3, TILE, TILE)

    found = inspect(shards)
    counts = {split: len(open_shards(shards, split)) for split in ("train", "val", "test")}
    assert found.images.split.value_counts().to_dict() == counts
    assert dict(found.summary())["images"] == f"50 ({', '.join(f'{n} {split}' for split, n in counts.items())})"
    assert found.images.text.str.len().eq(len("caption 0 ä")).all() and "11 to 11, median 11" in dict(found.summary())["captions"]


def test_the_commands(shards: Path, shell, ldm, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = ldm(tmp_path, "data", "check", str(shards))
    assert (done.returncode, done.stderr) == (0, "") and "is as the index says" in done.stdout
    done = ldm(tmp_path, "data", "stats", str(shards), "--sheet", "sheet.png")
    assert done.returncode == 0 and "median" in done.stdout
    assert Image.open(tmp_path / "sheet.png").width > 8 * TILE
    done = ldm(shards.parent / "source", "data", "stats", ".")
    assert done.returncode == 2 and "contact_sheet.png: lies in" in done.stderr
    altered(sorted(shards.glob("*.tar"))[0], 600)
    done = shell(tmp_path, "ldm", "data", "check", str(shards))
    assert done.returncode == 1 and "sha256" in done.stdout and "dvc repro --force shard" in done.stderr
    done = ldm(tmp_path, "data", "check", "nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere: no such folder" in done.stderr
    done = ldm(tmp_path, "data", "stats", "nowhere")
    assert done.returncode == 2 and "nowhere: no such folder" in done.stderr


def test_stats_show_labels_and_reasons(tmp_path: Path) -> None:
    make_folder(tmp_path, numbered(30))
    table = pd.read_csv(tmp_path / "metadata.csv")
    table.assign(label=["cat"] * 20 + ["dog"] * 10).to_csv(tmp_path / "metadata.csv", index=False)
    for number in range(3):
        (tmp_path / f"00{number}.png").write_bytes(b"")
    found = inspect(tmp_path).summary()
    summary = dict(found)
    assert summary["labels"] == "2: cat 17, dog 10" and summary["unreadable"] == "3" and "the file is empty" in summary.values()
