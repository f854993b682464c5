"""Shards: what went in comes out, by our reader, webdataset's and tarfile; same bytes on a second run; nothing half-written."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import webdataset
from image_folders import OPTIONS, contents, make_folder, numbered
from PIL import Image
from tiny import clone, environment, set_params, with_soak

from ldm.base.errors import InputError
from ldm.config import load_settings
from ldm.data import shards
from ldm.data.reader import SPLITS, open_shards
from ldm.data.shards import split_of, write_shards


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
    assert index == json.loads((tmp_path / "shards/index.json").read_text()) | {"ignored": {}}
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
    assert sorted(contents(tmp_path / "shards")) == sorted(
        [s["name"] for s in index["shards"]] + ["index.json", "offsets.npy", "quarantine.csv", "duplicates.csv"]
    )


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


def test_duplicates_are_listed_exact_ones_and_near_ones(tmp_path: Path) -> None:
    random, source = np.random.default_rng(0), tmp_path / "source"
    make_folder(source, numbered(60))
    soft = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
    soft.save(source / "010.png")
    soft.save(source / "011.png", compress_level=1)  # the same pixels in another file
    soft.resize((60, 60)).save(source / "012.png")
    (source / "013.png").write_bytes((source / "010.png").read_bytes())
    index = write_shards(source, tmp_path / "shards", **OPTIONS | {"image_size": 32})
    found = pd.read_csv(tmp_path / "shards/duplicates.csv").set_index("file_name")
    assert index["duplicates"] == {"exact": 1, "near": 2} and len(found) == 3
    group = {"010.png", "011.png", "012.png", "013.png"}
    assert set(found.index) | set(found.of) == group
    (pair,) = found[found.kind == "exact"].itertuples()
    assert {pair.Index, pair.of} == {"010.png", "013.png"} and pair.split == pair.split_of
    for split in SPLITS:
        names = set(open_shards(tmp_path / "shards", split).captions.file_name)
        for row in found.itertuples():
            assert (row.Index in names) == (row.split == split) and (row.of in names) == (row.split_of == split)


def test_shard_names_hold_nothing_that_shells_urls_or_braces_treat_specially(tmp_path: Path) -> None:
    tops = ["plain-1.a", "with space", "new\nline", "{000..999}", "ü", "a" * 200, "%41?#"]
    make_folder(tmp_path / "source", [name for top in tops for name in numbered(12, top)])
    index = write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)
    names = [shard["name"] for shard in index["shards"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"(train|val|test)-[A-Za-z0-9_.-]+-\d{5}\.tar", name) and len(name) < 130 for name in names)
    assert any(name.startswith("train-plain-1.a-0") for name in names)
    assert {name.split("/")[0] for split in SPLITS for name in open_shards(tmp_path / "shards", split).captions.file_name} == set(
        tops
    )


def test_folders_whose_names_look_like_ours_have_shards_of_their_own(tmp_path: Path) -> None:
    tops = ["x y", f"x_y-{hashlib.sha256(b'x y').hexdigest()[:8]}"]
    make_folder(tmp_path / "source", [name for top in tops for name in numbered(30, top)])
    index = write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)
    names = [shard["name"] for shard in index["shards"]]
    assert len(set(names)) == len(names)
    captions = pd.concat([open_shards(tmp_path / "shards", split).captions for split in SPLITS])
    assert len(captions) == 60 and set(captions.file_name.str.split("/").str[0]) == set(tops)


def test_a_further_column_of_some_rows_stays_with_them(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", numbered(40, "one"))
    (tmp_path / "source/metadata.csv").rename(tmp_path / "source/one/metadata.csv")
    table = pd.read_csv(tmp_path / "source/one/metadata.csv", dtype=str)
    table.assign(file_name=table.file_name.str.removeprefix("one/")).to_csv(tmp_path / "source/one/metadata.csv", index=False)
    make_folder(tmp_path / "more", numbered(10, "two"))
    (tmp_path / "more/two").rename(tmp_path / "source/two")
    rows = [{"file_name": name, "text": "x", "label": "1", "n": i} for i, name in enumerate(numbered(10))]
    pd.DataFrame(rows).to_json(tmp_path / "source/two/metadata.jsonl", orient="records", lines=True)
    write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)
    for split in SPLITS:
        reader = open_shards(tmp_path / "shards", split)
        for sample in (reader[i] for i in range(len(reader))):
            top, number = sample.meta["file_name"].removesuffix(".png").split("/")
            assert sample.meta.get("n") == (int(number) if top == "two" else None) and ("n" in sample.meta) == (top == "two")


# the same bytes, or nothing


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    names = numbered(700, "a") + numbered(800, "b")
    make_folder(tmp_path / "source", names)
    for name in names[::97]:
        (tmp_path / "source" / name).write_bytes(b"damaged")
    heard: list[tuple[str, int, int]] = []
    for workers in (1, 2, 3):
        out, options = tmp_path / f"{workers}", OPTIONS | {"shard_size": 50, "workers": workers}
        write_shards(tmp_path / "source", out, **options, progress=lambda *values: heard.append(values))
        assert contents(out) == contents(tmp_path / "1")
    for what in ("hash", "write"):
        counts = [done for kind, done, _ in heard if kind == what]
        assert counts[0] == 0 and counts[-1] == len(names) and {total for _, _, total in heard} == {len(names)}


def test_what_a_process_raises_is_raised_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes between the two readings: here its hash is told wrong."""
    make_folder(tmp_path / "source", numbered(1200))
    hashed = shards._hashed

    def hash_wrongly(*arguments: Any) -> list[Any]:
        first, *others = hashed(*arguments)
        return [replace(first, digest="0" * 64), *others]

    monkeypatch.setattr(shards, "_hashed", hash_wrongly)
    before = set(multiprocessing.active_children())  # of other tests
    with pytest.raises(InputError, match=r"\d\.png: changed while it was read"):
        write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("seed", with_soak(1, 5))
def test_the_stage_killed_with_its_processes_at_work(seed: int, tmp_path: Path) -> None:
    """The real entry point with two workers: after SIGKILL to it alone the workers end, and a second run gives the same bytes."""
    random = np.random.default_rng(seed)
    root = clone(tmp_path / "project")
    make_folder(root / "data/raw/mine", numbered(1500), seed)
    params = {"path": "data/raw/mine", "image_size": 64, "channels": 3, "shard_size": 50}
    set_params(root, {"data": params})
    command, env = [sys.executable, "-m", "ldm.stages.shard"], environment(LDM_WORKERS="2", PYTHONPATH=str(root))
    stage = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.DEVNULL)
    partial, wanted = root / "data/shards.partial", int(random.integers(1, 20))
    deadline = time.monotonic() + 60
    while len(list(partial.glob("*.tar"))) < wanted:
        assert stage.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    workers = [int(pid) for pid in Path(f"/proc/{stage.pid}/task/{stage.pid}/children").read_text().split()]
    stage.kill()
    stage.wait()
    assert 0 < len(list(partial.glob("*.tar"))) < 33 and not (partial / "index.json").exists()  # it was writing
    assert not (root / "data/shards").exists()
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(command, cwd=root, env=env, check=True, stdout=subprocess.DEVNULL)
    settings = load_settings(root).data.model_dump(exclude={"source", "path"})
    write_shards(root / "data/raw/mine", tmp_path / "undisturbed", **settings)
    assert contents(root / "data/shards") == contents(tmp_path / "undisturbed")
    assert not partial.exists()


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
    bad = pd.read_csv(tmp_path / "shards/quarantine.csv")
    assert set(bad.file_name) == set(planted) and index["quarantined"] == len(planted)
    assert all(reason and str(tmp_path) not in reason for reason in bad.reason)
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
    "an empty split": (no_test_images, ["3 readable images leave fewer than 2", "split", "data.val_fraction"]),
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
    moment = int(np.random.default_rng(seed).integers(17, 40))  # images encoded before the kill: 16 at once go to the tar
    reached, writes = os.pipe()
    child = os.fork()
    if child == 0:  # the child slows down at each image and says so; only the parent ends it
        try:
            to_png = shards.to_png
            shards.to_png = lambda image: (os.write(writes, b"."), time.sleep(0.02), to_png(image))[2]
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
    assert sum(map(len, partial.values())) > 0 and "index.json" not in partial  # it was writing
    assert len(partial) <= len(index["shards"])
    with pytest.raises(InputError, match="run the `shard` stage"):
        open_shards(out)
    write_shards(source, out, **OPTIONS)
    assert contents(out) == contents(undisturbed)
    assert not (tmp_path / "shards.partial").exists()


def test_too_many_unreadable_images_are_listed(source: Path, tmp_path: Path) -> None:
    too_many_bad(source)
    with pytest.raises(InputError, match=r"9 of 40 images are unreadable.*'000\.png' .*, all are in .*report/bad\.csv; remove"):
        write_shards(source, tmp_path / "shards", **OPTIONS, report=tmp_path / "report/bad.csv")
    bad = pd.read_csv(tmp_path / "report/bad.csv")
    assert bad.file_name.tolist() == numbered(9) and set(bad.reason) == {"not an image of a known format"}


# damage and absence are named


def test_absent_shards_and_splits_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shards/index\.json: not found, so this is no folder of shards; run the `shard` stage"):
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


@pytest.mark.parametrize(("val", "small", "advice"), [(0.98, "train", "lower"), (0.001, "val", "raise")])
def test_the_advice_for_a_small_split_makes_it_larger(val: float, small: str, advice: str, source: Path, tmp_path: Path) -> None:
    fractions = {"val_fraction": val, "test_fraction": 0.019 if val > 0.5 else 0.5}
    with pytest.raises(InputError, match=rf"for the .*{small}.* split; add images or {advice} data\.val_fraction"):
        write_shards(source, tmp_path / "shards", **OPTIONS | fractions)
