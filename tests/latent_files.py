"""A latent cache without shards: files as `cache_latents` writes them, of tensors or of holes that take no disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.data.latents import CAPTIONS, INDEX, VERSION

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_cache(
    folder: Path, moments: list[tuple[Tensor, Tensor]], captions: list[list[int]], rows: Tensor, counts: list[int], width: int,
    mean: list[float], std: list[float],
) -> Path:  # fmt: skip
    """A file for each pair of mean and log-variance (N, c, h, w), captions for each image, rows for all captions in one file."""
    folder.mkdir(parents=True)
    files: list[dict[str, Any]] = []
    for number, (one, other) in enumerate(moments):
        save_file({"mean": one, "logvar": other}, folder / f"{number}.safetensors")
        files.append({"name": f"{number}.safetensors", "split": "train", "count": len(one), "shape": list(one.shape[2:])})
    save_file({"rows": rows, "count": torch.tensor(counts)}, folder / "text.safetensors")
    files.append({"name": "text.safetensors", "split": CAPTIONS, "count": len(counts)})
    finish(folder, files, captions=np.array(captions), counts=np.array(counts), width=width, mean=mean, std=std,
           embedded=rows.dtype == torch.bfloat16)  # fmt: skip
    return folder


def finish(
    folder: Path, files: list[dict[str, Any]], *, captions: np.ndarray, counts: np.ndarray, width: int, mean: list[float],
    std: list[float], embedded: bool = True,
) -> None:  # fmt: skip
    """The index, by the captions of each image (N, K) and the rows of each caption (U,), and the manifest."""
    first = torch.arange(len(captions) + 1) * captions.shape[1]
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    index = {"train.first": first, "train.caption": torch.from_numpy(captions.reshape(-1)), f"{CAPTIONS}.first": starts}
    save_file(index, folder / INDEX)
    facts = {"version": VERSION, "embedded": embedded, "text_width": width, "latent_mean": mean, "latent_std": std}
    (folder / "manifest.json").write_text(json.dumps({**facts, "files": files}))


def write_holes(path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Safetensors of zeros, as a sparse file."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
