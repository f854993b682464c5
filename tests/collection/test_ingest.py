"""Ingest: what is new moves once, whatever happens in between; what is not stays and is named."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dvc.repo import Repo
from inboxes import MINE, WAITING, blob, captions, contents, drop, drop_many, listed, today
from kills import run_until_killed
from tiny import set_params, with_soak
from typer.testing import CliRunner

from ldm.base import clock
from ldm.base.errors import InputError
from ldm.cli import app
from ldm.collection import batches
from ldm.collection import ingest as module
from ldm.collection.inbox import NO_FILE, NO_IMAGE, UNCAPTIONED, UNNAMED, UNUSED
from ldm.collection.ingest import KNOWN, LABELLED, UNLABELLED, ingest
from ldm.data.captions import NOT_INGESTED
from ldm.data.folders import read_folder
from ldm.data.shards import write_shards

SHARDS: dict[str, Any] = {
    "image_size": 8, "channels": 1, "resize_filter": "box", "val_fraction": 0.2, "test_fraction": 0.2, "shard_size": 5,
    "max_bad_fraction": 0,
}  # fmt: skip


# what moves


def test_what_is_new_becomes_a_dated_batch_that_dvc_versions(root: Path, inbox: Path) -> None:
    texts = {"a.png": 'a "quoted", word', "b.JPG": "two\r\nlines", "é.bmp": "ümläut\ralone", "d.png": ""}
    rows = [{"file_name": name, "text": text, "place": f"p{i}", "n": i} for i, (name, text) in enumerate(texts.items())]
    rows += [{"file_name": "left long ago.png", "text": "x", "place": "", "n": 9}]
    rows[2]["file_name"] = "./e\u0301.bmp"  # as macOS writes it
    drop(inbox / "metadata.jsonl", "\n".join(json.dumps(row) for row in rows))
    for number, name in enumerate(texts):
        drop(inbox / name, blob(number, {"b.JPG": "JPEG", "é.bmp": "BMP"}.get(name, "PNG")))
    drop(inbox / "by hand.png", blob(9))
    drop(inbox / "by hand.txt", "from a sidecar\n")
    before = contents(inbox)
    day = today()

    done = ingest(root, inbox)
    assert done.batch in (f"{MINE}/{day}", f"{MINE}/{today()}") and not done.left
    batch = root / done.batch
    assert sorted(done.moved) == sorted([*texts, "by hand.png"])
    assert list(contents(inbox)) == ["metadata.jsonl"] and before["metadata.jsonl"] == (inbox / "metadata.jsonl").read_bytes()
    assert contents(batch).keys() == {*texts, "by hand.png", "metadata.csv"}
    assert all((batch / name).read_bytes() == before[name] for name in done.moved)
    table = read_folder(root / MINE).table.set_index("file_name")
    expected = texts | {"by hand.png": "from a sidecar"}
    assert table.text.to_dict() == {f"{batch.name}/{name}": text for name, text in expected.items()}
    assert table.loc[f"{batch.name}/b.JPG", "place"] == "p1"

    assert done.pointer == f"{MINE}.dvc" and done.lines()[-1].endswith("commit that to git")
    assert subprocess.run(["git", "check-ignore", "-q", done.pointer], cwd=root).returncode == 1
    listing = yaml.safe_load((root / done.pointer).read_text())["outs"][0]["md5"]
    cache = root / ".dvc/cache/files/md5"
    listed = {entry["relpath"]: entry["md5"] for entry in json.loads((cache / listing[:2] / listing[2:]).read_text())}
    for name, content in contents(root / MINE).items():
        assert listed.pop(name) == hashlib.md5(content).hexdigest()
        assert (cache / hashlib.md5(content).hexdigest()[:2] / hashlib.md5(content).hexdigest()[2:]).read_bytes() == content
    assert not listed
    with Repo(str(root)) as repo:  # DVC finds it by itself, too: for `dvc push`, `dvc checkout`
        (out,) = [out for out in repo.index.outs if out.fs_path == str(root / MINE)]
        assert out.status() == {}


@pytest.mark.usefixtures("unversioned")
def test_what_is_there_already_stays_and_is_counted_once(root: Path, inbox: Path) -> None:
    (root / MINE / "old").mkdir(parents=True)
    (root / MINE / "old/x.bmp").write_bytes(blob(1, "BMP"))
    (root / MINE / "old/x.txt").write_text("old")
    drop(inbox / "a.bmp", blob(1, "BMP"))  # in the collection, under another name
    drop(inbox / "b.bmp", blob(2, "BMP"))  # as large, and another image
    drop(inbox / "c.bmp", blob(2, "BMP"))  # equal to b
    for name in "abc":
        drop(inbox / f"{name}.txt", name)
    done = ingest(root, inbox)
    assert done.moved == ("b.bmp",) and done.left == {"a.bmp": KNOWN, "c.bmp": KNOWN}
    assert captions(root) == {f"{today()}/b.bmp": "b", "old/x.bmp": "old"}
    assert set(contents(inbox)) == {"a.bmp", "a.txt", "c.bmp", "c.txt", NOT_INGESTED}
    again = ingest(root, inbox)
    assert again.batch is None and again.left == done.left


@pytest.mark.usefixtures("unversioned")
def test_what_is_not_ready_waits_and_is_named(root: Path, inbox: Path, tmp_path: Path) -> None:
    drop_many(inbox, 0, 1)
    drop(inbox / "growing.png", blob(1), 5)
    drop(inbox / "growing.txt", "x")
    drop(inbox / "captioned just now.png", blob(2))
    drop(inbox / "captioned just now.txt", "x", 5)
    drop(inbox / "uncaptioned.png", blob(3))
    drop(inbox / "utf16.png", blob(4))
    drop(inbox / "utf16.txt", "x".encode("utf-16-le"))  # without the mark that would tell
    drop(inbox / "photo.heic", b"x")
    drop(inbox / ".hidden.png", blob(5))
    drop(inbox / "Thumbs.db", b"x")
    drop(inbox / "notes.md", b"x")
    drop(inbox / "ahead of its image.txt", b"x")
    drop(inbox / "just now.txt", b"x", 5)
    drop(Path(os.fsdecode(os.fsencode(inbox) + b"/\xff.png")), blob(6))
    (inbox / "folder").mkdir()
    (inbox / "link.png").symlink_to(inbox / "000.png")
    staying = set(os.listdir(inbox)) - {"000.png", "000.txt"}
    done = ingest(root, inbox)
    assert done.moved == ("000.png",) and set(os.listdir(inbox)) == staying | {NOT_INGESTED}
    assert done.left == {
        "captioned just now.png": WAITING, "growing.png": WAITING, "uncaptioned.png": UNCAPTIONED,
        "utf16.png": "utf16.txt: holds NUL characters, as UTF-16 without a mark does; save it as UTF-8",
        "photo.heic": ".heic is not read; convert it to JPEG or PNG", "\udcff.png": UNNAMED, "folder": NO_FILE,
        "link.png": NO_FILE, "notes.md": NO_IMAGE, "ahead of its image.txt": UNUSED,
    }  # fmt: skip
    assert "1 left, its name is not UTF-8; rename it: \\udcff.png" in "\n".join(done.lines())
    assert listed(inbox) == {name.encode(errors="backslashreplace").decode(): why for name, why in done.left.items()}
    drop(inbox / "uncaptioned.txt", "now it is")
    assert ingest(root, inbox, settle=0).moved == ("captioned just now.png", "growing.png", "uncaptioned.png")
    assert captions(root)[f"{today()}-2/uncaptioned.png"] == "now it is"


@pytest.mark.usefixtures("unversioned")
def test_a_table_that_is_being_written_is_not_read(root: Path, inbox: Path) -> None:
    drop(inbox / "a.png", blob(1))
    drop(inbox / "metadata.csv", 'file_name,text\na.png,"half a cap', 3)
    assert ingest(root, inbox).left == {"a.png": WAITING}
    assert not (root / MINE).exists()
    drop(inbox / "metadata.csv", "file_name,text\na.png,half a caption\n")
    assert ingest(root, inbox).moved == ("a.png",)


@pytest.mark.usefixtures("unversioned")
def test_a_sidecar_stays_for_as_long_as_an_image_needs_it(root: Path, inbox: Path) -> None:
    drop(inbox / "a.png", blob(1))
    drop(inbox / "a.bmp", blob(1, "BMP"), 5)
    drop(inbox / "a.txt", "both")
    assert ingest(root, inbox).moved == ("a.png",)
    assert set(contents(inbox)) == {"a.bmp", "a.txt", NOT_INGESTED}
    assert ingest(root, inbox, settle=1).moved == ("a.bmp",)
    assert not contents(inbox) and set(captions(root).values()) == {"both"}


@pytest.mark.usefixtures("unversioned")
def test_an_original_that_changed_meanwhile_is_not_deleted(root: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_many(inbox, 0, 2)
    clear = batches.clear

    def another_comes(batch: Path) -> None:
        drop(inbox / "000.png", blob(100))
        clear(batch)

    monkeypatch.setattr(batches, "clear", another_comes)
    assert ingest(root, inbox).moved == ("000.png", "001.png")
    assert contents(inbox) == {"000.png": blob(100)}


# growth


def test_a_second_day_changes_no_shard_of_the_first(
    root: Path, inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "version", lambda root, collection: None)
    days = iter(["2025-01-31", "2025-02-01"])
    monkeypatch.setattr(batches, "free_name", lambda root, collection: collection / next(days))
    drop_many(inbox, 0, 40)
    ingest(root, inbox)
    write_shards(root / MINE, tmp_path / "before", **SHARDS)
    drop_many(inbox, 40, 60)
    ingest(root, inbox)
    write_shards(root / MINE, tmp_path / "after", **SHARDS)
    before, after = ({k: v for k, v in contents(tmp_path / which).items() if k.endswith(".tar")} for which in ("before", "after"))
    assert before.items() < after.items()
    assert {name.split("-", 1)[1][:10] for name in after.keys() - before.keys()} == {"2025-02-01"}


@pytest.mark.parametrize(("wanted", "found"), [("2025-01-31", 0), ("2025-01-31-2", 1), ("2025-01-31-3", 2)])
def test_batches_of_a_day_are_numbered(wanted: str, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "now", lambda: datetime(2025, 1, 31, 23, 59, tzinfo=UTC))
    for name in ("2025-01-31", "2025-01-31-2")[:found]:
        (tmp_path / name).mkdir()
    with batches.changing(tmp_path):
        assert batches.free_name(tmp_path, tmp_path).name == wanted


# kills


def adds(event: str, arguments: tuple[Any, ...]) -> bool:
    return event == "subprocess.Popen" and "add" in arguments[1]


def until_killed(root: Path, inbox: Path, moment: int | None) -> tuple[int, bool]:
    """Ingest that asks before each operation on inbox and collection, and before each command that it runs."""
    ours = (str(inbox), str(root / "data"))

    def asks(event: str, arguments: tuple[Any, ...]) -> bool:
        return event == "subprocess.Popen" or (
            event.startswith(("open", "os.", "shutil."))
            and any(isinstance(a, str | os.PathLike) and os.fspath(a).startswith(ours) for a in arguments)
        )

    return run_until_killed(lambda: ingest(root, inbox), asks, moment)


@pytest.fixture(scope="module")
def undisturbed(template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], str, int]:
    """Collection and pointer of a run that nobody kills, and how many moments it has."""
    folder = tmp_path_factory.mktemp("undisturbed")
    root, inbox = Path(shutil.copytree(template, folder / "project", symlinks=True)), folder / "inbox"
    inbox.mkdir()
    drop_many(inbox, 0, 4)
    moments, _ = until_killed(root, inbox, None)
    assert not contents(inbox)
    return contents(root / MINE), (root / f"{MINE}.dvc").read_text(), moments


@pytest.mark.parametrize("seed", with_soak(3, 12))
def test_killed_at_any_moment_and_run_again(
    seed: int, root: Path, inbox: Path, undisturbed: tuple[dict[str, bytes], str, int]
) -> None:
    expected, pointer, moments = undisturbed
    drop_many(inbox, 0, 4)
    images = {blob(number) for number in range(4)}
    random = np.random.default_rng(seed)
    for again in range(2):
        if not again and seed % 3 == 0:  # `dvc add` takes half a second
            delay = random.uniform(0.01, 0.4)
            _, killed = run_until_killed(lambda: ingest(root, inbox), adds, 1, delay)
        else:
            _, killed = until_killed(root, inbox, int(random.integers(1, moments)))
        assert killed or again  # the second call may have less to do
        here = contents(root / MINE) if (root / MINE).is_dir() else {}
        assert images <= set(here.values()) | set(contents(inbox).values())
        batch = {name: content for name, content in here.items() if "/." not in f"/{name}"}
        assert batch in ({}, expected)
    ingest(root, inbox)
    assert contents(root / MINE) == expected and not contents(inbox)
    assert (root / f"{MINE}.dvc").read_text() == pointer
    assert ingest(root, inbox).batch is None and (root / f"{MINE}.dvc").read_text() == pointer


def test_files_of_dvc_that_a_kill_left_empty_are_no_obstacle(root: Path, inbox: Path) -> None:
    drop_many(inbox, 0, 1)
    ingest(root, inbox)
    (root / f"{MINE}.dvc").write_text("")
    (root / ".dvc/tmp/rwlock").write_text("")
    drop_many(inbox, 1, 2)
    assert ingest(root, inbox).moved == ("001.png",)
    assert yaml.safe_load((root / f"{MINE}.dvc").read_text())["outs"][0]["nfiles"] == 4


@pytest.mark.usefixtures("unversioned")
def test_one_at_a_time(root: Path, inbox: Path) -> None:
    drop_many(inbox, 0, 2)
    (root / ".ldm").mkdir()
    with (root / ".ldm/ingest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=ingest, args=(root, inbox))
        second.start()
        second.join(0.5)
        assert second.is_alive() and len(contents(inbox)) == 4
    second.join(60)
    assert len(captions(root)) == 2 and not contents(inbox)


def test_a_stage_that_reads_the_collection_is_not_disturbed(root: Path, inbox: Path) -> None:
    """Else DVC would record the batch as seen, and never show it to the stage again."""
    drop_many(inbox, 0, 2)
    (root / MINE).mkdir(parents=True)
    (root / MINE / "a.png").write_bytes(blob(50))
    (root / MINE / "a.txt").write_text("a")
    stage = {"cmd": "touch started; sleep 60 & wait; touch out", "deps": [MINE], "outs": ["out"]}
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"slow": stage}}))
    repro = subprocess.Popen([sys.executable, "-m", "dvc", "repro"], cwd=root, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while not (root / "started").exists():
            assert repro.poll() is None
            time.sleep(0.05)
        before = contents(inbox), list((root / MINE).glob("*"))
        with pytest.raises(InputError, match="a stage works here"):
            ingest(root, inbox)
        assert (contents(inbox), [path for path in (root / MINE).glob("*") if path.name[0] != "."]) == before
    finally:
        os.killpg(repro.pid, signal.SIGKILL)
        repro.wait()
    assert ingest(root, inbox).moved == ("000.png", "001.png")


# refusals


def class_folders(root: Path) -> None:
    for name in ("cat", "dog"):
        (root / MINE / name).mkdir(parents=True)
        (root / MINE / name / "a.png").write_bytes(blob(1))
    (root / MINE / "README.txt").write_text("no caption of any image")


def tars(root: Path) -> None:
    (root / MINE).mkdir(parents=True)
    (root / MINE / "a.tar").write_bytes(b"")


def path(name: str) -> Any:
    return lambda root: set_params(root, {"data": {"path": name}})


def not_fetched(root: Path) -> None:
    (root / MINE).mkdir(parents=True)
    for number in range(2):
        (root / MINE / f"{number}.png").write_bytes(blob(number))
        (root / MINE / f"{number}.txt").write_text("x")
    subprocess.run([sys.executable, "-m", "dvc", "add", "--quiet", MINE], cwd=root, check=True)
    (root / MINE / "1.png").unlink()
    digest = hashlib.md5(blob(1)).hexdigest()
    (root / f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}").unlink()


REFUSED = {
    "an out": (path("data/raw/source"), "data.path data/raw/source: stage source writes data/raw/source; set data.path"),
    "in an out": (path("data/raw/source/more"), "stage source writes"),
    "around outs": (path("data/raw"), "stage source writes data/raw/source"),
    "outside": (path("../elsewhere"), "data.path ../elsewhere: not a folder inside the project; set data.path"),
    "the project": (path("."), "not a folder inside the project"),
    "ignored": (path("data/mine"), "git ignores data/mine.dvc, so it would not be versioned; set data.path"),
    "ignored above": (path("data/raw/mine/deeper"), "git ignores data/raw/mine/deeper.dvc"),
    "class folders": (class_folders, "mine: its captions are the names of its folders"),
    "tars": (tars, "mine/a.tar: a folder of tars takes no images"),
    "not fetched": (not_fetched, "data.path data/raw/mine: not all of it is here; `dvc pull`"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_collection_that_cannot_take_batches_is_refused(case: str, root: Path, inbox: Path) -> None:
    plant, says = REFUSED[case]
    plant(root)
    drop_many(inbox, 2, 4)
    before = contents(inbox), contents(root / "data") if (root / "data").exists() else {}
    with pytest.raises(InputError, match=says) as refusal:
        ingest(root, inbox)
    assert "\n" not in str(refusal.value)
    assert (contents(inbox), contents(root / "data") if (root / "data").exists() else {}) == before


def test_an_inbox_must_be_a_folder_of_its_own(root: Path, inbox: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no folder"):
        ingest(root, inbox / "nowhere")
    (root / MINE / "inbox").mkdir(parents=True)
    with pytest.raises(InputError, match="lies in the collection"):
        ingest(root, root / MINE / "inbox")


@pytest.mark.usefixtures("unversioned")
def test_labels_are_those_of_all_images_or_of_none(root: Path, inbox: Path) -> None:
    drop(inbox / "metadata.csv", "file_name,text,label\na.png,x,1\nb.png,y,2\n")
    drop(inbox / "a.png", blob(1))
    drop_many(inbox, 2, 3)
    done = ingest(root, inbox)
    assert done.moved == ("a.png",) and done.left == {"002.png": UNLABELLED}
    assert read_folder(root / MINE).table.label.tolist() == ["1"]
    shutil.rmtree(root / MINE)
    (root / MINE).mkdir()
    (root / MINE / "old.png").write_bytes(blob(9))
    (root / MINE / "old.txt").write_text("without a label")
    drop(inbox / "b.png", blob(3))
    done = ingest(root, inbox)
    assert done.moved == ("002.png",) and done.left == {"b.png": LABELLED}


@pytest.mark.usefixtures("unversioned")
def test_an_empty_inbox_is_no_error(root: Path, inbox: Path) -> None:
    done = ingest(root, inbox)
    assert (done.batch, done.moved, done.left, done.pointer, done.newest) == (None, (), {}, None, None)
    assert done.lines() == [f"ingest: nothing moved from {inbox}"]


def test_what_dvc_says_is_passed_on(root: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_many(inbox, 0, 1)
    (root / ".dvc/cache").write_text("no folder")
    with pytest.raises(InputError, match=r"data/raw/mine: `dvc add` failed \(.+\); every image is safe there, run ingest again"):
        ingest(root, inbox)
    (root / ".dvc/cache").unlink()
    assert ingest(root, inbox).pointer == f"{MINE}.dvc"
    assert list(captions(root).values()) == ["noise 0"]


def test_the_command(root: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr(module, "version", lambda root, collection: f"{MINE}.dvc")
    drop(inbox / "a.png", blob(1), 0)
    drop(inbox / "a.txt", "a", 0)
    result = CliRunner().invoke(app, ["data", "ingest", str(inbox)])
    assert result.exit_code == 0 and f"nothing moved from {inbox}" in result.output
    assert "1 left, changed in the last" in result.output
    assert "1 left" not in CliRunner().invoke(app, ["data", "ingest", str(inbox)]).output  # it has been told
    result = CliRunner().invoke(app, ["data", "ingest", "--settle", "0", "../inbox"])
    assert f"1 images moved to {MINE}/{today()}" in result.output and f"{MINE}.dvc: commit that to git" in result.output


# captions: the same reader as `shard` has


@pytest.mark.usefixtures("unversioned")
def test_captions_beside_images_are_those_that_shard_reads(root: Path, inbox: Path) -> None:
    beside = {
        "a.txt": "\ufeffone\r\n", "b.caption": "two", "c.TXT": "three", "d.json": '{"caption": "four", "n": 1}', "e.txt": "fünf",
        "f.png.txt": "not beside", "g.txt": "x", "g.caption": "y", "h.json": "{}",
    }  # fmt: skip
    for number, name in enumerate(beside):
        drop(inbox / f"{name[0]}.png", blob(number))
        drop(inbox / name, beside[name].encode("utf-16" if name[0] == "e" else "utf-8"))
    done = ingest(root, inbox)
    assert done.moved == ("a.png", "b.png", "c.png", "d.png", "e.png")
    assert done.left == {
        "d.json": UNUSED, "f.png": UNCAPTIONED, "f.png.txt": UNUSED,
        "g.png": "g: .txt and .caption differ; keep one, or set data.captions: text files to use the text",
        "h.png": "h: has no caption; add h.txt, or say in data.captions where captions come from",
    }  # fmt: skip
    assert sorted(os.listdir(inbox)) == [
        NOT_INGESTED,
        "d.json",
        "f.png",
        "f.png.txt",
        "g.caption",
        "g.png",
        "g.txt",
        "h.json",
        "h.png",
    ]
    assert list(captions(root).values()) == ["one", "two", "three", "four", "fünf"]


@pytest.mark.usefixtures("unversioned")
def test_a_collection_without_captions_takes_images_without(root: Path, inbox: Path) -> None:
    set_params(root, {"data": {"captions": "none"}})
    drop(inbox / "a.png", blob(1))
    drop(inbox / "b.png", blob(2))
    drop(inbox / "b.txt", "x")
    assert ingest(root, inbox).moved == ("a.png", "b.png") and set(os.listdir(inbox)) == {"b.txt", NOT_INGESTED}
    assert list(read_folder(root / MINE, "none").table.text) == ["", ""]


def test_a_batch_has_a_table_so_captions_are_no_names_of_folders(root: Path, inbox: Path) -> None:
    set_params(root, {"data": {"captions": "folder names"}})
    with pytest.raises(InputError, match=r"data\.captions is folder names, and a batch has its captions in a table"):
        ingest(root, inbox)


@pytest.mark.usefixtures("unversioned")
def test_labels_beside_images_count_and_what_was_not_taken_stays(root: Path, inbox: Path) -> None:
    for number in range(3):
        drop(inbox / f"{number}.png", blob(number))
        drop(inbox / f"{number}.txt", "x")
    for number in range(2):
        drop(inbox / f"{number}.cls", "cat")
    drop(inbox / "1.json", '{"author": "me", "license": "CC"}')
    drop(inbox / "a.heic", "x")
    done = ingest(root, inbox)
    assert done.moved == ("0.png", "1.png") and done.left["2.png"] == UNLABELLED
    assert done.left.keys() == {"1.json", "2.png", "a.heic"}
    assert sorted(os.listdir(inbox)) == ["1.json", "2.png", "2.txt", NOT_INGESTED, "a.heic"]
    drop(inbox / "2.cls", "dog")
    assert ingest(root, inbox).moved == ("2.png",)
    assert sorted(read_folder(root / MINE).table.label) == ["cat", "cat", "dog"]
