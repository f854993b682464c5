"""300 photographs of twenty shapes with captions of 5 to 300 tokens, through the whole pipeline."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from photographs import LONGEST, SHAPES, SHORTEST, write_photographs
from PIL import Image, ImageOps
from tiny import TINY, clone, environment, metrics, set_params

from ldm.data.latents import EMPTY, open_latents
from ldm.data.shapes import Buckets

BUCKETS = {"kind": "buckets", "step": 8, "max_aspect": 2.0}
SETTINGS = {
    **TINY,
    "data": {"path": "photographs", "image_size": 32, "channels": 3, "shapes": BUCKETS, "shard_size": 16},
    "text": {"max_tokens": LONGEST},
    "evaluate": {**TINY["evaluate"], "test_images": 24, "samples": 12, "metrics": metrics(4)},
}
STAGES = ("code", "shard", "pretrained", "train_vae", "cache_latents", "train_unet", "evaluate")
RUN = """
import sys
from importlib import import_module
from pathlib import Path
for stage in sys.argv[1:]:
    import_module(f"ldm.stages.{stage}").run(Path.cwd())
"""


def run(root: Path, *stages: str) -> "subprocess.CompletedProcess[str]":
    """The stages one after the other, in one process."""
    command = [sys.executable, "-c", RUN, *stages]
    return subprocess.run(command, cwd=root, env=environment(PYTHONPATH=str(root)), capture_output=True, text=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]], str]]:
    """A project after a run, the rows of its photographs, and what was printed."""
    root = clone(tmp_path_factory.mktemp("photographs") / "project")
    rows = write_photographs(root / "photographs")
    set_params(root, SETTINGS)
    done = run(root, *STAGES)
    assert done.returncode == 0, done.stderr[-3000:]
    yield root, rows, done.stdout


def samples(root: Path, split: str = "*") -> Iterator[dict[str, Any]]:
    """The samples of shards, read by Python's own tarfile: their parts, `file_name`, `texts` and the name of the tar."""
    for path in sorted((root / "data/shards").glob(f"{split}-*.tar")):
        with tarfile.open(path) as members:
            files = {member.name: members.extractfile(member).read() for member in members}  # type: ignore[union-attr]
        for key in sorted({name.partition(".")[0] for name in files}):
            parts = {name.partition(".")[2]: blob for name, blob in files.items() if name.startswith(f"{key}.")}
            meta = json.loads(parts["json"])
            texts = meta.get("captions", [parts["txt"].decode()])
            yield {**parts, "file_name": meta["file_name"], "texts": texts, "tar": path.name, "key": key}


def expected(path: Path, shapes: tuple[tuple[int, int], ...]) -> tuple[Image.Image, float]:
    """The picture as a shard has it, and the share of it that was cropped, from the stated rule and Pillow alone."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    ratio = image.width / image.height
    height, width = min(shapes, key=lambda shape: abs(np.log(ratio / (shape[1] / shape[0]))))
    scale = min(image.width / width, image.height / height)  # source pixels in a pixel
    across, down = width * scale, height * scale
    left, top = (image.width - across) / 2, (image.height - down) / 2
    fitted = image.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + across, top + down))
    return fitted, 1 - across * down / (image.width * image.height)


def test_every_picture_and_caption_of_every_shard_is_that_of_its_file(project: tuple[Path, list[dict[str, Any]], str]) -> None:
    """Read by Python's own tarfile: pixels but for the stated crop, captions, keys; and nothing else was left out."""
    root, rows, printed = project
    shapes, by_name = Buckets(**BUCKETS).shapes(32), {row["file_name"]: row for row in rows}
    seen, cropped, sizes = set[str](), list[float](), dict[str, set[tuple[int, int]]]()
    for sample in samples(root):
        path, row = root / "photographs" / sample["file_name"], by_name[sample["file_name"]]
        picture, share = expected(path, shapes)
        stored = Image.open(io.BytesIO(sample["png"]))
        assert stored.mode == "RGB" and np.array_equal(np.asarray(stored), np.asarray(picture)), sample["file_name"]
        assert sample["key"][:16] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        assert sample["texts"] == row["text"] and sample["txt"].decode() == row["text"][0]
        seen.add(sample["file_name"])
        cropped.append(share)
        sizes.setdefault(sample["tar"], set()).add(stored.size)
    assert {len(found) for found in sizes.values()} == {1}  # a shard has one shape
    assert seen == set(by_name) and len(SHAPES) == len(set(SHAPES)) == 20
    index = json.loads((root / "data/shards/index.json").read_text())
    assert index["cropped"] == pytest.approx({"mean": np.mean(cropped), "largest": max(cropped)}, abs=1e-6)
    assert f"cropped {np.mean(cropped):.1%} of an image on average, {max(cropped):.1%} at most" in printed
    assert {(shard["shape"][1], shard["shape"][0]) for shard in index["shards"]} == set.union(*sizes.values())
    assert len(shapes) == 3


def test_captions_are_counted_in_tokens(project: tuple[Path, list[dict[str, Any]], str]) -> None:
    """By their making: a word is a token, and there are two special ones."""
    root, rows, printed = project
    lengths = [len(text.split()) + 2 for row in rows for text in row["text"]]
    assert [len(row["text"][0].split()) + 2 for row in rows] == [row["tokens"] for row in rows]
    assert (min(lengths), max(lengths)) == (SHORTEST, LONGEST)
    distinct = {text for row in rows for text in row["text"]}
    found = f"tokens: {SHORTEST} to {LONGEST}, median {np.median([len(text.split()) + 2 for text in distinct]):.0f} (minilm)"
    assert f"{found}; 0 of {len(distinct)} distinct captions" in printed
    kept = {text for split in ("train", "val") for meta in samples(root, split) for text in meta["texts"]}
    cached = open_latents(root / "data/latents", "train")
    _, counts = cached.rows(np.arange(len(kept) + 1))
    assert counts[EMPTY] == 2
    assert sorted(counts[1:]) == sorted(len(text.split()) + 2 for text in kept)


def test_a_run_that_would_cut_captions_stops_before_it_writes_anything(
    project: tuple[Path, list[dict[str, Any]], str], tmp_path: Path
) -> None:
    root, rows, _ = project
    other = clone(tmp_path / "project")
    (other / "photographs").symlink_to(root / "photographs")
    set_params(other, SETTINGS | {"text": {"max_tokens": 77}})
    done = run(other, "code", "shard")
    lengths = {text: len(text.split()) + 2 for row in rows for text in row["text"]}
    cut = sum(length > 77 for length in lengths.values())
    assert done.returncode != 0 and not (other / "data/shards").exists()
    assert (
        f"InputError: {cut} of {len(lengths)} distinct captions would be cut at text.max_tokens 77; the longest has 300"
        in done.stderr
    )


def test_every_test_image_has_its_own_bound_in_bits_of_its_own_dimensions(
    project: tuple[Path, list[dict[str, Any]], str],
) -> None:
    root, _, _ = project
    bounds, numbers = pd.read_csv(root / "reports/bounds.csv"), json.loads((root / "reports/metrics.json").read_text())
    assert len(bounds) == 24 == numbers["test_images"] and bounds.dims.nunique() > 1
    bits = -bounds.nats / (bounds.dims * np.log(2))
    assert numbers["bits_per_dim"] == pytest.approx(bits.mean()) and numbers["bits_per_dim_se"] == pytest.approx(bits.sem())
    keys = [sample["key"] for sample in samples(root, "test")]
    assert sorted(bounds.key) == sorted(keys)[:24]  # of the smallest hashes


@pytest.mark.parametrize(("size", "expected"), [("48x24", (48, 24)), ("24x40", (24, 40)), (None, (32, 32))])
def test_images_of_any_size_are_drawn(size: str | None, expected: tuple[int, int], project: Any, tmp_path: Path) -> None:
    root, _, _ = project
    options = [] if size is None else ["--size", size]
    command = ["sample", "--model", "models/ldm", "--prompt", "red house", "--out", str(tmp_path / "x.png"), *options]
    code = f"from ldm.cli import app; app({command!r})"
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment(PYTHONPATH=str(root)), check=True)
    assert Image.open(tmp_path / "x.png").size == expected
