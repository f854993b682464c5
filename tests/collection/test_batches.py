"""Batches: deleting an image from one is enough, and nothing else changes."""

import hashlib
import json
import os
import shutil
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from inboxes import MINE, blob, captions, contents, drop, drop_many
from kills import run_until_killed
from tiny import with_soak

from ldm.base import clock
from ldm.base.errors import InputError
from ldm.collection.batches import forget, newest
from ldm.collection.ingest import ingest, version
from ldm.data.folders import read_folder
from ldm.data.shards import write_shards

DAYS = (date(2025, 1, 31), date(2025, 2, 1))
SHARDS: dict[str, Any] = {
    "image_size": 8, "channels": 1, "resize_filter": "box", "val_fraction": 0.3, "test_fraction": 0.3, "shard_size": 5,
    "max_bad_fraction": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def two_days(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with two batches of 12 and 2 images, and a folder of the user's own, all versioned by DVC."""
    folder = tmp_path_factory.mktemp("two days")
    root, inbox = Path(shutil.copytree(template, folder / "project", symlinks=True)), folder / "inbox"
    (root / MINE / "own").mkdir(parents=True)
    inbox.mkdir()
    for number in range(2):
        drop(root / MINE / f"own/{number}.png", blob(100 + number))
    drop(root / MINE / "own/metadata.csv", "file_name,text\n0.png,own\n1.png,own\n")
    with pytest.MonkeyPatch.context() as patch:
        for day, (start, stop) in zip(DAYS, ((0, 12), (12, 14)), strict=True):
            patch.setattr(clock, "now", lambda day=day: datetime(day.year, day.month, day.day, tzinfo=UTC))
            drop_many(inbox, start, stop)
            drop(inbox / f"{start:03d}.txt", 'a "quoted"\r\ncaption, of "ä"')
            done = ingest(root, inbox)
            assert done.batch == f"{MINE}/{day}" and done.newest == day
    return root


@pytest.fixture
def root(two_days: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_days, tmp_path / "project", symlinks=True))


def versioned(root: Path) -> set[str]:
    """The collection's files as DVC has them."""
    digest = yaml.safe_load((root / f"{MINE}.dvc").read_text())["outs"][0]["md5"]
    return {entry["relpath"] for entry in json.loads((root / f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}").read_text())}


def delete(root: Path, *names: str) -> None:
    for name in names:
        (root / MINE / name).unlink()


FIRST, SECOND = (f"{day}/" for day in DAYS)
DELETED = {  # what is deleted, and the batches that go with it
    "one": ([f"{FIRST}003.png"], []),
    "the first of each": ([f"{FIRST}000.png", f"{SECOND}012.png"], []),
    "a batch": ([f"{SECOND}012.png", f"{SECOND}013.png"], [SECOND]),
    "a batch and one": ([f"{FIRST}011.png", f"{SECOND}012.png", f"{SECOND}013.png"], [SECOND]),
}


@pytest.mark.parametrize("case", DELETED)
def test_the_rows_of_deleted_images_go_and_nothing_else_does(case: str, root: Path, tmp_path: Path) -> None:
    names, gone = DELETED[case]
    before, texts = contents(root / MINE), captions(root)
    delete(root, *names)
    without = read_folder(root / MINE)  # is passed over until then
    assert without.ignored == {"rows of deleted images": len(names)}
    write_shards(root / MINE, tmp_path / "before", **SHARDS)
    assert forget(root) == names
    after = contents(root / MINE)
    for batch in (FIRST, SECOND):
        lines = before[f"{batch}metadata.csv"].split(b'"\n"')
        kept = [line for line in lines if not line.startswith(tuple(n.removeprefix(batch).encode() for n in names))]
        expected = b'"\n"'.join(kept)
        if batch in gone:
            assert not (root / MINE / batch).exists()
        elif kept != lines:
            assert after[f"{batch}metadata.csv"].strip(b'"\n') == expected.strip(b'"\n')
    changed = {f"{name.split('/')[0]}/metadata.csv" for name in names}
    assert {n: c for n, c in before.items() if n not in {*changed, *names}} == {
        n: c for n, c in after.items() if n not in changed
    }
    assert captions(root) == {name: text for name, text in texts.items() if name not in names}
    assert not read_folder(root / MINE).ignored
    write_shards(root / MINE, tmp_path / "after", **SHARDS)
    assert contents(tmp_path / "before") == contents(tmp_path / "after")
    stamps = {path: path.stat().st_mtime_ns for path in (root / MINE).rglob("*")}
    assert forget(root) == [] and stamps == {path: path.stat().st_mtime_ns for path in (root / MINE).rglob("*")}
    version(root, root / MINE)
    assert versioned(root) == after.keys()


def test_ingest_does_it_too_and_says_so(root: Path, tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    delete(root, f"{SECOND}012.png", f"{SECOND}013.png", f"{FIRST}001.png")
    done = ingest(root, tmp_path / "inbox")
    assert done.forgotten == (f"{FIRST}001.png", f"{SECOND}012.png", f"{SECOND}013.png") and done.newest == DAYS[0]
    assert any(line.startswith("ingest: 3 deleted, their captions too: 2025-01-31/001.png, ") for line in done.lines())
    assert b"noise 13" not in b"".join(contents(root / MINE).values())


def test_a_collection_that_was_deleted_whole_is_versioned_so(root: Path, tmp_path: Path) -> None:
    """Else a run elsewhere would fetch and train on what was deleted."""
    (tmp_path / "inbox").mkdir()
    shutil.rmtree(root / MINE / "own")
    delete(root, *(name for name in contents(root / MINE) if name.endswith(".png")))
    done = ingest(root, tmp_path / "inbox")
    assert len(done.forgotten) == 14 and done.newest is None and not contents(root / MINE)
    assert done.pointer == f"{MINE}.dvc" and versioned(root) == set()


def test_a_deletion_elsewhere_is_an_incomplete_copy(root: Path) -> None:
    delete(root, "own/0.png")
    before = contents(root / MINE)
    assert forget(root) == [] and contents(root / MINE) == before
    with pytest.raises(InputError, match=r"own/metadata\.csv: names 1 images, as '0\.png', that are absent"):
        read_folder(root / MINE)


@pytest.mark.parametrize("other", ["renamed", "another table", "below", "no date", "deeper"])
def test_what_is_no_deletion_from_a_batch_stays_an_error(other: str, root: Path) -> None:
    batch = root / MINE / FIRST
    if other == "renamed":
        (batch / "003.png").rename(batch / "new.png")
    elif other == "another table":
        (batch / "metadata.csv").unlink()
        drop(batch / "metadata.jsonl", '{"file_name": "000.png", "text": "x"}\n{"file_name": "gone.png", "text": "x"}\n')
    elif other == "below":
        (batch / "below").mkdir()
        drop(batch / "below/metadata.csv", "file_name,text\ngone.png,x\n")
    elif other == "no date":
        batch.rename(root / MINE / "2025-02-30")
        delete(root, "2025-02-30/003.png")
    else:
        batch.rename(root / MINE / "own/2025-01-31")
        delete(root, "own/2025-01-31/003.png")
    with pytest.raises(InputError, match=r"that are absent|has no row for"):
        read_folder(root / MINE)


def test_what_was_never_fetched_is_no_deletion(root: Path) -> None:
    delete(root, f"{FIRST}003.png")
    digest = hashlib.md5(blob(3)).hexdigest()
    (root / f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}").unlink()
    before = contents(root / MINE)
    with pytest.raises(InputError, match=r"data\.path data/raw/mine: not all of it is here; `dvc pull`"):
        forget(root)
    assert contents(root / MINE) == before


@pytest.mark.parametrize("where", ["absent", "not versioned", "outside"])
def test_there_is_nothing_to_forget_where_ingest_has_made_nothing(where: str, root: Path, tmp_path: Path) -> None:
    delete(root, f"{FIRST}003.png")
    if where == "absent":
        (root / MINE).rename(tmp_path / "aside")
    elif where == "not versioned":
        (root / f"{MINE}.dvc").unlink()
    else:
        shutil.move(root / MINE, tmp_path / "mine")
        shutil.move(root / f"{MINE}.dvc", tmp_path / "mine.dvc")
        params = yaml.safe_load((root / "params.yaml").read_text())
        params["data"]["path"] = str(tmp_path / "mine")
        (root / "params.yaml").write_text(yaml.safe_dump(params))
    before = contents(tmp_path)
    assert forget(root) == [] and {n: c for n, c in contents(tmp_path).items() if not n.endswith("ingest.lock")} == {
        n: c for n, c in before.items() if not n.endswith("ingest.lock")
    }


def test_a_batch_with_other_files_goes_whole_and_one_with_other_images_stays(root: Path) -> None:
    drop(root / MINE / SECOND / "notes.txt", "x")
    drop(root / MINE / FIRST / "new.heic", b"x")
    delete(root, f"{SECOND}012.png", f"{SECOND}013.png", *(f"{FIRST}{number:03d}.png" for number in range(12)))
    assert len(forget(root)) == 14
    assert not (root / MINE / SECOND).exists()
    assert (root / MINE / FIRST / "metadata.csv").read_text() == '"file_name","text"\n'
    assert read_folder(root / MINE).table.file_name.tolist() == ["own/0.png", "own/1.png"]


@pytest.mark.parametrize("seed", with_soak(3, 12))
def test_killed_at_any_moment_a_table_is_the_old_or_the_new(seed: int, root: Path) -> None:
    names = [f"{FIRST}000.png", f"{SECOND}012.png", f"{SECOND}013.png"]
    delete(root, *names)
    finished = Path(shutil.copytree(root, root.with_name("finished"), symlinks=True))
    before = contents(root / MINE)

    def killed(root: Path, moment: int | None) -> tuple[int, bool]:
        def asks(event: str, arguments: tuple[Any, ...]) -> bool:
            named = any(isinstance(a, str | os.PathLike) and os.fspath(a).startswith(str(root / MINE)) for a in arguments)
            return named and event.startswith(("open", "os.", "shutil."))

        return run_until_killed(lambda: forget(root), asks, moment)

    moments, _ = killed(finished, None)
    after = contents(finished / MINE)
    assert killed(root, int(np.random.default_rng(seed).integers(1, moments)))[1]
    here = {name: content for name, content in contents(root / MINE).items() if not name.startswith(".")}
    for batch in (FIRST, SECOND):
        part = [{n: c for n, c in files.items() if n.startswith(batch)} for files in (here, before, after)]
        assert part[0] in part[1:]
    forget(root)
    assert contents(root / MINE) == after


def test_newest_is_by_the_names_that_ingest_gives(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") is None and newest(tmp_path) is None
    for name in ("2025-01-31", "2025-01-31-12", "2024-12-31-2", "2025-02-30", "2026", "cats", ".2027-01-01", "2027-01-01x"):
        (tmp_path / name).mkdir()
    (tmp_path / "2028-01-01").touch()
    assert newest(tmp_path) == date(2025, 1, 31)
