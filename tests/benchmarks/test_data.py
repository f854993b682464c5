"""The data path against the obvious alternatives, on the same images in the same run.

Figures are medians of the ratios of interleaved passes: above 1, ours is faster. `make bench` prints them.
"""

import io
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pytest
import torch
import webdataset
from latent_files import write_cache
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ldm.base.files import canonical_json
from ldm.data.batches import Batches, order
from ldm.data.latents import Latents, open_latents
from ldm.data.reader import PARTS, VERSION, open_shards
from ldm.data.shards import write_shards

IMAGES, SIDE, BATCH, PASSES = 1500, 256, 64, 5


def photo(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise of every scale, finer ones fainter, as in photographs."""
    total = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 24, 48, 96):
        coarse = random.normal(size=(cells, cells, 3))
        planes = [
            Image.fromarray(coarse[..., c].astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)
        ]
        total += np.stack([np.asarray(plane) for plane in planes], axis=-1) / cells**0.7
    return Image.fromarray((128 + 90 * total / total.std()).clip(0, 255).astype(np.uint8))


def folder_of(path: Path, count: int, width: int, height: int) -> Path:
    random = np.random.default_rng(0)
    path.mkdir()
    for number in range(count):
        photo(random, width, height).save(path / f"{number:05d}.jpg", quality=90)
    pd.DataFrame({"file_name": [f"{n:05d}.jpg" for n in range(count)], "text": "x"}).to_csv(path / "metadata.csv", index=False)
    return path


def shard(source: Path, out: Path, workers: int = 1, shard_size: int = 50, fraction: float = 0.01) -> Path:
    write_shards(
        source, out, image_size=SIDE, channels=3, resize_filter="lanczos", val_fraction=fraction, test_fraction=fraction,
        shard_size=shard_size, max_bad_fraction=0, workers=workers,
    )  # fmt: skip
    return out


def rates(passes: dict[str, Callable[[], int]], repeats: int = PASSES) -> dict[str, list[float]]:
    """Items per second of each pass, which returns how many it read; interleaved, the first round unmeasured."""
    found: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(repeats + 1):
        for name, run in passes.items():
            start = time.perf_counter()
            count = run()
            if number:
                found[name].append(count / (time.perf_counter() - start))
    return found


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds, so that a machine that slows down for a while does not decide."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("photos") / "square", IMAGES, SIDE, SIDE)


@pytest.fixture(scope="module")
def shards(photos: Path) -> Path:
    return shard(photos, photos.parent / "shards", shard_size=500)


def test_sharding_with_two_processes(tmp_path: Path) -> None:
    """Landscape photographs of half a megapixel, cut and scaled to 256 x 256, stored as PNG."""
    source, count = folder_of(tmp_path / "large", 2000, 800, 600), 2000

    def with_processes(workers: int) -> int:
        shard(source, tmp_path / f"out{workers}", workers)
        return count

    one, two = rates({"1": lambda: with_processes(1), "2": lambda: with_processes(2)}, 2).values()
    print(f"\nsharding: {median(one):.0f} images/s with one process, {median(two):.0f} with two, ratio {ratio(two, one):.2f}")


class FolderOfFiles(Dataset[torch.Tensor]):
    """What people write first."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(np.array(Image.open(self.files[i]).convert("RGB")))


@pytest.mark.parametrize("workers", [0, 2])
def test_image_batches(workers: int, photos: Path, shards: Path) -> None:
    """256 x 256 JPEGs in shuffled batches of 64, by one process or by two workers that last for four epochs."""
    reader, epochs = open_shards(shards), 4 if workers else 1
    blobs = [(photos / name).read_bytes() for name in reader.captions.file_name]
    urls = sorted(map(str, shards.glob("train-*.tar")))
    count = len(reader) // BATCH * BATCH

    def ours() -> int:
        batches = Batches(reader, 0, workers=workers)
        return sum(len(batches.at(position, BATCH)) for position in range(0, epochs * count, BATCH))

    def bare() -> int:
        return sum(1 for blob in blobs[:count] if np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")).size)

    def with_webdataset() -> int:
        data = (
            webdataset.WebDataset(urls, shardshuffle=100, seed=0, empty_check=False).shuffle(1000).decode("rgb8").to_tuple("jpg")
        )
        loader = webdataset.WebLoader(data.batched(BATCH), batch_size=None, num_workers=workers)
        return sum(len(batch) for (batch,) in loader)

    def folder_of_files() -> int:
        options = {"num_workers": workers, "persistent_workers": True} if workers else {}
        loader = DataLoader(FolderOfFiles(photos), BATCH, shuffle=True, drop_last=True, **options)
        return sum(len(batch) for _ in range(epochs) for batch in loader)

    passes = {"ours": ours, "webdataset": with_webdataset, "folder of files": folder_of_files}
    found = rates({**passes, **({} if workers else {"bare decoding": bare})}, 15)
    own = found.pop("ours")
    peers = ", ".join(f"{ratio(own, theirs):.2f} of {name} ({median(theirs):.0f})" for name, theirs in found.items())
    print(f"\nimage batches, {workers} workers: ours {median(own):.0f} images/s; {peers}")


def test_latents_batches(tmp_path: Path) -> None:
    """32 x 32 x 4 moments of 6,000 images in shuffled batches of 256: from mapped files as in training, and opened anew."""
    torch.manual_seed(0)
    shape, moments = (1000, 4, 32, 32), [tuple(torch.randn(2, 1000, 4, 32, 32).unbind(0)) for _ in range(6)]
    rows, zeros = torch.zeros(1, 8, dtype=torch.bfloat16), [0.0] * shape[1]
    write_cache(tmp_path / "latents", moments, [[0]] * 6000, rows, [1], 8, zeros, [1.0] * shape[1])
    train = open_latents(tmp_path / "latents", "train")
    size = len(train) // 256 * 256
    tars = []
    for start in range(0, len(train), 1000):
        tars.append(str(tmp_path / f"latents-{start:05d}.tar"))
        with webdataset.TarWriter(tars[-1]) as tar:
            for i in range(start, min(start + 1000, len(train))):
                mean, logvar = train.moments(np.array([i]))
                tar.write({"__key__": f"{i:06d}", "npy": np.concatenate([mean[0].numpy(), logvar[0].numpy()])})

    def ours(latents: Latents) -> int:
        for start in range(0, size, 256):
            latents.moments(order(0, len(latents), start, 256))
        return size

    def with_webdataset() -> int:
        data = webdataset.WebDataset(tars, shardshuffle=100, seed=0, empty_check=False).shuffle(1000)
        data = data.map(lambda sample: (np.load(io.BytesIO(sample["npy"])),)).batched(256, partial=False)
        return sum(len(batch) for (batch,) in data)

    anew, mapped, peer = rates(
        {
            "anew": lambda: ours(open_latents(tmp_path / "latents", "train")),
            "mapped": lambda: ours(train),
            "webdataset": with_webdataset,
        }
    ).values()
    print(f"\nlatents batches: {median(mapped):,.0f}/s mapped, {median(anew):,.0f}/s opened anew, webdataset + np.load ", end="")
    print(f"{median(peer):,.0f}/s, ratios {ratio(mapped, peer):.1f} and {ratio(anew, peer):.1f}")


def synthetic(folder: Path, samples: int) -> Path:
    """An index of many samples over one small shard, whose images and captions all samples share."""
    source = folder / "source"
    source.mkdir(parents=True)
    for number in range(100):
        Image.new("L", (8, 8), number).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text("x")
    write_shards(
        source, folder / "small", image_size=8, channels=1, resize_filter="box", val_fraction=0.1, test_fraction=0.1,
        shard_size=100, max_bad_fraction=0,
    )  # fmt: skip
    index = open_shards(folder / "small").index
    rows = np.load(folder / "small/offsets.npy")[: index["splits"]["train"][1]]
    table = np.tile(rows, (-(-samples // len(rows)), 1))[:samples]
    table[:, 0] = np.arange(samples) // 500
    assert table.shape[1] == 1 + 2 * len(PARTS) and index["version"] == VERSION
    np.save(folder / "small/offsets.npy", table)
    train = next(shard for shard in index["shards"] if shard["split"] == "train")
    index["shards"] = [train] * (int(table[-1, 0]) + 1)
    index["splits"] = {"train": [0, samples], "val": [samples, samples], "test": [samples, samples]}
    (folder / "small/index.json").write_text(canonical_json(index))
    return folder / "small"


READ = """
import sys, time, torch
from ldm.data.batches import Batches
from ldm.data.reader import open_shards
def private():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
open_shards(sys.argv[2])  # imports and their memory
before = private()
start = time.perf_counter()
reader = open_shards(sys.argv[1])
opened = time.perf_counter() - start
batches = Batches(reader, 0, shuffle=sys.argv[3])
for step in range(500):
    batches.at(step * 64, 64)
print(opened, private() - before)
"""


@pytest.mark.parametrize("shuffle", ["global", "shard"])
def test_memory_is_flat_and_opening_is_quick(shuffle: str, tmp_path: Path) -> None:
    """Anonymous memory that 500 batches of 64 take beyond what is there before the index is opened (pages of the mapped
    offsets belong to the page cache), and the time to open the index."""
    sizes = 10**4, 10**5, 10**6
    folders = {size: synthetic(tmp_path / str(size), size) for size in sizes}
    for size in sizes:
        command = [sys.executable, "-c", READ, str(folders[size]), str(folders[10**4]), shuffle]
        opened, kib = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        print(f"\n{shuffle}: {size:,} samples: opened in {opened * 1e3:.0f} ms, {kib / 1024:.1f} MiB", end="")
    print()


@pytest.fixture(autouse=True)
def peak() -> Iterator[None]:
    yield
    print(f"(peak memory so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB)")
