"""The latent cache, read by index: posterior moments of every image, embeddings of every caption; README.md says which files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.base.errors import InputError
from ldm.base.lazy import Tensor, torch
from ldm.base.tensors import mapped_tensors

EMPTY = 0  # the number of the empty caption
VERSION = 3  # of the manifest
CAPTIONS, INDEX = "captions", "index.safetensors"  # the split of files that hold captions; which captions each image has


class Rows:
    """The rows of a tensor in several files, one file after the other. A file is mapped when it is first read."""

    def __init__(self, files: Sequence[tuple[Path, int]], name: str) -> None:
        """`files` with how many rows each has."""
        self._paths, self._name = [path for path, _ in files], name
        self._ends = np.cumsum([count for _, count in files])
        self._maps: dict[int, np.ndarray] = {}

    def span(self, start: int, count: int = 1) -> np.ndarray:
        """A view of rows of one file, from row `start` on; of bfloat16 their bits, int16."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        if number not in self._maps:
            tensor = mapped_tensors(self._paths[number])[self._name]
            self._maps[number] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        first = start - (int(self._ends[number - 1]) if number else 0)
        return self._maps[number][first : first + count]

    def files(self) -> Iterator[tuple[int, int]]:
        """The first row of each file, and how many it has."""
        return zip([0, *self._ends[:-1].tolist()], np.diff(self._ends, prepend=0).tolist(), strict=True)


class Latents:
    """The latents of one split and their captions in memory-mapped files: opening takes no memory, a batch only its own."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        index = mapped_tensors(folder / INDEX)
        self._first, self._caption = (index[f"{split}.{name}"].numpy() for name in ("first", "caption"))
        self._rows = index[f"{CAPTIONS}.first"].numpy()  # where each caption's rows begin, and where the last ones end
        files = [file for file in manifest["files"] if file["split"] == split]
        images = [(folder / file["name"], file["count"]) for file in files]
        self._mean, self._logvar = Rows(images, "mean"), Rows(images, "logvar")
        texts = [file for file in manifest["files"] if file["split"] == CAPTIONS]
        begins = self._rows[np.cumsum([0, *(file["count"] for file in texts)])]
        self._text = Rows(
            [(folder / text["name"], size) for text, size in zip(texts, np.diff(begins).tolist(), strict=True)], "rows"
        )
        ends = np.cumsum([file["count"] for file in files])
        shapes: dict[tuple[int, int], list[np.ndarray]] = {}
        for file, end in zip(files, ends.tolist(), strict=True):
            shapes.setdefault(tuple(file["shape"]), []).append(np.arange(end - file["count"], end))
        self.groups = {shape: np.concatenate(parts) for shape, parts in sorted(shapes.items())}  # indices by shape (h, w)

    def __len__(self) -> int:
        return len(self._first) - 1

    @property
    def channels(self) -> int:
        return len(self.manifest["latent_mean"])

    @property
    def width(self) -> int:
        """Of a token's embedding."""
        return int(self.manifest["text_width"])

    @property
    def embedded(self) -> bool:
        """Whether captions are kept as embeddings, and not as text."""
        return bool(self.manifest["embedded"])

    @property
    def nbytes(self) -> int:
        """Of moments and captions, if they were loaded."""
        moments = sum(8 * self.channels * height * width * len(index) for (height, width), index in self.groups.items())
        return moments + int(self._rows[-1]) * (2 * self.width if self.embedded else 1)

    def moments(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32 (N, c, h, w), of images of one shape."""
        mean, logvar = (np.concatenate([rows.span(i) for i in index.tolist()]) for rows in (self._mean, self._logvar))
        return torch.from_numpy(mean), torch.from_numpy(logvar)

    def captions(self, index: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """For each image one of its captions, all as likely, by its draw (uint64): their numbers. 0 is the empty caption."""
        first, last = self._first[index], self._first[index + 1]
        return self._caption[first + (draws % (last - first).astype(np.uint64)).astype(np.int64)]

    def rows(self, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of captions start among all, and how many each has: one for each token, or for each byte of a text."""
        return self._rows[captions], self._rows[captions + 1] - self._rows[captions]

    def embeddings(self, captions: np.ndarray) -> tuple[Tensor, Tensor]:
        """Embeddings, bfloat16 (N, T, D) for the longest one's T tokens, zero beyond each one's end; masks, bool (N, T)."""
        starts, counts = self.rows(captions)
        found = np.zeros((len(captions), int(counts.max()), self.width), dtype=np.int16)
        for row, start, count in zip(found, starts.tolist(), counts.tolist(), strict=True):
            row[:count] = self._text.span(start, count)
        mask = np.arange(found.shape[1]) < counts[:, None]
        return torch.from_numpy(found).view(torch.bfloat16), torch.from_numpy(mask)

    def all_rows(self) -> Iterator[Tensor]:
        """The rows of all captions, file by file: embeddings, bfloat16 (R, D)."""
        for start, count in self._text.files():
            yield torch.from_numpy(self._text.span(start, count).copy()).view(torch.bfloat16)

    def texts(self, captions: np.ndarray) -> list[str]:
        """Captions that are kept as text."""
        pairs = zip(*(part.tolist() for part in self.rows(captions)), strict=True)
        return [self._text.span(start, count).tobytes().decode() if count else "" for start, count in pairs]


def open_latents(folder: Path, split: str, **expected: str) -> Latents:
    """Open the latents of a split; raises `InputError` if an entry of the manifest is not as `expected`."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run the `cache_latents` stage (dvc repro cache_latents)") from None
    for name, value in {"version": VERSION, **expected}.items():
        if manifest.get(name) != value:
            raise InputError(f"{path}: {name} is {manifest.get(name)}, expected {value}: stale; run `cache_latents` again")
    return Latents(folder, split, manifest)
