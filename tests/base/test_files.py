"""Folders written whole or not at all, also after a kill between the two renames, and behind a link."""

import os
from pathlib import Path

import pytest

from ldm.base.files import replacing


def write(out: Path, text: str) -> None:
    with replacing(out) as partial:
        (partial / "file").write_text(text)


def test_the_new_takes_the_place_of_the_old(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write(tmp_path / "out", text)
        assert (tmp_path / "out/file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("killed", [False, True])
def test_after_an_error_the_old_is_there(killed: bool, tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    if killed:  # after the first of the two renames
        os.rename(tmp_path / "out", tmp_path / "out.replaced")
    with pytest.raises(ValueError, match="no"), replacing(tmp_path / "out") as partial:
        (partial / "file").write_text("new")
        raise ValueError("no")
    assert (tmp_path / "out/file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_elsewhere_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here/out").symlink_to(tmp_path / "disk/out", target_is_directory=True)
    for text in ("first", "second", "third"):
        write(tmp_path / "here/out", text)
        assert (tmp_path / "disk/out/file").read_text() == text
    assert (tmp_path / "here/out").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
