"""Shapes against brute force and SDXL's list; pixels of bucketed images against Pillow and numpy by hand; shards of shapes."""

import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import contents
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.base.errors import InputError
from ldm.data.images import Preprocessing, UnreadableImage, decode, decode_stored, upright_size
from ldm.data.inspect import check_shards, inspect
from ldm.data.reader import SPLITS, ShardReader, open_shards
from ldm.data.shapes import Buckets, Shape, Square, cropped, nearest
from ldm.data.shards import split_of, write_shards

SDXL = [  # height, width: Podell et al. 2023, appendix I
    (512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536),
    (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
    (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832), (1216, 832),
    (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640), (1664, 576), (1728, 576), (1792, 576),
    (1856, 512), (1920, 512), (1984, 512), (2048, 512),
]  # fmt: skip
SIZE, BUCKETS = 32, Buckets(step=8, max_aspect=3)
SHAPES = BUCKETS.shapes(SIZE)
OPTIONS: dict[str, Any] = {
    "image_size": SIZE, "channels": 3, "resize_filter": "lanczos", "shapes": BUCKETS.model_dump(), "val_fraction": 0.2,
    "test_fraction": 0.3, "shard_size": 7, "max_bad_fraction": 0.2,
}  # fmt: skip


# which shapes there are


@settings(max_examples=200, deadline=None)
@given(step=st.integers(1, 64), steps=st.integers(1, 24), max_aspect=st.floats(1, 6))
def test_buckets_are_what_brute_force_finds(step: int, steps: int, max_aspect: float) -> None:
    size, best = step * steps, dict[int, int]()
    for long, short in product(range(step, size * steps + 1, step), repeat=2):
        if size <= long <= max_aspect * short and short <= long and long * short <= size**2:
            best[long] = max(short, best.get(long, 0))
    expected = {shape for long, short in best.items() for shape in ((long, short), (short, long))}
    if len(expected) == 1:
        with pytest.raises(ValueError, match="leaves the square alone"):
            Buckets(step=step, max_aspect=max_aspect).shapes(size)
        return
    found = Buckets(step=step, max_aspect=max_aspect).shapes(size)
    assert found == tuple(sorted(expected)) and (size, size) in found
    for height, width in found:
        assert 0 <= size**2 - height * width < step * max(height, width)


def test_buckets_are_among_those_of_sdxl() -> None:
    """Which also has smaller ones: of every long side that we have, ours is the largest."""
    for max_aspect in (2, 4):
        ours = set(Buckets(step=64, max_aspect=max_aspect).shapes(1024))
        assert ours <= set(SDXL)
        largest = {long: max(h * w for h, w in SDXL if max(h, w) == long) for long in (max(shape) for shape in SDXL)}
        assert ours == {s for s in SDXL if s[0] * s[1] == largest[max(s)] and max(s) <= max_aspect * min(s)}


def test_squares_and_sizes_that_do_not_fit() -> None:
    assert Square().shapes(48) == ((48, 48),)
    with pytest.raises(ValueError, match=r"step 64 leaves the square alone at data\.image_size 64 .*set a smaller divisor of"):
        Buckets().shapes(64)
    with pytest.raises(ValueError, match=r"data\.shapes\.step 32 does not divide data\.image_size 48; set data\.shapes\.step to"):
        Buckets(step=32).shapes(48)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_an_image_gets_the_shape_of_the_nearest_aspect_ratio(width: int, height: int) -> None:
    shape = nearest(SDXL, width, height)
    distances = [abs(np.log(width / height) - np.log(w / h)) for h, w in SDXL]
    assert distances[SDXL.index(shape)] <= min(distances) + 1e-12
    h, w = shape
    kept = min(width, Fraction(height * w, h)) * min(height, Fraction(width * h, w))  # the largest part of that aspect ratio
    assert cropped(shape, width, height) == pytest.approx(float(1 - kept / (width * height)))


def test_the_first_of_two_that_are_equally_near() -> None:
    assert nearest([(1, 2), (2, 1)], 7, 7) == (1, 2) and nearest([(2, 1), (1, 2)], 7, 7) == (2, 1)
    assert nearest([(1, 4), (1, 1)], 2, 1) == (1, 4) and nearest(SHAPES, 1, 1) == (SIZE, SIZE)


# preprocessing


def test_preprocessing_survives_json_and_has_one_spelling_of_the_square() -> None:
    prepared = Preprocessing(image_size=SIZE, channels=3, margin=2, shapes=SHAPES)
    assert Preprocessing(**json.loads(json.dumps(asdict(prepared)))) == prepared and prepared.all_shapes == SHAPES
    assert hash(Preprocessing(**json.loads(json.dumps(asdict(prepared))))) == hash(prepared)
    square = Preprocessing(image_size=SIZE, channels=3, shapes=((SIZE, SIZE),))
    assert square == Preprocessing(image_size=SIZE, channels=3) and square.all_shapes == ((SIZE, SIZE),)
    assert prepared.described == "32x32x3 in 5 buckets 48x16 to 16x48, lanczos, margin 2" and len(SHAPES) == 5
    assert square.described == "32x32x3, lanczos"


# from a file to a shape: what the header says is what decoding gives


def encoded(image: Image.Image | np.ndarray, suffix: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, suffix, **options)
    return buffer.getvalue()


def noise(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


KINDS = ("PNG", "JPEG", "TIFF", "WEBP", "MPO")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_the_header_says_the_upright_size(kind: str, orientation: int | None) -> None:
    options = {} if orientation is None else {"exif": turned(orientation)}
    blob = encoded(noise(24, 40, 3), kind, **options)
    decoded = decode(blob, channels=3)
    assert upright_size(blob) == decoded.size == ((24, 40) if orientation in range(5, 9) else (40, 24))
    assert Preprocessing(image_size=SIZE, channels=3, shapes=SHAPES).shape_in(blob) == (
        (40, 24) if orientation in range(5, 9) else (24, 40)
    )


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_whatever_turns_a_png_is_found(compressed: bool, late: bool) -> None:
    """An orientation in XMP, or in a text as ImageMagick writes it: before the pixels or after them."""
    raw = b"Exif\0\0" + turned(6).removeprefix(b"Exif\0\0")
    texts = {"XML:com.adobe.xmp": '<x tiff:Orientation="6"/>', "Raw profile type exif": f"\nexif\n{len(raw):8}\n{raw.hex()}\n"}
    for name, text in texts.items():
        about = PngInfo()
        about.add_itxt(name, text, zip=compressed) if name.startswith("XML") else about.add_text(name, text, zip=compressed)
        blob = encoded(noise(24, 40, 3), pnginfo=about)
        if late:
            start, end = blob.index(name.encode()) - 8, blob.index(b"IDAT") - 4
            close = blob.index(b"IEND") - 4
            blob = blob[:start] + blob[end:close] + blob[start:end] + blob[close:]
        assert upright_size(blob) == decode(blob, channels=3).size == (24, 40)


@pytest.mark.filterwarnings("ignore")
def test_the_header_of_a_damaged_file_says_the_same_or_the_file_is_refused() -> None:
    random, agreed = np.random.default_rng(0), 0
    sound = [encoded(noise(24, 40, 3), kind, exif=turned(6)) for kind in KINDS]
    for number in range(600):
        blob = bytearray(sound[number % len(sound)])
        for place in random.integers(0, min(len(blob), 150), random.integers(1, 6)):
            blob[place] = random.integers(256)
        try:
            decoded = decode(bytes(blob), channels=3, max_pixels=10**6)
        except UnreadableImage:
            continue
        assert upright_size(bytes(blob), 1, 10**6) == decoded.size
        agreed += 1
    assert agreed > 60


# pixels


def sixteen_bits(height: int, width: int) -> tuple[bytes, np.ndarray]:
    values = np.random.default_rng(1).integers(0, 65536, (height, width), dtype=np.uint16)
    return encoded(values), np.stack([(values // 257).astype(np.uint8)] * 3, axis=-1)


def greyscale(height: int, width: int) -> tuple[bytes, np.ndarray]:
    return encoded(pixels := noise(height, width)), np.stack([pixels] * 3, axis=-1)


def rotated(height: int, width: int) -> tuple[bytes, np.ndarray]:
    """The upright image has this size."""
    pixels = noise(height, width, 3)
    return encoded(np.rot90(pixels), exif=turned(6)), pixels


def cmyk(height: int, width: int) -> tuple[bytes, np.ndarray]:
    image = Image.fromarray(pixels := noise(height, width, 4), "CMYK")
    inks = pixels.astype(np.float64) / 255
    return encoded(image, "TIFF"), np.round(255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])).astype(np.uint8)


def alpha(height: int, width: int) -> tuple[bytes, np.ndarray]:
    pixels = noise(height, width, 4)
    pixels[..., 3] = np.where(pixels[..., 3] < 128, 0, 255)
    return encoded(pixels), np.where(pixels[..., 3:] == 255, pixels[..., :3], 255).astype(np.uint8)


SOURCES: dict[str, Callable[[int, int], tuple[bytes, np.ndarray]]] = {
    "16 bits": sixteen_bits, "greyscale": greyscale, "rotated": rotated, "cmyk": cmyk, "alpha": alpha,
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("height", "width", "shape"), [(60, 100, (24, 40)), (130, 41, (48, 16)), (50, 51, (32, 32))])
@pytest.mark.parametrize("margin", [0, 3])
def test_pixels_are_the_centre_scaled_without_distortion(source: str, height: int, width: int, shape: Shape, margin: int) -> None:
    blob, upright = SOURCES[source](height, width)
    prepared = Preprocessing(image_size=SIZE, channels=3, shapes=SHAPES, margin=margin)
    h, w = shape[0] + margin, shape[1] + margin
    scale = min(width / w, height / h)  # source pixels per stored pixel, the same in both directions
    left, top = (width - w * scale) / 2, (height - h * scale) / 2
    box = (left, top, left + w * scale, top + h * scale)
    wanted = np.asarray(Image.fromarray(upright).resize((w, h), Image.Resampling.LANCZOS, box=box)).astype(int)
    stored = prepared.read(blob)
    off = np.abs(np.asarray(stored).astype(int) - wanted)
    assert off.max() <= 1 and off.mean() < 0.01 + 0.5 * (source == "cmyk")  # Pillow rounds inks on the way
    assert stored.info["cropped"] == pytest.approx(1 - (w * h * scale**2) / (width * height))
    start = margin // 2
    seen = prepared.as_seen(blob)
    assert np.array_equal(seen, np.asarray(stored)[start : start + shape[0], start : start + shape[1]].transpose(2, 0, 1))


@pytest.mark.parametrize("fit", ["contain", "stretch"])
def test_nothing_is_cropped_by_other_fits(fit: str) -> None:
    prepared = Preprocessing(image_size=SIZE, channels=3, shapes=SHAPES, fit=fit)
    stored = prepared.read(encoded(noise(60, 130, 3)))
    assert stored.size == (40, 24) and stored.info["cropped"] == 0


@pytest.mark.parametrize(
    ("height", "width", "kept"), [(24, 40, True), (40, 24, True), (32, 32, True), (24, 39, False), (48, 32, False)]
)
def test_a_jpeg_of_any_shape_is_stored_without_loss(height: int, width: int, kept: bool) -> None:
    prepared, blob = Preprocessing(image_size=SIZE, channels=3, shapes=SHAPES), encoded(noise(height, width, 3), "JPEG")
    assert prepared.is_stored(blob) == kept
    if kept:
        assert np.array_equal(decode_stored(blob, prepared, (height, width)), np.asarray(Image.open(io.BytesIO(blob))))
        with pytest.raises(UnreadableImage, match=f"RGB of {width} x {height} pixels, expected RGB of 16 x 48"):
            decode_stored(blob, prepared, (48, 16))


# shards

SIZES = [(24, 40), (40, 24), (32, 32), (16, 48), (30, 34), (48, 32)]  # height and width of files
GIVEN = [(24, 40), (40, 24), (32, 32), (16, 48), (32, 32), (40, 24)]  # their shapes


def make(folder: Path, top: str, count: int = 60, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise of these sizes by turns, with captions; returns the pixels of those that are a shape's own size."""
    (folder / top).mkdir(parents=True, exist_ok=True)
    random, pixels, rows = np.random.default_rng(seed), dict[str, np.ndarray](), []
    for number in range(count):
        name, (height, width) = f"{number:03d}.png", SIZES[number % len(SIZES)]
        image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / top / name)
        if (height, width) in SHAPES:
            pixels[f"{top}/{name}"] = image.transpose(2, 0, 1)
        rows.append({"file_name": name, "text": f"caption {number}"})
    pd.DataFrame(rows).to_csv(folder / top / "metadata.csv", index=False)
    return pixels


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    make(folder / "source", "a")
    write_shards(folder / "source", folder / "shards", **OPTIONS)
    return folder / "shards"


def names_of(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [json.load(tar.extractfile(m))["file_name"] for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]


def test_every_image_is_in_a_shard_of_its_shape_and_comes_back(shards: Path) -> None:
    own, index, seen = make(shards.parent / "again", "a"), json.loads((shards / "index.json").read_text()), []
    for shard in index["shards"]:
        height, width = shard["shape"]
        assert shard["name"].rpartition("-")[0] == f"{shard['split']}-a-{width}x{height}"
        for name in names_of(shards / shard["name"]):
            assert GIVEN[int(name[2:5]) % len(SIZES)] == (height, width)
            blob = (shards.parent / "source" / name).read_bytes()
            assert split_of(hashlib.sha256(blob).hexdigest(), 0.2, 0.3) == shard["split"]
            seen.append(name)
    assert sorted(seen) == [f"a/{number:03d}.png" for number in range(60)]
    for reader in (open_shards(shards, split) for split in SPLITS):
        assert sorted(np.concatenate([*reader.shapes.values()]).tolist()) == list(range(len(reader)))
        assert list(reader.shapes) == sorted(set(GIVEN))
        for shape, positions in reader.shapes.items():
            images = reader.images(positions[::-1])
            assert images.shape == (len(positions), 3, *shape) and (np.diff(positions) > 0).all()
            for image, position in zip(images, positions[::-1], strict=True):
                sample = reader[position]
                assert np.array_equal(image, sample.image) and reader.shape_of(position) == shape
                if (pixels := own.get(sample.meta["file_name"])) is not None:
                    assert np.array_equal(image, pixels)
    shares = [1 - min(h * w2 / (w * h2), w * h2 / (h * w2)) for (h, w), (h2, w2) in zip(SIZES, GIVEN, strict=True)]
    assert index["cropped"] == {"mean": pytest.approx(np.mean(shares), abs=1e-6), "largest": pytest.approx(max(shares), abs=1e-6)}


def test_images_of_two_shapes_are_not_read_at_once(shards: Path) -> None:
    reader = open_shards(shards)
    (one, *_), (other, *_), *_ = reader.shapes.values()
    with pytest.raises(ValueError, match=r"images of 48x16 and 40x24: read those of one shape at a time"):
        reader.images([one, other])
    assert reader.images([]).shape == (0, 3, *SHAPES[0])


def test_a_subset_has_its_samples_alone(shards: Path) -> None:
    reader = open_shards(shards)
    chosen = np.random.default_rng(0).choice(len(reader), 9, replace=False)
    for part in (reader.subset(chosen), pickle.loads(pickle.dumps(reader.subset(chosen)))):
        assert [part[i].key for i in range(len(part))] == [reader[i].key for i in sorted(chosen)]
        assert part.captions.equals(reader.captions.iloc[np.sort(chosen)].reset_index(drop=True))
        assert sorted(np.concatenate([*part.shapes.values()]).tolist()) == list(range(9))
        assert [i for _, positions in part.shard_positions() for i in positions] == list(range(9))
        assert part.digest == reader.digest and isinstance(part, ShardReader)
        smaller = part.subset([7, 2, 2])
        assert [smaller[i].key for i in range(len(smaller))] == [reader[i].key for i in np.sort(chosen)[[2, 7]]]


def test_a_new_folder_changes_no_other_shard(shards: Path, tmp_path: Path) -> None:
    make(tmp_path / "source", "a")
    make(tmp_path / "source", "b", 30, seed=1)
    write_shards(tmp_path / "source", tmp_path / "grown", **OPTIONS)
    old = {name: blob for name, blob in contents(shards).items() if name.endswith(".tar")}
    grown = contents(tmp_path / "grown")
    assert old and all(grown[name] == blob for name, blob in old.items())
    for name in grown.keys() - old.keys():
        assert "-b-" in name or not name.endswith(".tar")


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "source", "a", 1020)
    for workers in (1, 2):
        write_shards(tmp_path / "source", tmp_path / f"{workers}", **OPTIONS | {"workers": workers, "shard_size": 100})
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_shards_of_one_shape_are_called_as_ever(tmp_path: Path) -> None:
    make(tmp_path / "source", "a")
    index = write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS | {"shapes": {"kind": "square"}})
    assert index["shards"][0]["name"] == "train-a-00000.tar" and index["preprocessing"]["shapes"] == []
    assert all(shard["shape"] == [SIZE, SIZE] for shard in index["shards"])


def test_damaged_headers_are_quarantined_as_they_are_with_squares(tmp_path: Path) -> None:
    make(tmp_path / "source", "a")
    good = (tmp_path / "source/a/000.png").read_bytes()
    planted = {"001": b"", "002": b"hello", "003": good[:30], "004": good[: len(good) // 2], "005": encoded(noise(3, 90, 3))}
    for name, blob in planted.items():
        (tmp_path / f"source/a/{name}.png").write_bytes(blob)
    tables = []
    for shapes in (BUCKETS.model_dump(), {"kind": "square"}):
        index = write_shards(tmp_path / "source", tmp_path / "shards", **OPTIONS | {"shapes": shapes, "min_side": 4})
        assert index["quarantined"] == len(planted) and sum(shard["count"] for shard in index["shards"]) == 60 - len(planted)
        tables.append((tmp_path / "shards/quarantine.csv").read_text())
    assert tables[0] == tables[1] and "90 x 3 pixels, smaller than data.min_side 4" in tables[0]


def test_check_and_stats_know_shapes(shards: Path, tmp_path: Path) -> None:
    assert list(check_shards(shards)) == []
    found = inspect(shards)
    sizes = [SIZES.index(GIVEN[int(name[2:5]) % len(SIZES)]) for name in found.images.file_name]
    assert [tuple(row) for row in found.images[["height", "width"]].to_numpy().tolist()] == [SIZES[number] for number in sizes]
    assert dict(found.summary())["shapes"] == "20 of 24x40, 20 of 32x32, 10 of 40x24, 10 of 48x16"
    for shape, problem in (([48, 16], "expected RGB of 16 x 48"), ([9, 9], "a shard of shape [9, 9], which its preprocessing")):
        index = json.loads((shards / "index.json").read_text())
        next(shard for shard in index["shards"] if shard["shape"] == [16, 48])["shape"] = shape
        copy = tmp_path / f"{shape[0]}"
        copy.mkdir()
        for path in shards.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / "index.json").write_text(json.dumps(index))
        try:
            problems = list(check_shards(copy))
        except InputError as error:
            problems = [str(error)]
        assert any(problem in line for line in problems), problems
