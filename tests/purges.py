"""Nights of a project whose collection changes, for tests of purges: shards, latents and versions without training."""

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from dvc.repo import Repo
from PIL import Image
from torch import Tensor

from ldm.base.memory import Parts
from ldm.config import load_settings
from ldm.data.caption_columns import all_captions
from ldm.data.encoding import write_latents
from ldm.data.reader import open_shards
from ldm.data.shards import split_of, write_shards
from ldm.registry import registration
from ldm.stages import code

MINE = "data/raw/mine"
DATA = {
    "path": MINE, "image_size": 8, "channels": 1, "resize_filter": "box", "val_fraction": 0.2, "test_fraction": 0.2,
    "shard_size": 5, "max_bad_fraction": 0.1,
}  # fmt: skip


def noise(seed: int, side: int, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def in_split(split: str, side: int, form: str) -> bytes:
    """An image whose hash puts it there."""
    blobs = (noise(seed, side, form) for seed in range(1000, 2000))
    return next(blob for blob in blobs if split_of(hashlib.sha256(blob).hexdigest(), 0.2, 0.2) == split)


def write_collection(root: Path, images: dict[str, bytes]) -> None:
    shutil.rmtree(root / MINE, ignore_errors=True)
    for name, content in images.items():
        (root / MINE / name).parent.mkdir(parents=True, exist_ok=True)
        (root / MINE / name).write_bytes(content)
    pd.DataFrame({"file_name": sorted(images), "text": "noise"}).to_csv(root / MINE / "metadata.csv", index=False)


def embed(texts: list[str]) -> tuple[Tensor, Tensor]:
    return torch.ones(len(texts), 2, 3), torch.ones(len(texts), 2, dtype=torch.bool)


def run_night(root: Path, autoencoder: str = "a") -> None:
    """What the stages `shard` and `cache_latents` do, committed and pushed by DVC."""

    def encode(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(pixels.astype(np.float32))[:, :, ::2, ::2] / ord(autoencoder)
        return x, x - 1

    data = load_settings(root).data.model_dump(exclude={"path", "source"})
    write_shards(root / MINE, root / "data/shards", **data)
    readers = {split: open_shards(root / "data/shards", split) for split in ("train", "val")}
    identity = {"autoencoder": autoencoder * 64, "text": {}, "text_encoder": "t" * 64, "text_width": 3}
    write_latents(
        readers, root / "data/latents", encode, embed, identity, lambda done: None, store=root / ".ldm/store/latents", code="c",
        divide=Parts(torch.device("cpu")), texts=all_captions,
    )  # fmt: skip
    (root / "models/autoencoder").mkdir(parents=True, exist_ok=True)
    (root / "models/autoencoder/config.json").write_text(autoencoder)
    code.run(root)
    with contextlib.chdir(root), Repo(".") as repo:
        repo.add([MINE])
        repo.commit("shard", force=True)
        repo.commit("cache_latents", force=True)
        repo.push()


def register(root: Path, number: int) -> None:
    """A version with this night's dvc.lock."""
    (root / "models/ldm").mkdir(parents=True, exist_ok=True)
    (root / "reports").mkdir(exist_ok=True)
    sampling = load_settings(root).sampling.model_dump()
    (root / "models/ldm/model.json").write_text(json.dumps({"sampling": sampling, "number": number}))
    (root / "reports/bounds.csv").write_text("key,nats\na,-1.5\n")
    (root / "reports/metrics.json").write_text(json.dumps({"bits_per_dim": 3.0, "image": "8x8x1, box", "test_images": 1}))
    (root / "reports/report.html").write_text("<p>report</p>")
    assert registration.register(root).version == number


def objects(folder: Path) -> list[Path]:
    """Every object of cache and remote."""
    return [path for place in ("project/.dvc/cache", "remote") for path in (folder / place).rglob("*") if path.is_file()]


def everything(folder: Path) -> dict[str, bytes]:
    """Every file in which data may be, by its path."""
    paths = [*objects(folder), *(path for place in (".ldm", "data") for path in (folder / "project" / place).rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}
