"""The latent cache: posterior moments of every image and the text embeddings, with what they were made from.

One safetensors file per shard: `mean`, `logvar` (N, c, h, w), mirrored images after the others; `caption` (N,) pointing
into `text` (U, T, D) and `text_mask` (U, T), one row for each distinct caption of the shard. Beside them
`empty.safetensors` (the embedded empty caption) and `manifest.json`. Never a baked sample and never a baked scale.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.files import replacing
from ldm.base.hashing import canonical_json, content_hash, file_hash
from ldm.data.reader import ShardReader
from ldm.data.store import find, link, prune_store

Encode = Callable[[np.ndarray], tuple[Tensor, Tensor]]  # uint8 images -> posterior mean and log-variance
Embed = Callable[[list[str]], tuple[Tensor, Tensor]]  # texts -> token embeddings and masks


def write_latents(
    readers: dict[str, ShardReader],
    out: Path,
    encode: Encode,
    embed: Embed,
    identity: dict[str, Any],
    progress: Callable[[int], None],
    *,
    store: Path,
    code: str,
    flip: bool = False,
    batch_size: int = 256,
) -> tuple[dict[str, Any], int]:
    """Encode every image and caption of `readers` (by split) to `out`, all or nothing; returns the manifest and how many
    files were reused.

    `identity` names what they are made by (hash of the autoencoder, of the text encoder, …) and stands in the
    manifest beside the hash of each input shard and per-channel statistics of the training latents. With `flip`,
    training images are encoded a second time, mirrored: their rows follow those of the shard's images.

    Files are kept in `store` under the hash of `identity`, `code` (what else decides about the bytes: versions, device),
    and their shard, and linked to `out`; a shard that was encoded before is not encoded again. At the end the store holds
    what `out` holds and nothing else, so that an image that left the shards leaves the store.
    """
    store.mkdir(parents=True, exist_ok=True)
    files, moments, reused = [], _Moments(), 0
    done = 0
    progress(done)
    with replacing(out) as partial:
        for split, reader in readers.items():
            for shard, positions in reader.shard_positions():
                mirrored = flip and split == "train"
                preprocessing = reader.index["preprocessing"]
                made_from = {"preprocessing": preprocessing, "shard": shard["sha256"], "flip": mirrored, "code": code}
                key = content_hash(canonical_json({**identity, **made_from}).encode())
                kept = find(store, key)
                if kept:
                    reused += 1
                else:
                    kept = _keep(store, key, _encode_shard(reader, positions, encode, embed, batch_size, mirrored))
                tensors = load_file(kept)
                if split == "train":
                    moments.add(tensors["mean"], tensors["logvar"])
                name = Path(shard["name"]).with_suffix(".safetensors").name
                link(kept, partial / name)
                digest = kept.stem.rpartition("-")[2]
                entry = {"name": name, "split": split, "count": len(tensors["mean"])}
                files.append({**entry, "sha256": digest, "shard_sha256": shard["sha256"]})
                done += len(positions)
                progress(done)
        text, mask = embed([""])
        save_file({"text": text, "text_mask": mask}, partial / "empty.safetensors")
        manifest = {
            "version": 2,
            **identity,
            "preprocessing": preprocessing,
            "flip": flip,
            "files": files,
            "latent_mean": moments.mean.tolist(),
            "latent_std": moments.std.tolist(),
        }
        (partial / "manifest.json").write_text(canonical_json(manifest))
    prune_store(store, out)
    return manifest, reused


def _encode_shard(
    reader: ShardReader, positions: range, encode: Encode, embed: Embed, batch_size: int, mirrored: bool
) -> dict[str, Tensor]:
    batches = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
    parts = [encode(images) for images in _decoded_ahead(reader, batches)]
    if mirrored:
        parts += [encode(np.flip(images, -1).copy()) for images in _decoded_ahead(reader, batches)]
    texts = reader.captions_of(positions).text.tolist()
    distinct = sorted(set(texts), key=lambda text: content_hash(text.encode()))
    number = {text: i for i, text in enumerate(distinct)}
    text, mask = embed(distinct)
    return {
        "mean": torch.cat([mean for mean, _ in parts]).contiguous(),
        "logvar": torch.cat([logvar for _, logvar in parts]).contiguous(),
        "caption": torch.tensor([number[text] for text in texts] * (2 if mirrored else 1)),
        "text": text,
        "text_mask": mask,
    }


def _decoded_ahead(reader: ShardReader, batches: list[range]) -> Iterator[np.ndarray]:
    """The images of each batch, read while the one before is being encoded."""
    with ThreadPoolExecutor(1) as pool:
        following = [pool.submit(reader.images, batch) for batch in batches[:1]]
        for batch in batches[1:]:
            images = following.pop().result()
            following.append(pool.submit(reader.images, batch))
            yield images
        yield from (last.result() for last in following)


def _keep(store: Path, key: str, tensors: dict[str, Tensor]) -> Path:
    partial = store / f"{key}.{os.getpid()}.partial"
    save_file(tensors, partial)
    path = store / f"{key}-{file_hash(partial)}.safetensors"
    os.replace(partial, path)
    return path


class _Moments:
    """Per-channel mean and standard deviation of z ~ q(z | x), by the law of total variance, in float64."""

    def __init__(self) -> None:
        self._count, self._sum, self._square = 0, torch.zeros(()), torch.zeros(())

    def add(self, mean: Tensor, logvar: Tensor) -> None:
        mean, variance = mean.double(), logvar.double().exp()
        self._count += mean[:, 0].numel()
        self._sum = self._sum + mean.sum((0, 2, 3))
        self._square = self._square + (mean.square() + variance).sum((0, 2, 3))

    @property
    def mean(self) -> Tensor:
        return self._sum / self._count

    @property
    def std(self) -> Tensor:
        return (self._square / self._count - self.mean.square()).sqrt()


@dataclass(frozen=True)
class Latents:
    """One split in memory. `text` holds a row per distinct caption of each shard, the empty caption last."""

    mean: Tensor  # (N, c, h, w)
    logvar: Tensor  # (N, c, h, w)
    caption: Tensor  # (N,) rows of `text`
    text: Tensor  # (U, T, D)
    text_mask: Tensor  # (U, T)
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.mean)


def open_latents(folder: Path, split: str, **expected: str) -> Latents:
    """Load the cached latents of a split; `expected` entries of the manifest that differ are refused by name."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run the `cache_latents` stage (dvc repro cache_latents)") from None
    for name, value in expected.items():
        if manifest.get(name) != value:
            raise InputError(
                f"{path}: {name} is {manifest.get(name)}, expected {value}: the latents are stale; run `cache_latents` again"
            )
    files = [load_file(folder / file["name"]) for file in manifest["files"] if file["split"] == split]
    empty = load_file(folder / "empty.safetensors")
    offsets = np.cumsum([0, *(len(file["text"]) for file in files)]).tolist()
    return Latents(
        mean=torch.cat([file["mean"] for file in files]),
        logvar=torch.cat([file["logvar"] for file in files]),
        caption=torch.cat([file["caption"] + start for file, start in zip(files, offsets, strict=False)]),
        text=torch.cat([*(file["text"] for file in files), empty["text"]]),
        text_mask=torch.cat([*(file["text_mask"] for file in files), empty["text_mask"]]),
        manifest=manifest,
    )
