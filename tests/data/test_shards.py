"""Shards: what went in comes out, by our reader, webdataset's and tarfile; same bytes on a second run; nothing half-written."""

import hashlib
import io
import json
import os
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import webdataset
from PIL import Image
from tiny import with_soak

from ldm.data import images
from ldm.data.shards import SPLITS, open_shards, split_of, write_shards
from ldm.errors import InputError

SIZE = 8
OPTIONS: dict[str, Any] = {
    "image_size": SIZE,
    "channels": 3,
    "resize_filter": "lanczos",
    "val_fraction": 0.2,
    "test_fraction": 0.3,
    "shard_size": 7,
    "max_bad_fraction": 0.2,
}


def make_folder(folder: Path, names: list[str], seed: int = 0) -> dict[str, np.ndarray]:
    """Noise images of the shards' own size under `names`, with captions; returns their pixels (C, H, W)."""
    random, pixels, rows = np.random.default_rng(seed), {}, []
    for number, name in enumerate(names):
        pixels[name] = random.integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[name].transpose(1, 2, 0)).save(folder / name)
        rows.append({"file_name": name, "text": f"caption {number % 5} ä", "label": str(number)})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return pixels


def numbered(count: int, top: str = "") -> list[str]:
    return [f"{top}{'/' if top else ''}{i:03d}.png" for i in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def members(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path, "r:") as tar:
        return tar.getmembers()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_folder(tmp_path / "source", numbered(40))
    return tmp_path / "source"


# what went in comes out


def test_the_reader_gives_every_image_with_its_caption(tmp_path: Path) -> None:
    pixels = make_folder(tmp_path / "source", numbered(40) + numbered(10, "a folder, ü"))
    table = pd.read_csv(tmp_path / "source/metadata.csv", dtype=str).set_index("file_name")
    index = write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)
    seen = []
    for split in SPLITS:
        reader = open_shards(tmp_path / "shards", split)
        assert len(reader) == index["splits"][split][1] - index["splits"][split][0] > 0
        batch = reader.images(np.arange(len(reader))[::-1])
        for i in range(len(reader)):
            sample = reader[i]
            name = sample.meta["file_name"]
            assert np.array_equal(sample.image, pixels[name])
            assert np.array_equal(batch[len(reader) - 1 - i], pixels[name])
            assert (sample.text, sample.meta["label"]) == tuple(table.loc[name, ["text", "label"]])
            assert reader.captions.loc[i].to_dict() == {"key": sample.key, "text": sample.text, **sample.meta}
            seen.append((sample.key, name))
    assert sorted(name for _, name in seen) == sorted(pixels)
    assert len({key for key, _ in seen}) == len(pixels)


def test_webdatasets_own_reader_gives_the_same(source: Path, tmp_path: Path) -> None:
    index = write_shards(source, tmp_path / "shards", **OPTIONS)
    for split in SPLITS:
        reader = open_shards(tmp_path / "shards", split)
        urls = [str(tmp_path / "shards" / shard["name"]) for shard in index["shards"] if shard["split"] == split]
        theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert len(theirs) == len(reader)
        for ours, sample in zip((reader[i] for i in range(len(reader))), theirs, strict=True):
            assert sample["__key__"] == ours.key
            assert sample["txt"].decode() == ours.text
            assert json.loads(sample["json"]) == ours.meta
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), ours.image.transpose(1, 2, 0))


def test_the_index_says_what_tarfile_and_hashlib_say(source: Path, tmp_path: Path) -> None:
    index = write_shards(source, tmp_path / "shards", **OPTIONS)
    assert index == json.loads((tmp_path / "shards/index.json").read_text())
    offsets, row = np.load(tmp_path / "shards/offsets.npy"), 0
    for number, shard in enumerate(index["shards"]):
        path = tmp_path / "shards" / shard["name"]
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert shard["bytes"] == path.stat().st_size
        found = members(path)
        assert all((m.mtime, m.uid, m.gid, m.uname, m.gname) == (0, 0, 0, "", "") for m in found)
        assert len(found) == 3 * shard["count"] <= 3 * OPTIONS["shard_size"]
        for start in range(0, len(found), 3):
            by_part = {member.name.split(".")[1]: member for member in found[start : start + 3]}
            places = [n for part in ("png", "txt", "json") for n in (by_part[part].offset_data, by_part[part].size)]
            assert offsets[row].tolist() == [number, *places]
            row += 1
    assert row == len(offsets)
    assert sorted(contents(tmp_path / "shards")) == sorted([s["name"] for s in index["shards"]] + ["index.json", "offsets.npy"])


def test_shard_positions_cut_a_split_at_its_shards(source: Path, tmp_path: Path) -> None:
    index = write_shards(source, tmp_path / "shards", **OPTIONS)
    for split in SPLITS:
        reader = open_shards(tmp_path / "shards", split)
        parts = reader.shard_positions()
        assert [shard for shard, _ in parts] == [shard for shard in index["shards"] if shard["split"] == split]
        assert [i for _, positions in parts for i in positions] == list(range(len(reader)))
        for shard, positions in parts:
            keys = {member.name.split(".")[0] for member in members(tmp_path / "shards" / shard["name"])}
            assert {reader[i].key for i in positions} == keys


def test_images_are_scaled_and_greyed_as_asked(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", numbered(30))
    write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS | {"image_size": 4, "channels": 1, "resize_filter": "box"})
    sample = open_shards(tmp_path / "shards", "train")[0]
    rgb = np.asarray(Image.open(tmp_path / "source" / sample.meta["file_name"]), dtype=np.float64)
    blocks = (rgb @ [0.299, 0.587, 0.114]).reshape(4, 2, 4, 2).mean(axis=(1, 3))
    assert sample.image.shape == (1, 4, 4)
    assert np.abs(sample.image[0] - blocks).max() <= 1.6


def test_a_column_named_key_does_not_replace_the_samples(source: Path, tmp_path: Path) -> None:
    table = pd.read_csv(source / "metadata.csv", dtype=str)
    table.assign(key="mine").to_csv(source / "metadata.csv", index=False)
    write_shards(source, tmp_path / "shards", **OPTIONS)
    reader = open_shards(tmp_path / "shards")
    assert reader.captions.key.tolist() == [reader[i].key for i in range(len(reader))]
    assert reader[0].meta["key"] == "mine"


def test_prompts_travel_with_the_shards(source: Path, tmp_path: Path) -> None:
    write_shards(source, tmp_path / "without", **OPTIONS)
    assert open_shards(tmp_path / "without").prompts.columns.tolist() == ["text", "label"]
    (source / "prompts.csv").write_text("text,label\nan unseen 7,7\n")
    write_shards(source, tmp_path / "with", **OPTIONS)
    assert open_shards(tmp_path / "with").prompts.to_dict("records") == [{"text": "an unseen 7", "label": "7"}]


# splits


def test_the_split_is_the_hash_as_a_fraction_of_its_range() -> None:
    for number in range(2000):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        position = int(digest, 16) / 2**256
        expected = "test" if position < 0.2 else "val" if position < 0.3 else "train"
        assert split_of(digest, 0.1, 0.2) == expected


def test_equal_files_share_a_split_and_keep_their_own_keys(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", numbered(30) + numbered(30, "copy"))
    for name in numbered(30):
        (tmp_path / "source/copy" / name).write_bytes((tmp_path / "source" / name).read_bytes())
    write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)
    keys = set()
    for split in SPLITS:
        captions = open_shards(tmp_path / "shards", split).captions
        keys |= set(captions.key)
        copies = captions.file_name.str.startswith("copy/")
        assert set(captions.file_name[copies].str.removeprefix("copy/")) == set(captions.file_name[~copies])
    assert len(keys) == 60


def test_growth_moves_no_image_and_a_new_folder_changes_no_shard(tmp_path: Path) -> None:
    first, second = numbered(40, "monday"), numbered(40, "tuesday")
    make_folder(tmp_path / "source", first)
    before = write_shards(tmp_path / "source", tmp_path / "before", **OPTIONS)
    make_folder(tmp_path / "source", first + second)  # the same seed: monday's pixels stay
    after = write_shards(tmp_path / "source", tmp_path / "after", **OPTIONS)
    old = {name: blob for name, blob in contents(tmp_path / "before").items() if name.endswith(".tar")}
    assert len(old) == len(before["shards"]) < len(after["shards"])
    assert all((tmp_path / "after" / name).read_bytes() == blob for name, blob in old.items())
    for shard in after["shards"]:
        tops = set()
        with tarfile.open(tmp_path / "after" / shard["name"]) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    tops.add(json.load(tar.extractfile(member))["file_name"].split("/")[0])  # type: ignore[arg-type]
        assert len(tops) == 1


# the same bytes, or nothing


def test_a_second_run_elsewhere_and_later_gives_the_same_bytes(tmp_path: Path) -> None:
    for number, place in enumerate(("here", "there")):
        names = numbered(40) + numbered(5, "more")
        make_folder(tmp_path / place, names)
        for name in names[:: 1 if number else -1]:  # written in another order, at another time
            blob = (tmp_path / place / name).read_bytes()
            (tmp_path / place / name).unlink()
            (tmp_path / place / name).write_bytes(b"no image at all" if name in ("003.png", "more/001.png") else blob)
            os.utime(tmp_path / place / name, (number * 1e9, number * 1e9))
        (tmp_path / place / "007.png").write_bytes(b"")
        write_shards(tmp_path / place, tmp_path / f"{place}-shards", **OPTIONS)
    assert contents(tmp_path / "here-shards") == contents(tmp_path / "there-shards")


def test_unreadable_images_are_listed_and_everything_is_accounted_for(source: Path, tmp_path: Path) -> None:
    good = (source / "000.png").read_bytes()
    planted = {"001.png": b"", "002.png": b"hello", "003.png": good[: len(good) // 2], "004.png": None}
    for name, blob in planted.items():
        (source / name).unlink()
        if blob is None:
            (source / name).symlink_to(tmp_path / "nowhere")
        else:
            (source / name).write_bytes(blob)
    index = write_shards(source, tmp_path / "shards", **OPTIONS)
    assert {bad["file_name"] for bad in index["quarantined"]} == set(planted)
    assert all(bad["reason"] and str(tmp_path) not in bad["reason"] for bad in index["quarantined"])
    kept = {name for split in SPLITS for name in open_shards(tmp_path / "shards", split).captions.file_name}
    assert kept | set(planted) == set(numbered(40))
    assert len(kept) + len(planted) == index["found"] == 40


def too_many_bad(source: Path) -> None:
    for name in numbered(9):
        (source / name).write_bytes(b"hello")


def no_test_images(source: Path) -> None:
    for name in numbered(40)[3:]:
        (source / name).unlink()
    table = pd.read_csv(source / "metadata.csv", dtype=str)
    table[:3].to_csv(source / "metadata.csv", index=False)


FAILURES = {
    "too many unreadable": (too_many_bad, ["9 of 40", "data.max_bad_fraction 0.2", "'000.png'"]),
    "an empty split": (no_test_images, ["3 images leave fewer than 2", "split", "data.val_fraction"]),
    "prompts without labels": (lambda source: (source / "prompts.csv").write_text("text\nx\n"), ["prompts.csv", "found text"]),
    "prompts of no label": (lambda source: (source / "prompts.csv").write_text("text,label\nx,zzz\n"), ["prompts.csv", "'zzz'"]),
    "prompts that are no table": (lambda source: (source / "prompts.csv").write_text(""), ["prompts.csv", "not readable"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_a_refused_folder_leaves_the_shards_as_they_were(case: str, source: Path, tmp_path: Path) -> None:
    write_shards(source, tmp_path / "shards", **OPTIONS)
    before = contents(tmp_path / "shards")
    plant, expected = FAILURES[case]
    plant(source)
    with pytest.raises(InputError) as error:
        write_shards(source, tmp_path / "shards", **OPTIONS)
    assert str(source) in str(error.value)
    for words in expected:
        assert words in str(error.value)
    assert contents(tmp_path / "shards") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "source"]


@pytest.mark.parametrize("seed", with_soak(3, 20))
def test_killed_in_the_middle_of_writing_and_run_again(seed: int, source: Path, tmp_path: Path) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "shards"
    index = write_shards(source, undisturbed, **OPTIONS)
    moment = int(np.random.default_rng(seed).integers(1, 30))  # images encoded before the kill
    reached, writes = os.pipe()
    child = os.fork()
    if child == 0:  # the child slows down at each image and says so; only the parent ends it
        try:
            to_png = images.to_png
            images.to_png = lambda image: (os.write(writes, b"."), time.sleep(0.02), to_png(image))[2]
            write_shards(source, out, **OPTIONS)
        finally:
            os._exit(1)
    os.close(writes)
    for _ in range(moment):
        assert os.read(reached, 1) == b"."
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(reached)
    partial = contents(tmp_path / "shards.partial")
    assert 0 < len(partial) <= len(index["shards"]) and "index.json" not in partial  # it was writing
    with pytest.raises(InputError, match="run the `shard` stage"):
        open_shards(out)
    write_shards(source, out, **OPTIONS)
    assert contents(out) == contents(undisturbed)
    assert not (tmp_path / "shards.partial").exists()


# damage and absence are named


def test_absent_shards_and_splits_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shards/index\.json: not found; run the `shard` stage"):
        open_shards(tmp_path / "shards")
    write_shards(source, tmp_path / "shards", **OPTIONS)
    with pytest.raises(InputError, match=r"no split 'validation'; found .*val"):
        open_shards(tmp_path / "shards", "validation")


@pytest.mark.parametrize("damage", ["removed", "cut short", "bits flipped"])
def test_a_damaged_shard_is_named(damage: str, source: Path, tmp_path: Path) -> None:
    write_shards(source, tmp_path / "shards", **OPTIONS)
    reader = open_shards(tmp_path / "shards", "test")
    last = len(reader) - 1
    key = open_shards(tmp_path / "shards", "test")[last].key
    shard, _ = reader.shard_positions()[-1]
    path = tmp_path / "shards" / shard["name"]
    blob = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(blob[: len(blob) // 2])
    else:
        (png,) = (member for member in members(path) if member.name == f"{key}.png")
        for place in range(png.offset_data + 20, png.offset_data + png.size):
            blob[place] ^= 0x55
        path.write_bytes(blob)
    expected = {"removed": "not found", "cut short": "ends before byte", "bits flipped": f"sample {key} is damaged"}[damage]
    for access in (lambda: reader[last], lambda: reader.images([last])):
        with pytest.raises(InputError, match=expected) as error:
            access()
        assert str(path) in str(error.value) and "run the `shard` stage again" in str(error.value)
