"""Write the latent cache: encode images and embed captions, each once; README.md says which files."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.base.files import canonical_json, content_hash, file_hash, replacing
from ldm.base.tensors import mapped_tensors, save_tensors
from ldm.data.latents import CAPTIONS, INDEX, VERSION
from ldm.data.reader import ShardReader

Encode = Callable[[np.ndarray], tuple[Tensor, Tensor]]  # uint8 images -> posterior mean and log-variance
Embed = Callable[[list[str]], tuple[Tensor, Tensor]]  # texts -> token embeddings (N, T, D) and masks (N, T)
Divide = Callable[..., Iterator[Any]]  # `ldm.base.memory.Parts`
Row = dict[str, Any]  # of the caption table
CHUNK = 64  # captions whose embeddings are on the device together
TEXT = ("text", "text_encoder", "text_width")  # of the identity: what embeddings depend on, and latents do not


def write_latents(
    readers: dict[str, ShardReader], out: Path, encode: Encode, embed: Embed | None, identity: dict[str, Any],
    progress: Callable[[int], None], *, store: Path, code: str, divide: Divide, texts: Callable[[Row], list[str]],
    flip: bool = False,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """Encode all images and captions of `readers` (by split) to `out`, all or nothing; training images also mirrored with `flip`.

    `texts` gives the captions of an image by its row of the caption table; without `embed` they are kept as text. Returns the
    manifest, with `identity` (hashes of autoencoder, text encoder, …) in it, and how many shards were encoded before: files are
    links to `store/KEY-SHA256.safetensors`, whose key is of all that decides the bytes.
    """
    kept, done = _Store(store), 0
    for_text = {name: identity[name] for name in TEXT} | {"embedded": embed is not None, "code": code}
    for_images = {name: value for name, value in identity.items() if name not in TEXT} | {"code": code}
    index, files, statistics = dict[str, Tensor](), list[dict[str, Any]](), list[Tensor]()
    progress(done)
    with replacing(out) as partial:
        captions = _Captions(partial, kept, embed, for_text)
        for split, reader in readers.items():
            preprocessing, mirrored, numbers = reader.index["preprocessing"], flip and split == "train", list[list[int]]()
            made_from = {**for_images, "preprocessing": preprocessing, "flip": mirrored}
            for shard, positions in reader.shard_positions():
                name = Path(shard["name"]).with_suffix(".safetensors").name
                entry = kept.link(
                    partial / name, {**made_from, "shard": shard["sha256"]},
                    lambda: _encoded(reader, positions, encode, divide, mirrored),  # noqa: B023 (it is called at once)
                )  # fmt: skip
                tensors = mapped_tensors(partial / name)
                statistics += [tensors["statistics"].clone()] if split == "train" else []
                count, *_, height, width = tensors["mean"].shape
                entry |= {"split": split, "shape": [height, width], "count": count, "shard_sha256": shard["sha256"]}
                files.append(entry)
                rows = reader.captions_of(positions).to_dict("records")
                numbers += captions.add([texts({str(k): v for k, v in row.items()}) for row in rows], shard) * (1 + mirrored)
                done += len(positions)
                progress(done)
            index[f"{split}.first"] = torch.tensor([0, *map(len, numbers)]).cumsum(0)
            index[f"{split}.caption"] = torch.tensor(list(chain(*numbers)), dtype=torch.int64)
        index[f"{CAPTIONS}.first"] = torch.tensor([0, *captions.counts]).cumsum(0)
        save_tensors(index, partial / INDEX)
        number, total, squares = torch.stack(statistics).sum(0)  # per channel, float64 (c,)
        mean, square = total / number, squares / number
        facts = {"version": VERSION, "preprocessing": preprocessing, "flip": flip, "embedded": embed is not None}
        moments = {"latent_mean": mean.tolist(), "latent_std": (square - mean**2).sqrt().tolist()}
        manifest = {**identity, **facts, **moments, "files": files + captions.files, "index": file_hash(partial / INDEX)}
        (partial / "manifest.json").write_text(canonical_json(manifest))
    return manifest, len(kept.reused & {file["name"] for file in files})


class _Store:
    """Files by all that they were made from, `KEY-SHA256.safetensors`. `reused` are the names of those that were there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reused = folder, set[str]()
        folder.mkdir(parents=True, exist_ok=True)

    def link(self, path: Path, made_from: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
        """Put the file of `made_from` at `path`, made unless the store has it, sound; returns its name and sha256."""
        key = content_hash(canonical_json(made_from).encode())
        sound = (kept for kept in self.folder.glob(f"{key}-*") if kept.name == f"{key}-{file_hash(kept)}.safetensors")
        if kept := next(sound, None):
            self.reused.add(path.name)
        else:
            new = self.folder / f"{key}.{os.getpid()}.partial"
            save_tensors(make(), new)
            kept = new.rename(self.folder / f"{key}-{file_hash(new)}.safetensors")
        try:
            os.link(kept, path)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(kept, path)
        return {"name": path.name, "sha256": kept.stem.rpartition("-")[2]}


class _Captions:
    """Numbers the distinct captions of all shards, the empty one first, and keeps each with the first shard that has it."""

    def __init__(self, out: Path, store: _Store, embed: Embed | None, made_from: dict[str, Any]) -> None:
        self._out, self._store, self._embed, self._made_from = out, store, embed, made_from
        self._numbers: dict[str, int] = {}  # by the caption's hash
        self.counts: list[int] = []  # rows of each caption
        self.files: list[dict[str, Any]] = []

    def add(self, captions: list[list[str]], shard: dict[str, Any]) -> list[list[int]]:
        """The numbers of the captions of each image of a shard."""
        hashes = {text: content_hash(text.encode()) for text in {*chain(*captions), *([] if self._numbers else [""])}}
        unknown = (text for text, found in hashes.items() if found not in self._numbers)
        if new := sorted(unknown, key=lambda text: (text != "", hashes[text])):
            self._numbers |= {hashes[text]: len(self._numbers) + i for i, text in enumerate(new)}
            path = self._out / f"{Path(shard['name']).stem}.{CAPTIONS}.safetensors"
            made_from = {**self._made_from, "captions": [hashes[text] for text in new]}
            entry = self._store.link(path, made_from, lambda: _rows(new, self._embed))
            self.counts += mapped_tensors(path)["count"].tolist()
            self.files.append({**entry, "split": CAPTIONS, "count": len(new), "shard_sha256": shard["sha256"]})
        return [[self._numbers[hashes[text]] for text in texts] for texts in captions]


def _rows(texts: list[str], embed: Embed | None) -> dict[str, Tensor]:
    """One text after another, a row for each token, bfloat16 (R, D), or for each byte, uint8 (R,); how many rows each has."""
    if embed is None:
        blobs = [text.encode() for text in texts]
        rows = torch.from_numpy(np.frombuffer(b"".join(blobs), dtype=np.uint8).copy())
        return {"rows": rows, "count": torch.tensor([len(blob) for blob in blobs])}
    parts = []
    for start in range(0, len(texts), CHUNK):
        embedded, mask = embed(texts[start : start + CHUNK])
        parts.append((embedded[mask].bfloat16().cpu(), mask.sum(1).cpu()))
    tokens, counts = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"rows": tokens, "count": counts}


def _encoded(reader: ShardReader, positions: range, encode: Encode, divide: Divide, mirrored: bool) -> dict[str, Tensor]:
    """Moments of a shard's images, all mirrored ones behind the others; and what their statistics are made of."""
    ahead: dict[tuple[int, int], Future[np.ndarray]] = {}
    with ThreadPoolExecutor(1) as pool:  # reads the next images while these are encoded

        def pending(start: int, stop: int) -> Future[np.ndarray]:
            return ahead.pop((start, stop), None) or pool.submit(reader.images, positions[start:stop])

        def moments(part: slice) -> list[tuple[Tensor, Tensor]]:
            images = pending(part.start, part.stop)
            if (following := (part.stop, min(2 * part.stop - part.start, len(positions))))[0] < following[1]:
                ahead[following] = pending(*following)
            pixels = images.result()
            return [encode(pixels), *([encode(np.flip(pixels, -1).copy())] if mirrored else [])]

        sides = zip(*divide(moments, len(positions), kind=reader.shape_of(positions[0])), strict=True)
        mean, logvar = (torch.cat(moment).contiguous() for moment in zip(*chain(*sides), strict=True))
    precise, variance = mean.double(), logvar.double().exp()
    squares = (precise.square() + variance).sum((0, 2, 3))
    # of latents z ~ q(z | x), by channel: their number, their sum and the expected sum of their squares
    statistics = torch.stack([torch.full_like(squares, precise[:, 0].numel()), precise.sum((0, 2, 3)), squares])
    return {"mean": mean, "logvar": logvar, "statistics": statistics}
