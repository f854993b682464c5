"""The list of places where pixels and captions lie, against what is really on the disk, and what a purge leaves of an image."""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from blobs import run_stages
from dvc.repo import Repo
from kills import run_until_killed
from PIL import Image
from safetensors.numpy import load as load_tensors
from tiny import TINY, clone, set_params

from ldm.base.errors import InputError
from ldm.collection.ingest import ingest
from ldm.collection.places import PLACES, UNTOUCHED, place_of
from ldm.collection.purge import purge
from ldm.data.shards import split_of

MINE = "data/raw/mine"
SETTINGS = TINY | {
    "data": {"path": MINE, "image_size": 8, "channels": 1, "resize_filter": "box", "val_fraction": 0.2, "test_fraction": 0.2},
    "train_vae": {"images": 128, "batch_size": 64, "warmup_images": 0},
}
CAPTION = "an axolotl nobody else has"


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


SECRET = next(seed for seed in range(1000, 2000) if split_of(hashlib.sha256(png(picture(seed))).hexdigest(), 0.2, 0.2) == "train")


def contents(blob: bytes) -> list[bytes]:
    """A file's bytes, and what is packed in there: members of tars, pixels of pictures, tensors."""
    found = [blob]
    if blob.startswith(b"\x89PNG"):
        with Image.open(io.BytesIO(blob)) as image:
            found.append(np.asarray(image.convert("L")).tobytes())
    elif blob[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
            members = [tar.extractfile(member) for member in tar if member.isfile()]
            found += [part for member in members if member for part in contents(member.read())]
    else:
        try:
            found += [tensor.tobytes() for tensor in load_tensors(blob).values()]
        except Exception:  # of many kinds: it is no safetensors file
            return found
    return found


def traces(root: Path) -> set[str]:
    """The files that have the secret image's bytes, its pixels, or its caption."""
    marks = (png(picture(SECRET)), picture(SECRET).tobytes(), CAPTION.encode(), json.dumps(CAPTION).encode())
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_relative_to(root / "tests")]
    return {
        str(path.relative_to(root)) for path in files for part in contents(path.read_bytes()) if any(m in part for m in marks)
    }


def add(folder: Path, name: str, seed: int, caption: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(png(picture(seed)))
    (folder / f"{name}.txt").write_text(caption)


def night(root: Path) -> None:
    """Stages, and what DVC and git record of them."""
    run_stages(root, "code", "shard", "pretrained", "train_vae", "cache_latents")
    with Repo(str(root)) as repo:
        repo.add([str(root / MINE)])
        repo.commit("shard", force=True)
        repo.commit("cache_latents", force=True)


def unplaced(root: Path) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()} - set(listed.split("\0"))
    return sorted(file for file in files if "__pycache__" not in file and not place_of(PurePosixPath(file), PurePosixPath(MINE)))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that has seen the image, in all that stages, dead processes and a diverged training leave; it is deleted now."""
    root = clone(tmp_path / "project")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
    monkeypatch.chdir(root)
    set_params(root, SETTINGS)
    for number in range(30):
        add(root / MINE, f"monday/{number:02d}", number, f"noise {number % 3}")
    add(root / MINE, "monday/secret", SECRET, CAPTION)
    night(root)

    def kill_before(work, event: str, *words: str) -> None:
        asks = lambda name, arguments: name == event and all(word in str(arguments) for word in words)  # noqa: E731
        assert run_until_killed(work, asks, 1)[1]

    kill_before(lambda: run_stages(root, "shard"), "open", "data/shards.partial/index.json")
    (root / ".ldm/shards").mkdir()
    for tar in (root / "data/shards").glob("train-*.tar"):  # as fetched
        shutil.copy(tar, root / ".ldm/shards" / hashlib.sha256(tar.read_bytes()).hexdigest())
    inbox = tmp_path / "inbox"
    add(inbox, "other", 5000, "another")
    add(root / MINE, "monday/secret", 5001, "replaced for a moment")  # else it would be known
    add(inbox, "again", SECRET, CAPTION)
    kill_before(lambda: ingest(root, inbox, settle=0), "os.rename", ".ingest.partial")
    set_params(root, {"train_vae": {"lr": 1e30}})
    add(root / MINE, "monday/secret", SECRET, CAPTION)
    (root / MINE / ".ingest.partial").rename(root / "aside")  # not of this stage
    run_stages(root, "shard")
    with pytest.raises(InputError, match="bad_batch"):
        run_stages(root, "train_vae")
    set_params(root, {"train_vae": {"lr": 3e-3}})
    for suffix in ("png", "txt"):
        (root / MINE / f"monday/secret.{suffix}").unlink()
    night(root)
    (root / "aside").rename(root / MINE / ".ingest.partial")
    (root / ".dvc/cache/removed").mkdir()  # by an `ldm gc` that was killed
    (root / ".dvc/cache/removed/md5").write_bytes(png(picture(SECRET)))
    kill_before(lambda: run_stages(root, "shard"), "open", "data/shards.partial/index.json")
    return root


def test_after_a_purge_nothing_of_the_image_is_left_but_where_the_report_says_so(root: Path) -> None:
    assert unplaced(root) == []
    before = traces(root)
    kinds = {place_of(PurePosixPath(file), PurePosixPath(MINE)) for file in before}
    assert {place.holds for place in kinds if place} >= {"leftover", "batch", "download", "objects", "removed"}
    assert any(file.startswith(f"{MINE}/.ingest.partial/") for file in before)
    purged = purge(root, "monday/secret.png")
    assert set(purged.copies.kind) >= {"leftover", "batch", "download", "latents", "caption", "image", "shard"}
    left = {place_of(PurePosixPath(file), PurePosixPath(MINE)) for file in traces(root)}
    assert {place.fate for place in left if place} <= {"stays"} and None not in left
    assert all(place.holds in UNTOUCHED for place in left if place)
    assert not list(root.glob("data/*.partial")) and not (root / MINE / ".ingest.partial").exists()
    assert all((root / MINE / f"monday/{number:02d}.png").is_file() for number in range(30))
    with Repo(".") as repo:
        assert repo.status(["shard", "cache_latents", f"{MINE}.dvc"]) == {}


def test_the_longest_pattern_counts() -> None:
    collection = PurePosixPath("data/raw/source")
    for path, holds in {
        "data/raw/source/.ingest.partial/a.png": "leftover", "data/raw/source.partial/deep/a.png": "leftover",
        "data/shards.replaced/a.tar": "leftover", "data/raw/source/a.png": "collection", "data/shards/a.tar": "shards",
        ".ldm/work/train_vae/key/bad_batch_0.safetensors": "batch", ".ldm/work/train_vae/key/work.json": "trained weights",
    }.items():  # fmt: skip
        found = place_of(PurePosixPath(path), collection)
        assert found and found.holds == holds, path
    assert place_of(PurePosixPath("elsewhere/a.png"), collection) is None
    assert len({place.pattern for place in PLACES}) == len(PLACES)


@pytest.mark.parametrize("name", ["mine[1]", "mine*", "mine?"])
def test_a_collection_of_any_name_is_one_place(name: str, tmp_path: Path) -> None:
    collection = PurePosixPath(f"data/{name}")
    for folder in (collection, PurePosixPath("data/mine1")):
        (tmp_path / folder / ".ingest.partial").mkdir(parents=True)
        (tmp_path / folder / ".ingest.partial/a.png").touch()
    for kind in (place for place in PLACES if place.pattern == "COLLECTION/.ingest.partial"):
        assert kind.files(tmp_path, collection) == [tmp_path / collection / ".ingest.partial/a.png"]
    found = place_of(collection / "a.png", collection)
    assert found and found.holds == "collection" and place_of(PurePosixPath("data/mine1/a.png"), collection) is None
