"""The latent cache, read by index: posterior moments of every image, embeddings of every caption; README.md says which files."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from ldm.base.errors import InputError
from ldm.base.lazy import Tensor, torch
from ldm.base.tensors import mapped_tensors

EMPTY = 0  # the number of the empty caption
VERSION = 3  # of the manifest
OPEN_FILES = 256  # at once
READERS, SMALL = 4, 1 << 20  # threads that read a batch; bytes that one thread reads sooner than several
CAPTIONS, INDEX = "captions", "index.safetensors"  # the split of files that hold captions; which captions each image has
Job = tuple[int, IO[bytes], int, np.ndarray]  # number of a file, the file, where to read, what to fill


class Rows:
    """Rows of the tensors in several files, one file after the other.

    They are read where they lie, without the system's reading ahead: it would fetch megabytes around each of them, from files
    that may be larger than memory. What was read before is in the system's cache as long as there is room.
    """

    def __init__(self, files: Sequence[tuple[Path, int]]) -> None:
        """`files` with how many rows each has."""
        self._paths, self.counts = [path for path, _ in files], np.array([count for _, count in files], dtype=np.int64)
        self._ends = np.cumsum(self.counts)
        self._places: dict[int, dict[str, int]] = {}  # of each file that was opened: where its tensors start
        self._open: dict[int, IO[bytes]] = {}  # in the order of opening
        self._pool: ThreadPoolExecutor | None = None

    def read(self, name: str, starts: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        """Fill each array, (N, …) as it lies in memory, with rows of one file, from its start on; of bfloat16 with their bits."""
        some = [number for number, out in enumerate(outs) if len(out)]
        for chosen in (some[first : first + OPEN_FILES] for first in range(0, len(some), OPEN_FILES)):  # of a file each, at most
            jobs = self._jobs(name, starts[chosen], [outs[number] for number in chosen])
            if sum(out.nbytes for *_, out in jobs) < SMALL:
                self._fill(jobs)
                continue
            self._pool = self._pool or ThreadPoolExecutor(READERS)
            for done in [self._pool.submit(self._fill, jobs[start::READERS]) for start in range(READERS)]:
                done.result()

    def _jobs(self, name: str, starts: np.ndarray, outs: Sequence[np.ndarray]) -> list[Job]:
        numbers = self.files_of(starts)
        firsts, files = starts - (self._ends - self.counts)[numbers], self._opened(list(dict.fromkeys(numbers.tolist())))
        jobs = []
        for number, first, out in zip(numbers.tolist(), firsts.tolist(), outs, strict=True):
            jobs.append((number, files[number], self._places[number][name] + first * (out.nbytes // len(out)), out))
        return jobs

    def files_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the file that has each row."""
        return np.searchsorted(self._ends, rows, side="right")

    def _fill(self, jobs: list[Job]) -> None:
        for number, file, place, out in jobs:
            left = out.data.cast("B")
            while len(left):  # the system gives 2 GB at a time
                if not (count := os.preadv(file.fileno(), [left], place)):
                    raise InputError(f"{self._paths[number]}: is too short; run `cache_latents` again")
                left, place = left[count:], place + count

    def _opened(self, numbers: list[int]) -> dict[int, IO[bytes]]:
        """These files, opened; the others as far as there may be more."""
        for number in numbers:
            if number in self._open:
                continue
            file = self._open[number] = self._paths[number].open("rb", buffering=0)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            if number not in self._places:
                size = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
                header = json.loads(os.pread(file.fileno(), size, 8))
                tensors = {name: found for name, found in header.items() if name != "__metadata__"}
                self._places[number] = {name: 8 + size + found["data_offsets"][0] for name, found in tensors.items()}
        found, spare = {number: self._open[number] for number in numbers}, len(self._open) - OPEN_FILES
        for number in [number for number in self._open if number not in found][: max(spare, 0)]:
            self._open.pop(number).close()
        return found


class Latents:
    """The latents of one split and their captions, read by index: opening takes no memory, a batch only its own."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        index = mapped_tensors(folder / INDEX)
        self._first, self._caption = (index[f"{split}.{name}"].numpy() for name in ("first", "caption"))
        self._rows = index[f"{CAPTIONS}.first"].numpy()  # where each caption's rows begin, and where the last ones end
        files = [file for file in manifest["files"] if file["split"] == split]
        self._images = Rows([(folder / file["name"], file["count"]) for file in files])
        self._shapes = [tuple(file["shape"]) for file in files]  # of the latents of each file
        texts = [file for file in manifest["files"] if file["split"] == CAPTIONS]
        begins = self._rows[np.cumsum([0, *(file["count"] for file in texts)])]
        sizes = zip(texts, np.diff(begins).tolist(), strict=True)
        self._text = Rows([(folder / text["name"], size) for text, size in sizes])
        ends = np.cumsum([file["count"] for file in files])
        shapes: dict[tuple[int, int], list[np.ndarray]] = {}
        for shape, file, end in zip(self._shapes, files, ends.tolist(), strict=True):
            shapes.setdefault(shape, []).append(np.arange(end - file["count"], end))
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
        return moments + self.all_tokens * (2 * self.width if self.embedded else 1)

    @property
    def all_tokens(self) -> int:
        """Of all captions together; their bytes, if they are kept as text."""
        return int(self._rows[-1])

    def moments(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, float32 (N, c, h, w), of images of one shape."""
        shape, *others = {self._shapes[number] for number in self._images.files_of(index).tolist()}
        if others:
            raise ValueError(f"latents of {shape} and {others[0]}: read those of one shape at a time (`groups`)")
        found = np.empty((2, len(index), self.channels, *shape), dtype=np.float32)
        for name, moments in zip(("mean", "logvar"), found, strict=True):
            self._images.read(name, index, [moments[i : i + 1] for i in range(len(index))])
        mean, logvar = torch.from_numpy(found)
        return mean, logvar

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
        found = np.empty((len(captions), int(counts.max()), self.width), dtype=np.int16)
        for row, count in zip(found, counts.tolist(), strict=True):
            row[count:] = 0
        self._text.read("rows", starts, [row[:count] for row, count in zip(found, counts.tolist(), strict=True)])
        mask = np.arange(found.shape[1]) < counts[:, None]
        return torch.from_numpy(found).view(torch.bfloat16), torch.from_numpy(mask)

    def all_rows(self) -> Iterator[Tensor]:
        """The rows of all captions, file by file: embeddings, bfloat16 (R, D)."""
        for start, count in zip(np.cumsum(self._text.counts) - self._text.counts, self._text.counts.tolist(), strict=True):
            rows = np.empty((count, self.width), dtype=np.int16)
            self._text.read("rows", start[None], [rows])
            yield torch.from_numpy(rows).view(torch.bfloat16)

    def texts(self, captions: np.ndarray) -> list[str]:
        """Captions that are kept as text."""
        starts, counts = self.rows(captions)
        letters = [np.empty(count, dtype=np.uint8) for count in counts.tolist()]
        self._text.read("rows", starts, letters)
        return [found.tobytes().decode() for found in letters]


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
