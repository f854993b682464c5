"""Stages that read their shards from a URL: the same as those here, or refused."""

import json
import shutil
from pathlib import Path

import pytest
from image_folders import OPTIONS, make_folder, numbered

from ldm.base.errors import InputError
from ldm.data.reader import stage_shards
from ldm.data.shards import write_shards


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_folder(tmp_path / "source", numbered(40))
    write_shards(tmp_path / "source", tmp_path / "project/data/shards", **OPTIONS)
    return tmp_path / "project"


@pytest.fixture
def url(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shutil.copytree(root / "data/shards", tmp_path / "far")
    monkeypatch.setenv("LDM_SHARDS", f"file://{tmp_path}/far")
    return f"file://{tmp_path}/far"


def test_shards_here_and_there_are_the_same(root: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    far = stage_shards(root, "val")
    monkeypatch.delenv("LDM_SHARDS")
    near = stage_shards(root, "val")
    assert [far[i].key for i in range(len(far))] == [near[i].key for i in range(len(near))]
    assert far.digest == near.digest
    assert {path.suffix for path in (root / ".ldm/shards").iterdir()} == {""}
    shutil.rmtree(root / "data/shards")  # a machine that has none of its own
    monkeypatch.setenv("LDM_SHARDS", url)
    assert stage_shards(root, "val").digest == near.digest


def test_other_shards_there_are_refused(root: Path, url: str) -> None:
    path = Path(url.removeprefix("file://")) / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"its index\.json is not that of"):
        stage_shards(root, "train")


def test_the_cache_is_bounded_by_the_environment(root: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_SHARD_CACHE_GB", "1e-6")
    with pytest.raises(InputError, match=r"do not fit in .* which may hold 1,000"):
        stage_shards(root, "train")[0]
    monkeypatch.setenv("LDM_SHARD_CACHE_GB", "much")
    with pytest.raises(InputError, match="LDM_SHARD_CACHE_GB is 'much'"):
        stage_shards(root, "train")
