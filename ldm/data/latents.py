"""The latent cache: posterior moments of every image and text embeddings of every caption; README.md says which files."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.base.errors import InputError
from ldm.base.files import canonical_json, content_hash, file_hash, replacing
from ldm.base.lazy import Tensor, torch
from ldm.data.reader import ShardReader

Encode = Callable[[np.ndarray], tuple[Tensor, Tensor]]  # uint8 images -> posterior mean and log-variance
Embed = Callable[[list[str]], tuple[Tensor, Tensor]]  # texts -> token embeddings and masks


def write_latents(
    readers: dict[str, ShardReader], out: Path, encode: Encode, embed: Embed, identity: dict[str, Any],
    progress: Callable[[int], None], *, store: Path, code: str, flip: bool = False, batch_size: int = 256,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """Encode all images and captions of `readers` (by split) to `out`, all or nothing; training images also mirrored with `flip`.

    Returns the manifest, with `identity` (hashes of autoencoder, text encoder, …) in it, and how many files came from the store.
    The files are links to `store/KEY-SHA256.safetensors`: the key is of `identity`, shard and `code`, all that decides the bytes.
    """
    from safetensors.torch import load_file

    from ldm.base.tensors import save_tensors

    store.mkdir(parents=True, exist_ok=True)
    files, totals, reused, done = [], torch.zeros(()), 0, 0
    progress(done)
    with replacing(out) as partial:
        for split, reader in readers.items():
            mirrored = flip and split == "train"
            made_from = {**identity, "preprocessing": reader.index["preprocessing"], "flip": mirrored, "code": code}
            for shard, positions in reader.shard_positions():
                key = content_hash(canonical_json({**made_from, "shard": shard["sha256"]}).encode())
                sound = (path for path in store.glob(f"{key}-*") if path.name == f"{key}-{file_hash(path)}.safetensors")
                if kept := next(sound, None):
                    reused += 1
                else:
                    new = store / f"{key}.{os.getpid()}.partial"
                    save_tensors(_encode_shard(reader, positions, encode, embed, batch_size, mirrored), new)
                    kept = new.rename(store / f"{key}-{file_hash(new)}.safetensors")
                tensors = load_file(kept)
                if split == "train":  # latents z ~ q(z | x): their number, their sum and the expected sum of their squares
                    mean, variance = tensors["mean"].double(), tensors["logvar"].double().exp()
                    squares = (mean.square() + variance).sum((0, 2, 3))
                    totals = totals + torch.stack([torch.full_like(squares, mean[:, 0].numel()), mean.sum((0, 2, 3)), squares])
                name = Path(shard["name"]).with_suffix(".safetensors").name
                try:
                    os.link(kept, partial / name)
                except OSError:  # another file system, or one without hard links
                    shutil.copyfile(kept, partial / name)
                hashes = {"sha256": kept.stem.rpartition("-")[2], "shard_sha256": shard["sha256"]}
                files.append({"name": name, "split": split, **hashes, "count": len(tensors["mean"])})
                done += len(positions)
                progress(done)
        text, mask = embed([""])
        save_tensors({"text": text, "text_mask": mask}, partial / "empty.safetensors")
        mean, square = totals[1:] / totals[0]  # per channel, float64 (c,)
        facts = {"version": 2, "preprocessing": made_from["preprocessing"], "flip": flip, "files": files}
        manifest = {**identity, **facts, "latent_mean": mean.tolist(), "latent_std": (square - mean**2).sqrt().tolist()}
        (partial / "manifest.json").write_text(canonical_json(manifest))
    return manifest, reused


def _encode_shard(
    reader: ShardReader, positions: range, encode: Encode, embed: Embed, batch_size: int, mirrored: bool
) -> dict[str, Tensor]:
    batches = [positions[i : i + batch_size] for i in range(0, len(positions), batch_size)]
    plain, flipped = [], []
    with ThreadPoolExecutor(1) as pool:  # reads the next batch while this one is encoded
        pending = pool.submit(reader.images, batches[0])
        for following in [*batches[1:], None]:
            images = pending.result()
            if following:
                pending = pool.submit(reader.images, following)
            plain.append(encode(images))
            if mirrored:
                flipped.append(encode(np.flip(images, -1).copy()))
    mean, logvar = (torch.cat(moments).contiguous() for moments in zip(*plain, *flipped, strict=True))
    texts = reader.captions_of(positions).text.tolist()
    distinct = sorted(set(texts), key=lambda text: content_hash(text.encode()))
    number = {text: i for i, text in enumerate(distinct)}
    text, mask = embed(distinct)
    caption = torch.tensor([number[text] for text in texts] * (2 if mirrored else 1))
    return {"mean": mean, "logvar": logvar, "caption": caption, "text": text, "text_mask": mask}


@dataclass(frozen=True)
class Latents:
    """The latents of one split, in memory. `text` has a row for each distinct caption of each shard, then the empty caption."""

    mean: Tensor  # (N, c, h, w)
    logvar: Tensor  # (N, c, h, w)
    caption: Tensor  # (N,) rows of `text`
    text: Tensor  # (U, T, D)
    text_mask: Tensor  # (U, T)
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.mean)


def open_latents(folder: Path, split: str, **expected: str) -> Latents:
    """Load the latents of a split; raises `InputError` if an entry of the manifest is not as `expected`."""
    from safetensors.torch import load_file

    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run the `cache_latents` stage (dvc repro cache_latents)") from None
    for name, value in expected.items():
        if manifest.get(name) != value:
            raise InputError(f"{path}: {name} is {manifest.get(name)}, expected {value}: stale; run `cache_latents` again")
    files = [load_file(folder / file["name"]) for file in manifest["files"] if file["split"] == split]
    empty = load_file(folder / "empty.safetensors")
    rows = np.cumsum([0, *(len(file["text"]) for file in files)]).tolist()  # the first row of `text` of each file
    moments = {name: torch.cat([file[name] for file in files]) for name in ("mean", "logvar")}
    texts = {name: torch.cat([file[name] for file in [*files, empty]]) for name in ("text", "text_mask")}
    caption = torch.cat([file["caption"] + row for file, row in zip(files, rows, strict=False)])
    return Latents(**moments, **texts, caption=caption, manifest=manifest)
