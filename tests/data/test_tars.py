"""Interchange: tars that webdataset and tarfile wrote become shards; tars that could do harm are refused by name."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from ldm.base.errors import InputError
from ldm.data.reader import SPLITS, open_shards
from ldm.data.shards import write_shards
from ldm.data.tars import read_tars

SIDE = 8
OPTIONS: dict[str, Any] = {
    "image_size": SIDE, "channels": 3, "resize_filter": "box", "val_fraction": 0.2, "test_fraction": 0.3, "shard_size": 9,
    "max_bad_fraction": 0.1,
}  # fmt: skip


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, "PNG")
    return buffer.getvalue()


def by_webdataset(path: Path, numbers: range) -> None:
    """With webdataset's own encoders, from arrays and objects."""
    with webdataset.TarWriter(str(path)) as tar:
        for n in numbers:
            sample = {"__key__": f"dir/{n:04d}", "png": pixels(n), "txt": f"caption {n}", "json": {"n": n}, "cls": n % 3}
            tar.write(sample)


def by_tarfile(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, blob in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))


@pytest.mark.parametrize("writer", ["webdataset", "tarfile"])
def test_tars_of_others_become_shards(writer: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number, numbers in enumerate((range(25), range(25, 40))):
        if writer == "webdataset":
            by_webdataset(source / f"{number}.tar", numbers)
        else:
            blobs: dict[str, bytes] = {}
            for n in numbers:  # parts in any order, apart from each other
                blobs |= {f"{n:04d}.json": json.dumps({"caption": f"caption {n}", "n": n, "label": n % 3}).encode()}
            blobs |= {f"{n:04d}.PNG": png(n) for n in numbers}
            by_tarfile(source / f"{number}.tar", blobs)
    index = write_shards(source, tmp_path / "shards", **OPTIONS)
    assert index["found"] == 40 and index["quarantined"] == 0
    seen = set()
    for split in SPLITS:
        for sample in (reader := open_shards(tmp_path / "shards", split)) and (reader[i] for i in range(len(reader))):
            n = sample.meta["n"]
            assert np.array_equal(sample.image.transpose(1, 2, 0), pixels(n))
            assert (sample.text, sample.meta["label"]) == (f"caption {n}", str(n % 3))
            seen.add(n)
    assert seen == set(range(40))


def test_a_tar_that_was_added_changes_no_other_shard(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    by_webdataset(source / "a.tar", range(30))
    write_shards(source, tmp_path / "before", **OPTIONS)
    by_webdataset(source / "b.tar", range(30, 60))
    write_shards(source, tmp_path / "after", **OPTIONS)
    for path in (tmp_path / "before").glob("*.tar"):
        assert (tmp_path / "after" / path.name).read_bytes() == path.read_bytes()


def test_our_own_shards_are_a_source_too(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    by_webdataset(tmp_path / "source/0.tar", range(40))
    write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)
    (tmp_path / "copied").mkdir()
    for path in (tmp_path / "shards").glob("*.tar"):
        (tmp_path / "copied" / path.name).write_bytes(path.read_bytes())
    again = read_tars(tmp_path / "copied").table
    assert sorted(again.n) == list(range(40)) and sorted(again.text) == sorted(f"caption {n}" for n in range(40))


@pytest.mark.parametrize("label", ["from json", None, 7])
def test_cls_has_the_label_whatever_the_json_says(label: Any, tmp_path: Path) -> None:
    columns = {"label": label, "file_name": "x", "caption": "one", "n": 1, "exif": {"GPSLatitude": "48 8 14"}}
    members = {"a.png": png(0), "a.txt": b"one", "a.cls": b"from cls", "a.json": json.dumps(columns).encode()}
    by_tarfile(tmp_path / "0.tar", members)
    assert read_tars(tmp_path).table.to_dict("records") == [
        {"file_name": "0.tar/a.png", "text": "one", "label": "from cls", "n": 1}
    ]


def test_other_members_are_counted_and_a_damaged_image_is_quarantined(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    blobs = {f"{n:04d}.{part}": blob for n in range(40) for part, blob in (("png", png(n)), ("txt", b"x"), ("npy", b"y"))}
    blobs["0007.png"] = blobs["0007.png"][:60]
    blobs["lonely.txt"] = b"no image"
    by_tarfile(source / "0.tar", blobs)
    index = write_shards(source, tmp_path / "shards", **OPTIONS)
    assert index["quarantined"] == 1 and index["found"] == 40 == sum(shard["count"] for shard in index["shards"]) + 1
    assert "0.tar/0007.png" in (tmp_path / "shards/quarantine.csv").read_text()
    assert index["ignored"] == {".npy": 40, "(samples without an image in 0.tar)": 1}


def special(kind: bytes) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)

    return make


def plain(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    return lambda path: by_tarfile(path, dict(members))


def twice(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())


def cut_short(path: Path) -> None:
    by_webdataset(path, range(5))
    path.write_bytes(path.read_bytes()[:700])


def compressed(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())


PICTURE = ("a.png", png(0))
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "parent folder": (plain(("../a.png", b"x")), r"'\.\./a\.png' leads out"),
    "parent folder inside": (plain(("x/../../a.png", b"x")), r"'x/\.\./\.\./a\.png' leads out"),
    "absolute path": (plain(("/a.png", b"x")), "'/a.png' leads out"),
    "symbolic link": (special(tarfile.SYMTYPE), "'a.png' is a link, a device or sparse"),
    "hard link": (special(tarfile.LNKTYPE), "'a.png' is a link, a device or sparse"),
    "device": (special(tarfile.CHRTYPE), "'a.png' is a link, a device or sparse"),
    "named pipe": (special(tarfile.FIFOTYPE), "'a.png' is a link, a device or sparse"),
    **{f"{suffix} pickle": (plain(PICTURE, (f"a.{suffix}", b"x")), rf"'a\.{suffix}' is a pickle")
       for suffix in ("pkl", "pickle", "pyd", "pth", "pt", "data.pkl", "PKL")},
    "two images": (plain(PICTURE, ("a.jpg", b"x"), ("a.txt", b"x")), "sample 'a' has 2 images, png and jpg"),
    "deep JSON": (plain(PICTURE, ("a.json", b"[" * 100_000)), "bad.tar/a: its name or JSON is damaged"),
    "surrogate in JSON": (plain(PICTURE, ("a.json", b'{"text": "\ud800"}')), "bad.tar/a: its name or JSON is damaged"),
    "twice": (twice, "'a.png' is there twice"),
    "cut short": (cut_short, "not a readable plain tar"),
    "no tar": (lambda path: path.write_bytes(b"hello" * 1000), "not a readable plain tar"),
    "compressed": (compressed, "not a readable plain tar"),
    "no caption": (plain(PICTURE), "bad.tar/a: has no caption; add a.txt"),
    "two captions": (plain(PICTURE, ("a.txt", b"x"), ("a.json", b'{"caption": "y"}')), r"a: \.txt and caption of \.json differ"),
    "caption is a number": (plain(PICTURE, ("a.json", b'{"text": 1}')), r"a\.json: text is 1; a caption is a string"),
    "no JSON": (plain(PICTURE, ("a.json", b"{")), "bad.tar/a: its name or JSON is damaged"),
    "JSON list": (plain(PICTURE, ("a.json", b"[1]")), "a.json holds list"),
    "caption not UTF-8": (plain(PICTURE, ("a.txt", b"\xff")), "a.txt: not UTF-8"),
    "NUL in a caption": (plain(PICTURE, ("a.txt", "x".encode("utf-16-le"))), "a.txt: holds NUL"),
    "long caption": (plain(PICTURE, ("a.txt", b"x" * (2**20 + 1))), r"a\.txt' has 1,048,577 bytes"),
    "no images": (plain(("a.txt", b"x")), "hold no images"),
    "label here and none there": (plain(PICTURE, ("a.cls", b"1"), ("b.png", png(1)), ("b.txt", b"x")), "b.png' has no label"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_do_harm_or_is_damaged_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, expected = REFUSED[case]
    (tmp_path / "source").mkdir()
    make(tmp_path / "source/bad.tar")
    with pytest.raises(InputError, match=expected) as error:
        write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)
    assert str(tmp_path / "source") in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("damage", ["a bit of a name", "a header of zeros", "cut between members", "rubbish in a header"])
def test_damage_in_the_middle_does_not_pass_for_the_end(damage: str, tmp_path: Path) -> None:
    """To tarfile a bad header is where a tar ends: all that follows would be lost without a word."""
    (tmp_path / "source").mkdir()
    path = tmp_path / "source/0.tar"
    by_webdataset(path, range(40))
    with tarfile.open(path) as tar:
        header = tar.getmembers()[60].offset
    blob = bytearray(path.read_bytes())
    if damage == "a bit of a name":
        blob[header + 5] ^= 1
    elif damage == "a header of zeros":
        blob[header : header + 512] = bytes(512)
    elif damage == "cut between members":
        del blob[header:]
    else:
        blob[header : header + 512] = np.random.default_rng(0).bytes(512)
    path.write_bytes(blob)
    with pytest.raises(InputError, match=rf"0\.tar: damaged or cut short at byte {header} of {len(blob)}"):
        write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS)


@pytest.mark.parametrize("name", ["a.tar", "._a.tar", "linked.tar", "pipe.tar"])
def test_which_tars_are_opened(name: str, tmp_path: Path) -> None:
    import os

    source = tmp_path / "source"
    source.mkdir()
    by_webdataset(source / "0.tar", range(40))
    if name == "linked.tar":
        by_webdataset(tmp_path / "outside.tar", range(40, 80))
        (source / name).symlink_to(tmp_path / "outside.tar")
    elif name == "pipe.tar":
        os.mkfifo(source / name)
    else:
        by_webdataset(source / name, range(40, 80))
    if name in ("linked.tar", "pipe.tar"):
        with pytest.raises(InputError, match=r"a symbolic link that leaves the folder|not a regular file"):
            write_shards(source, tmp_path / "shards", **OPTIONS)
    else:
        assert write_shards(source, tmp_path / "shards", **OPTIONS)["found"] == (80 if name == "a.tar" else 40)


def test_tars_and_images_side_by_side_are_refused(tmp_path: Path) -> None:
    by_webdataset(tmp_path / "a.tar", range(3))
    (tmp_path / "b.png").write_bytes(png(0))
    with pytest.raises(InputError, match=r"holds tars and also images \(\.png\)"):
        write_shards(tmp_path, tmp_path / "shards", **OPTIONS)


def test_images_that_are_not_read_are_refused_with_their_reason(tmp_path: Path) -> None:
    members = {"a.png": png(0), "a.txt": b"one", "b.heic": b"x", "b.txt": b"two", "c.v2.png": png(1), "c.txt": b"three"}
    members |= {"._a.png": b"x", "__MACOSX/._b.png": b"x", "@eaDir/a.png": b"x", "a.mask.png": png(2)}
    by_tarfile(tmp_path / "0.TAR", members)
    found = read_tars(tmp_path)
    assert found.table.to_dict("records") == [{"file_name": "0.TAR/a.png", "text": "one"}]
    reasons = {name: reason.split(";")[0].split(",")[0] for name, reason in found.refused.items()}
    assert reasons == {"0.TAR/b.heic": ".heic is not read", "0.TAR/c.v2.png": "its name has several dots"}
    assert found.ignored == {"hidden": 1, "__MACOSX": 1, "@eaDir": 1, ".mask.png": 1}
    (tmp_path / "0.TAR").unlink()
    by_tarfile(tmp_path / "0.tar", {"b.heic": b"x", "b.txt": b"two"})
    with pytest.raises(InputError, match=r"hold no images that are read; 1 refused: \.heic is not read"):
        read_tars(tmp_path)


def test_captions_of_tars_by_a_convention_that_is_named(tmp_path: Path) -> None:
    by_tarfile(tmp_path / "0.tar", {"a.png": png(0), "a.txt": b"again", "a.json": b'{"caption": "first", "n": 1}', "a.cls": b"3"})
    row = {"file_name": "0.tar/a.png", "text": "again", "label": "3", "n": 1}
    assert read_tars(tmp_path, "text files").table.to_dict("records") == [row]
    assert read_tars(tmp_path, "none").table.to_dict("records") == [{"file_name": "0.tar/a.png", "text": "", "n": 1}]
    with pytest.raises(InputError, match=r"data\.captions is folder names, and captions of tars are in their samples"):
        read_tars(tmp_path, "folder names")
