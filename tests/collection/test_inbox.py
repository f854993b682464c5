"""What lies in an inbox: nothing there stops the rest, what stays is listed with its reason, and is told once."""

import csv
import errno
import io
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inboxes import MINE, WAITING, blob, captions, contents, drop, drop_many, listed, today
from PIL import Image
from tiny import set_params
from users import as_another_user, open_up

from ldm.base.errors import InputError
from ldm.collection import ingest as module
from ldm.collection.inbox import NO_FILE, UNCAPTIONED, UNUSED, UNWRITABLE, read_inbox, remaining
from ldm.collection.ingest import KNOWN, LABELLED, REASONS, Ingested, ingest
from ldm.config import load_settings
from ldm.data.caption_columns import all_captions, captions_in
from ldm.data.captions import NOT_INGESTED
from ldm.data.folders import read_folder
from ldm.data.shards import write_shards

pytestmark = pytest.mark.usefixtures("unversioned")


def picture(width: int, height: int, form: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 50).convert(mode).save(buffer, form)
    return buffer.getvalue()


DAMAGED = {
    "empty.png": b"", "text.png": b"no image", "half.png": picture(60, 60)[:2000], "half.jpg": picture(60, 60, "JPEG")[:700],
    "half.bmp": picture(60, 60, "BMP")[:3000], "half.webp": picture(60, 60, "WEBP")[:300],
    "half.tif": picture(60, 60, "TIFF")[:900],
    "half.gif": picture(60, 60, "GIF", "L")[:900], "small.png": picture(3, 60), "large.png": picture(120, 120),
    "floats.tif": picture(60, 60, "TIFF", "F"), "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_damaged_images_stay_for_the_reasons_that_shard_has(
    workers: int, root: Path, inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is taken then needs no quarantine."""
    set_params(root, {"data": {"min_side": 5, "max_pixels": 10_000, "val_fraction": 0.3, "test_fraction": 0.3}})
    monkeypatch.setenv("LDM_WORKERS", str(workers))
    monkeypatch.setattr(module, "IMAGES_PER_WORKER", 4)
    drop_many(inbox, 0, 20)
    for name, content in DAMAGED.items():
        drop(inbox / name, content)
        drop(inbox / f"{name.rpartition('.')[0]}.txt", "x")
    drop(inbox / "metadata.csv", "file_name,text\n" + "".join(f"{name},x\n" for name in DAMAGED))
    (tmp_path / "same").mkdir()
    for number in range(20):
        shutil.copy(inbox / f"{number:03d}.png", tmp_path / "same")
    for name in DAMAGED:
        shutil.copy(inbox / name, tmp_path / "same")
    of_shard = load_settings(root).data.model_dump(exclude={"source", "path"}) | {"captions": "none", "max_bad_fraction": 0.9}
    write_shards(tmp_path / "same", tmp_path / "shards", **of_shard)
    expected = dict(pd.read_csv(tmp_path / "shards/quarantine.csv").itertuples(index=False))
    assert expected.keys() == DAMAGED.keys()

    done = ingest(root, inbox)
    assert done.left == expected and len(done.moved) == 20 and listed(inbox) == expected
    assert {name: content for name, content in contents(inbox).items() if name in DAMAGED} == DAMAGED
    taken = write_shards(root / MINE, tmp_path / "taken", **of_shard | {"captions": "auto", "max_bad_fraction": 0})
    assert (taken["found"], taken["quarantined"]) == (20, 0)


def test_a_content_is_decoded_once(root: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    read = module.Preprocessing.read
    monkeypatch.setattr(
        module.Preprocessing, "read", lambda self, content, **limits: (decoded.append(content), read(self, content, **limits))[1]
    )
    drop_many(inbox, 0, 2)
    ingest(root, inbox)
    for name, content in {"again": blob(0), "new": blob(5), "newer": blob(5), "bad": b"bad", "bad too": b"bad"}.items():
        drop(inbox / f"{name}.png", content)
        drop(inbox / f"{name}.txt", "x")
    done = ingest(root, inbox)
    assert done.moved == ("new.png",) and sorted(decoded) == sorted([blob(0), blob(1), blob(5), b"bad"])
    assert done.left["again.png"] == done.left["newer.png"] == KNOWN != done.left["bad.png"] == done.left["bad too.png"]


def test_the_bytes_that_were_checked_are_those_that_move(root: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is written again between two readings waits."""
    drop_many(inbox, 0, 2)
    check = module._check_space

    def another_comes(*arguments: Any) -> None:
        drop(inbox / "000.png", b"half an image")
        check(*arguments)

    monkeypatch.setattr(module, "_check_space", another_comes)
    done = ingest(root, inbox)
    assert done.moved == ("001.png",) and done.left == {"000.png": WAITING}
    assert contents(inbox)["000.png"] == b"half an image" and len(captions(root)) == 1


# nothing there stops the rest


def table(text: str | bytes, name: str = "metadata.csv") -> Callable[[Path], None]:
    return lambda inbox: drop(inbox / name, text)


def files(**contents: str | bytes) -> Callable[[Path], None]:
    def plant(inbox: Path) -> None:
        for name, content in contents.items():
            drop(inbox / name.replace("_", "."), content)

    return plant


def all_of(*plants: Callable[[Path], None]) -> Callable[[Path], None]:
    def plant(inbox: Path) -> None:
        for one in plants:
            one(inbox)

    return plant


def pipe(inbox: Path) -> None:
    os.mkfifo(inbox / "a.txt")
    os.mkfifo(inbox / "b.png")
    os.mkfifo(inbox / "metadata.csv")


def no_text(inbox: Path) -> None:
    for name in (b"\xff.txt", b"\xff", b"\xff.json"):
        drop(Path(os.fsdecode(os.fsencode(inbox) + b"/" + name)), "x")


LONG = "x" * (2**20 + 1)
STAYS = {
    "two labels": (
        table("file_name,text,label\na.png,x,1\na.png,x,2\ngood.png,g,1\n"),
        {"a.png": "a.png: has the labels '1' and '2' in rows of one image; keep one label"},
    ),
    "two tables": (
        all_of(table("file_name,text\na.png,x\n"), table("{}", "metadata.jsonl")),
        dict.fromkeys(
            ("a.png", "metadata.csv", "metadata.jsonl"), "metadata.jsonl: there is a metadata.csv beside it; keep one of the two"
        ),
    ),
    "no text": (table("file_name,words\na.png,x\n"), "name the columns, file_name and text"),
    "no table": (table(b"\x00\xff\x00"), "NUL characters"),
    "empty table": (table(""), "name the columns"),
    "latin-1": (table("file_name,text\na.png,é".encode("latin-1")), "save it as UTF-8"),
    "half a row": (table('file_name,text\na.png,"half'), "within a quoted caption"),
    "no parquet": (table(b"PAR1", "metadata.parquet"), "metadata.parquet: not readable"),
    "a label missing": (table("file_name,text,label\na.png,x,\n"), "line 2 has no label"),
    "a name of 5,000 characters": (
        table('{"file_name": "' + "x" * 5000 + '", "text": "y"}', "metadata.jsonl"),
        {"a.png": UNCAPTIONED},
    ),
    "a caption too long": (table('{"file_name": "a.png", "text": "' + LONG + '"}', "metadata.jsonl"), {"a.png": UNWRITABLE}),
    "a caption with NUL": (table('{"file_name": "a.png", "text": "\\u0000"}', "metadata.jsonl"), {"a.png": UNWRITABLE}),
    "a column with NUL": (
        table('{"file_name": "a.png", "text": "x", "n": "\\u0000"}', "metadata.jsonl"),
        {"a.png": UNWRITABLE},
    ),
    "two columns of one name": (
        table('{"file_name": "a.png", "text": "x", " text": "y"}', "metadata.jsonl"),
        {"a.png": UNWRITABLE},
    ),
    "two files": (files(a_txt="x", a_TXT="y"), {"a.png": "a.txt: there is a.TXT beside it; keep one of the two"}),
    "a long file": (files(a_txt=LONG), {"a.png": "a.txt: has 1,048,577 bytes; at most 1,048,576 are read"}),
    "damaged JSON": (files(a_json="{"), "a: its name or JSON is damaged"),
    "pipes": (pipe, {"a.png": UNCAPTIONED} | dict.fromkeys(("a.txt", "b.png", "metadata.csv"), NO_FILE)),
    "names that are no text": (no_text, {"a.png": UNCAPTIONED, "\udcff.txt": UNUSED, "\udcff.json": UNUSED}),
    "folders": (
        lambda inbox: [(inbox / name).mkdir() for name in ("metadata.csv", "a.txt", "b.png")],
        {"a.png": UNCAPTIONED} | dict.fromkeys(("a.txt", "b.png", "metadata.csv"), NO_FILE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_what_cannot_be_taken_stays_and_the_rest_moves(case: str, inbox: Path) -> None:
    plant, why = STAYS[case]
    drop(inbox / "a.png", blob(1))
    drop(inbox / "good.png", blob(2))
    drop(inbox / "good.txt", "g")
    plant(inbox)
    found = read_inbox(inbox, 10, "auto")
    left = {name: why for name, why in remaining(inbox, found.left).items() if name != "\udcff"}
    assert list(found.rows) == ["good.png"] and found.rows["good.png"]["text"] == "g"
    if isinstance(why, str):
        assert "a.png" in left and all(why in reason and str(inbox) not in reason for reason in left.values())
    else:
        assert left == why


@pytest.mark.parametrize("case", ["two labels", "no parquet", "names that are no text", "a label"])
def test_and_the_collection_can_be_read(case: str, root: Path, inbox: Path) -> None:
    (root / MINE).mkdir(parents=True)
    drop(root / MINE / "old.png", blob(9))
    drop(root / MINE / "old.txt", "without a label")
    drop(inbox / "a.png", blob(1))
    drop_many(inbox, 2, 3)
    plant = files(a_txt="x", a_cls="cat") if case == "a label" else STAYS[case][0]
    plant(inbox)
    done = ingest(root, inbox)
    assert done.moved == ("002.png",) and "a.png" in done.left and (case != "a label" or done.left["a.png"] == LABELLED)
    assert captions(root) == {"old.png": "without a label", f"{today()}/002.png": "noise 2"}
    again = ingest(root, inbox)
    assert again.batch is None and again.left.keys() >= done.left.keys()


def test_an_image_that_comes_or_goes_meanwhile_is_no_error(root: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_many(inbox, 0, 6)
    steps = {"_survey": "000", "_hashed": "001", "_check_space": "002", "version": "005"}

    def vanishing(step: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            for suffix in (".png", ".txt"):
                (inbox / f"{name}{suffix}").unlink(missing_ok=True)
            return step(*arguments)

        return wrapped

    for step, name in steps.items():
        monkeypatch.setattr(module, step, vanishing(getattr(module, step), name))
    done = ingest(root, inbox)
    assert done.moved == ("003.png", "004.png", "005.png") and not done.left and not contents(inbox)


def test_files_of_other_users_stay(root: Path, inbox: Path) -> None:
    drop_many(inbox, 0, 3)
    (inbox / "000.png").chmod(0)
    (inbox / "001.txt").chmod(0)
    subprocess.run(["chmod", "-R", "a+rwX", str(root)], check=True)
    open_up(inbox / "x")
    inbox.chmod(0o777)
    expected = {"000.png": "Permission denied", "001.png": "its caption cannot be read: Permission denied"}
    left = as_another_user(lambda: read_and_take(root, inbox))
    assert left == [["002.png"], expected]


def read_and_take(root: Path, inbox: Path) -> Any:
    os.environ |= {"HOME": str(root), "LOGNAME": "another"}  # which DVC asks for
    done = ingest(root, inbox)
    return done.moved, done.left


def test_originals_that_cannot_be_removed_stay_as_known(root: Path, inbox: Path) -> None:
    """In a folder with the sticky bit, files are their owner's to remove: they stay, and later runs go on."""
    drop_many(inbox, 0, 2)
    subprocess.run(["chmod", "-R", "a+rwX", str(root)], check=True)
    open_up(inbox / "x")
    inbox.chmod(0o1777)
    os.chown(inbox, 0, 0)
    assert as_another_user(lambda: read_and_take(root, inbox)) == [["000.png", "001.png"], {}]
    assert as_another_user(lambda: read_and_take(root, inbox)) == [[], {"000.png": KNOWN, "001.png": KNOWN}]


CAPTIONS = ["caption", "text ", "captions", "captions ", "caption_1", "text_2", " text_2"]
NAMES = st.sampled_from(["", " ", "n", "n ", "exif", '"', "a\rb", *CAPTIONS]) | st.text(max_size=4)
VALUES = st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=8), st.lists(st.text(max_size=4)))
COLUMNS = st.dictionaries(NAMES, VALUES, max_size=4)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(COLUMNS, st.text(max_size=8)), min_size=1, max_size=3))
def test_any_row_that_is_taken_can_be_read_again(tmp_path_factory: Any, rows: list[tuple[dict[str, Any], str]]) -> None:
    inbox, batch = tmp_path_factory.mktemp("inbox"), tmp_path_factory.mktemp("batch")
    frame = pd.DataFrame(
        [{**columns, "file_name": f"{n}.png", "text": text} for n, (columns, text) in enumerate(rows)], dtype=object
    )
    frame.to_json(inbox / "metadata.jsonl", orient="records", lines=True)
    for number in range(len(rows)):
        drop(inbox / f"{number}.png", blob(number))
        drop(batch / f"{number}.png", blob(number))
    found = read_inbox(inbox, 0, "auto")
    if found.rows:
        module.batches.write_table(batch / "metadata.csv", module._table(list(found.rows.values())))
        for name in {path.name for path in batch.glob("*.png")} - found.rows.keys():
            (batch / name).unlink()
        table = read_folder(batch).table
        again = dict(zip(table.file_name, captions_in(table), strict=True))
        assert again == {name: all_captions(row) for name, row in found.rows.items()}


SEVERAL = {
    "list.png": ["one", 'two, "quoted"', "three\nlines"],
    "single.png": ["alone"],
    "rows.png": ["first row", "second row"],
    "beside.png": ["of .txt", "of .json"],
}


def all_of_mine(root: Path, batch: str | None) -> dict[str, list[str]]:
    table = read_folder(root / MINE).table
    return {n.removeprefix(f"{batch}/"): texts for n, texts in zip(table.file_name, captions_in(table), strict=True)}


def test_several_captions_survive_ingest_and_deletions(root: Path, inbox: Path, tmp_path: Path) -> None:
    """Also where the batch is ingested again, elsewhere."""
    for number, name in enumerate(SEVERAL):
        drop(inbox / name, blob(number))
    rows = [{"file_name": name, "text": SEVERAL[name], "label": "x", "n": 7} for name in ("list.png", "single.png")]
    rows += [{"file_name": "rows.png", "text": text, "label": "x", "n": 7} for text in SEVERAL["rows.png"]]
    drop(inbox / "metadata.jsonl", "\n".join(json.dumps(row) for row in rows))
    drop(inbox / "beside.txt", "of .txt")
    drop(inbox / "beside.json", json.dumps({"captions": ["of .json"], "label": "x"}))
    done = ingest(root, inbox)
    assert not done.left and list(contents(inbox)) == ["metadata.jsonl"] and done.batch
    batch = root / done.batch
    assert all_of_mine(root, batch.name) == SEVERAL and set(read_folder(root / MINE).table.label) == {"x"}

    (tmp_path / "again").mkdir()
    for name, content in contents(batch).items():
        drop(tmp_path / "again" / name, content)
    elsewhere = Path(shutil.copytree(root, tmp_path / "elsewhere", symlinks=True))
    shutil.rmtree(elsewhere / MINE)
    again = ingest(elsewhere, tmp_path / "again")
    assert len(again.moved) == 4 and again.batch
    assert all_of_mine(elsewhere, Path(again.batch).name) == SEVERAL

    (batch / "list.png").unlink()
    drop(inbox / "metadata.jsonl", json.dumps({"file_name": "new.png", "text": ["a", "b"], "label": "y"}))
    drop(inbox / "new.png", blob(9))
    second = ingest(root, inbox)
    assert second.forgotten == (f"{batch.name}/list.png",) and second.moved == ("new.png",) and second.batch
    kept = {name: texts for name, texts in SEVERAL.items() if name != "list.png"}
    assert all_of_mine(root, batch.name) == kept | {f"{Path(second.batch).name}/new.png": ["a", "b"]}


@pytest.mark.parametrize("label", ["", " \n", None])
def test_a_blank_label_is_none(label: str | None, inbox: Path) -> None:
    """A table with one is refused: it would stop every later run."""
    drop(inbox / "a.png", blob(1))
    drop(inbox / "a.json", '{"text": "x", "label": ""}' if label is None else '{"text": "x"}')
    if label is not None:
        drop(inbox / "a.cls", label)
    assert read_inbox(inbox, 0, "auto").rows == {"a.png": {"file_name": "a.png", "text": "x"}}


@pytest.mark.parametrize(("convention", "text"), [("auto", "of the table"), ("tables", "of the table"), ("text files", "beside")])
def test_which_of_two_captions_counts_is_what_the_settings_say(convention: str, text: str, root: Path, inbox: Path) -> None:
    set_params(root, {"data": {"captions": convention}})
    drop(inbox / "a.png", blob(1))
    drop(inbox / "a.txt", "beside")
    drop(inbox / "metadata.csv", "file_name,text\na.png,of the table\n")
    ingest(root, inbox)
    assert list(captions(root).values()) == [text]


# full disks


def test_what_does_not_fit_is_not_copied(root: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_many(inbox, 0, 3)
    drop(inbox / "large.png", b"large and damaged" * 1000)  # needs no room
    drop(inbox / "large.txt", "x")
    before, needed = contents(inbox), sum(len(blob(number)) for number in range(3))
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    monkeypatch.setattr("ldm.base.errors.megabytes", lambda size: f"{size} bytes")
    with pytest.raises(InputError, match=rf"mine: new images need {needed} bytes, .* make room for 1 bytes first"):
        ingest(root, inbox)
    assert contents(inbox) == before and not list((root / MINE).glob("*") if (root / MINE).exists() else ())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert len(ingest(root, inbox).moved) == 3


def test_a_disk_that_fills_up_meanwhile_is_left_as_it_was(root: Path, inbox: Path) -> None:
    drop_many(inbox, 0, 2)
    drop(inbox / "z.png", picture(1200, 1200))
    drop(inbox / "z.txt", "x")
    before, limits = contents(inbox), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
        with pytest.raises(InputError, match=rf"the disk is full \({os.strerror(errno.EFBIG)}\)"):
            ingest(root, inbox)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(inbox) == before and not contents(root / MINE)


# the list


def test_what_stays_is_told_once(root: Path, inbox: Path) -> None:
    drop_many(inbox, 0, 1)
    drop(inbox / "bad.png", b"x")
    drop(inbox / "bad.txt", "x")
    first = ingest(root, inbox)
    assert [line for line in first.lines() if "bad.png" in line] == ["ingest: 1 left, not an image of a known format: bad.png"]
    list_before = (inbox / NOT_INGESTED).stat()
    again = ingest(root, inbox)
    assert again.left == first.left and not again.news
    assert again.lines()[0] == f"ingest: nothing moved from {inbox}; 1 files stay, NOT_INGESTED.csv there says why"
    assert "bad.png" not in "\n".join(again.lines())
    assert (inbox / NOT_INGESTED).stat().st_mtime_ns == list_before.st_mtime_ns  # and is not written again
    drop(inbox / "bad.png", b"")  # another reason is news
    drop(inbox / "b.png", blob(8))
    assert ingest(root, inbox).news == {"bad.png": "the file is empty", "b.png": UNCAPTIONED}
    drop(inbox / "bad.png", blob(9))
    drop(inbox / "b.txt", "x")
    done = ingest(root, inbox)
    assert done.moved == ("b.png", "bad.png") and not done.left and not os.listdir(inbox)


@pytest.mark.parametrize("found", [b"file_name;reason\n", b"\xff\xfe", b'"', b"a\0b", None])
def test_a_list_that_somebody_else_wrote_is_replaced(found: bytes | None, root: Path, inbox: Path) -> None:
    if found is None:
        (inbox / NOT_INGESTED).mkdir()
    else:
        drop(inbox / NOT_INGESTED, found)
    drop(inbox / 'a, "b"\n.png', blob(1))
    done = ingest(root, inbox)
    assert done.left == {'a, "b"\n.png': UNCAPTIONED}
    if found is None:
        assert done.news == {**done.left, NOT_INGESTED: "cannot be written: Is a directory"}
    else:
        assert listed(inbox) == done.left == done.news
        with (inbox / NOT_INGESTED).open(newline="") as file:
            assert list(csv.reader(file)) == [["file_name", "reason"], *map(list, done.left.items())]
    assert set(os.listdir(inbox)) <= {NOT_INGESTED, 'a, "b"\n.png', f".{NOT_INGESTED}.partial"}


def test_a_report_is_short_whatever_stays(tmp_path: Path) -> None:
    news = {f"{number:03d}.png": f"reason {number % 40}" for number in range(400)}
    lines = Ingested(tmp_path, None, (), news, news, (), None, None).lines()
    assert len(lines) == REASONS + 2 and lines[-1] == f"ingest: 30 more reasons: {tmp_path / NOT_INGESTED}"
    assert all(len(line) < 200 for line in lines)


LAYOUTS = {
    "tables": {"metadata.csv": "file_name,text\na/x.png,x\nb/y.png,y\n"},
    "text files": {"a/x.txt": "x", "b/y.txt": "y"},
    "folder names": {},
    "none": {},
}


@pytest.mark.parametrize("place", ["", "a/"])
@pytest.mark.parametrize("convention", ["auto", *LAYOUTS])
@pytest.mark.parametrize("layout", list(LAYOUTS)[:3])
def test_the_list_is_taken_for_captions_by_nobody(layout: str, convention: Any, place: str, tmp_path: Path) -> None:
    for name, content in {"a/x.png": blob(1), "b/y.png": blob(2), **LAYOUTS[layout]}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        drop(tmp_path / name, content)

    def read() -> Any:
        try:
            return read_folder(tmp_path, convention).table.to_dict("records")
        except InputError as error:
            return str(error)

    before = read()
    assert convention not in ("auto", layout) or isinstance(before, list)
    drop(tmp_path / f"{place}{NOT_INGESTED}", f"file_name,reason\nx.png,{UNCAPTIONED}\n")
    assert read() == before
