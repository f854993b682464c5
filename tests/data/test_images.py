"""Folders of captioned images: conventions and complaints; pixels against float64 arithmetic in numpy."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import images
from ldm.data.images import UnreadableImage, decode, fit_square, from_array, list_images, to_array, to_png
from ldm.errors import InputError


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def encoded(image: Image.Image | np.ndarray, suffix: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, suffix, **options)
    return buffer.getvalue()


def put(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(noise(4, 4, seed=number)))


# which images there are and what their captions say


def test_metadata_csv_keeps_further_columns_and_sorts_by_file_name(tmp_path: Path) -> None:
    put(tmp_path, "b c.png", "a.JPG", "sub/ü.webp")
    (tmp_path / "metadata.csv").write_text('file_name,text,label\nsub/ü.webp,"one, two",01\na.JPG,NA,NA\nb c.png,"new\nline",x\n')
    table = list_images(tmp_path)
    assert table.to_dict("records") == [
        {"file_name": "a.JPG", "text": "NA", "label": "NA"},
        {"file_name": "b c.png", "text": "new\nline", "label": "x"},
        {"file_name": "sub/ü.webp", "text": "one, two", "label": "01"},
    ]


def test_metadata_jsonl_keeps_types_but_makes_labels_text(tmp_path: Path) -> None:
    """`prompts.csv` and class folders have text labels, and 3 is not "3"."""
    put(tmp_path, "a.png", "b.png")
    first, second = {"file_name": "b.png", "text": "2020"}, {"file_name": "a.png", "text": "x\u2028y"}
    rows = [first | {"label": 3, "n": 3}, second | {"label": 1, "n": 1}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert list_images(tmp_path).to_dict("records") == [row | {"label": str(row["label"])} for row in rows[::-1]]


@pytest.mark.parametrize("row", ['{"file_name": "a.png", "text": "x"}', '{"file_name": "a.png", "text": "x", "label": ""}'])
def test_a_label_here_and_none_there_is_refused(row: str, tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "y", "label": 3}\n' + row + "\n")
    with pytest.raises(InputError, match=r"metadata\.jsonl: row 2 has no label"):
        list_images(tmp_path)


def test_sixteen_bit_greys_are_scaled(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "ramp.png")
    read = to_array(decode((tmp_path / "ramp.png").read_bytes(), channels=1))[0]
    np.testing.assert_allclose(read, values / 257, atol=1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "x.png")
    read = to_array(decode((tmp_path / "x.png").read_bytes(), channels=3))
    assert read[:, 0, 0].tolist() == [0, 0, 0] and (read[:, 1, :] == 255).all()


@pytest.mark.parametrize("kind", ["EPS", "PPM", "GIF"])
def test_other_formats_are_refused_whatever_their_suffix(kind: str) -> None:
    """Pillow would run Ghostscript on an EPS that calls itself a PNG."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, kind)
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        decode(file.getvalue(), channels=3)


def test_sidecars_and_class_folders(tmp_path: Path) -> None:
    put(tmp_path / "sidecars", "one.png", "deep/two.png")
    (tmp_path / "sidecars/one.txt").write_text(" the first\n")
    (tmp_path / "sidecars/deep/two.txt").write_text("the second")
    assert list_images(tmp_path / "sidecars").text.tolist() == ["the second", "the first"]
    put(tmp_path / "classes", "cat/1.png", "batch/dog/2.png")
    table = list_images(tmp_path / "classes")
    assert table.text.tolist() == table.label.tolist() == ["dog", "cat"]


def test_a_folder_with_an_images_suffix_is_no_image(tmp_path: Path) -> None:
    put(tmp_path, "album.png/1.png")
    assert list_images(tmp_path).file_name.tolist() == ["album.png/1.png"]


def table_of(text: str, name: str = "metadata.csv") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        put(folder, "a.png", "b.png")
        (folder / name).write_text(text)

    return make


def sidecar_missing(folder: Path) -> None:
    put(folder, "a.png", "b.png")
    (folder / "a.txt").write_text("x")


def sidecar_latin1(folder: Path) -> None:
    put(folder, "a.png")
    (folder / "a.txt").write_bytes("ü".encode("latin-1"))


COMPLAINTS = {
    "missing folder": (lambda folder: folder.rmdir(), ["no such folder", "data.path"]),
    "no images": (lambda folder: (folder / "a.txt").write_text("x"), ["holds no images", ".png"]),
    "no captions": (lambda folder: put(folder, "a.png", "b/c.png"), ["2 images but no captions", "metadata.csv"]),
    "no text column": (table_of("file_name,caption\na.png,x\nb.png,y\n"), ["metadata.csv", "'text'", "file_name, caption"]),
    "image not there": (table_of("file_name,text\na.png,x\nb.png,y\nc.png,z\n"), ["metadata.csv", "names 1 images", "'c.png'"]),
    "image without row": (table_of("file_name,text\na.png,x\n"), ["metadata.csv", "no row for 1 images", "'b.png'"]),
    "two rows": (table_of("file_name,text\na.png,x\nb.png,y\na.png,z\n"), ["metadata.csv", "'a.png'", "more than one row"]),
    "unquoted commas": (table_of("file_name,text\na.png,x,y\nb.png,x,z\n"), ["metadata.csv", "more fields", "double quotes"]),
    "one unquoted comma": (table_of("file_name,text\na.png,x\nb.png,x,z\n"), ["metadata.csv", "not readable", "line 3"]),
    "empty csv": (table_of(""), ["metadata.csv", "not readable"]),
    "header alone": (table_of("file_name,text\n"), ["metadata.csv", "no row for 2 images", "'a.png'"]),
    "no JSON": (table_of("nonsense\n", "metadata.jsonl"), ["metadata.jsonl", "not readable"]),
    "null caption": (
        table_of('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": null}\n', "metadata.jsonl"),
        ["metadata.jsonl", "row 2", "'b.png'", "strings"],
    ),
    "number as caption": (
        table_of('{"file_name": "a.png", "text": 1}\n{"file_name": "b.png", "text": 2}\n', "metadata.jsonl"),
        ["metadata.jsonl", "row 1", "'a.png' and 1"],
    ),
    "sidecar missing": (sidecar_missing, ["b.png", "no caption file b.txt"]),
    "sidecar not UTF-8": (sidecar_latin1, ["a.txt", "UTF-8"]),
}


@pytest.mark.parametrize("case", COMPLAINTS)
def test_bad_folders_are_named_with_what_to_do(case: str, tmp_path: Path) -> None:
    make, expected = COMPLAINTS[case]
    folder = tmp_path / "photos"
    folder.mkdir()
    make(folder)
    with pytest.raises(InputError) as error:
        list_images(folder)
    message = str(error.value)
    assert str(folder) in message
    for words in expected:
        assert words in message


# pixels


@pytest.mark.parametrize("suffix", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(suffix: str) -> None:
    pixels = noise(9, 7)
    blob = encoded(pixels, suffix, **({"lossless": True} if suffix == "WEBP" else {}))
    assert np.array_equal(to_array(decode(blob, channels=3)), pixels.transpose(2, 0, 1))


def test_greyscale_is_the_luma_of_bt_601() -> None:
    pixels = noise(16, 16)
    luma = pixels.astype(np.float64) @ [0.299, 0.587, 0.114]
    found = to_array(decode(encoded(pixels), channels=1))
    assert found.shape == (1, 16, 16)
    assert np.abs(found[0] - luma).max() <= 0.51


def test_palettes_and_greyscale_become_rgb() -> None:
    palette, index = noise(1, 256)[0], noise(8, 8, 1)
    image = Image.fromarray(index).convert("P")
    image.putpalette(palette.tobytes())
    assert np.array_equal(to_array(decode(encoded(image), channels=3)), palette[index].transpose(2, 0, 1))
    assert np.array_equal(to_array(decode(encoded(index), channels=3)), np.stack([index] * 3))


def test_progressive_and_cmyk_jpegs_decode() -> None:
    ramp = np.add.outer(np.arange(32), np.arange(32)) * 4
    pixels = np.stack([ramp, 255 - ramp, ramp // 2], axis=-1).clip(0, 255).astype(np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).convert("CMYK")):
        for progressive in (False, True):
            blob = encoded(image, "JPEG", quality=95, progressive=progressive)
            found = to_array(decode(blob, channels=3)).transpose(1, 2, 0)
            assert np.abs(found.astype(int) - pixels).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    """The tag says which transform of the stored pixels is upright (EXIF 2.3, table 4)."""
    stored = noise(5, 3)
    flipped = stored[:, ::-1] if orientation in (2, 4, 5, 7) else stored
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]  # quarter turns anticlockwise
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = to_array(decode(encoded(stored, exif=exif.tobytes()), channels=3))
    assert np.array_equal(found, np.rot90(flipped, turns).transpose(2, 0, 1))


def test_box_filter_averages_the_centre_square() -> None:
    pixels = noise(32, 48)
    blocks = pixels[:, 8:40].astype(np.float64).reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    found = to_array(fit_square(Image.fromarray(pixels), 8, "box")).transpose(1, 2, 0)
    assert np.abs(found - blocks).max() <= 1.01  # rounded once in each direction
    tall = to_array(fit_square(Image.fromarray(pixels.transpose(1, 0, 2)), 8, "box"))
    assert np.abs(tall.transpose(2, 1, 0) - blocks).max() <= 1.01


def lanczos(pixels: np.ndarray, size: int) -> np.ndarray:
    """Antialiased Lanczos-3 along the first axis, in float64."""
    scale = len(pixels) / size
    stretch = max(scale, 1.0)  # the kernel widens as the image shrinks
    offset = (np.arange(len(pixels)) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / stretch
    weights = np.where(np.abs(offset) < 3, np.sinc(offset) * np.sinc(offset / 3), 0.0)
    return np.tensordot(weights / weights.sum(axis=1, keepdims=True), pixels, axes=1)


@pytest.mark.parametrize(("side", "size"), [(8, 32), (40, 16), (33, 20)])
def test_lanczos_is_antialiased_lanczos(side: int, size: int) -> None:
    smooth = np.cumsum(np.cumsum(noise(side, side, 1).astype(np.float64) - 127.5, axis=0), axis=1)
    pixels = np.round(20 + 215 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)
    expected = lanczos(lanczos(pixels.astype(np.float64), size).T, size).T
    found = to_array(fit_square(Image.fromarray(pixels), size, "lanczos"))[0]
    assert np.abs(found - expected).max() <= 1.5


@pytest.mark.parametrize("resize_filter", images.FILTERS)
def test_an_image_of_the_right_size_is_left_as_it_is(resize_filter: str) -> None:
    pixels = noise(8, 8)
    assert np.array_equal(to_array(fit_square(Image.fromarray(pixels), 8, resize_filter)), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_images_and_png_files_are_inverses(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (channels, 6, 5), dtype=np.uint8)
    assert np.array_equal(to_array(decode(to_png(from_array(pixels)), channels=channels)), pixels)


# damage


def test_reasons_are_the_same_on_every_run() -> None:
    for blob, reason in ((b"", "empty"), (b"hello", "not an image"), (encoded(noise(40, 40))[:900], "truncated")):
        reasons = set()
        for _ in range(2):
            with pytest.raises(UnreadableImage, match=reason) as error:
                decode(blob, channels=3)
            reasons.add(str(error.value))
        assert len(reasons) == 1 and "0x" not in reasons.pop()


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused_never_more() -> None:
    random, refused = np.random.default_rng(0), 0
    pixels = noise(24, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        encoded(pixels),
        encoded(pixels, exif=exif.tobytes()),
        encoded(pixels, "JPEG", exif=exif.tobytes()),
        encoded(pixels, "JPEG", progressive=True),
        encoded(pixels, "WEBP"),
        encoded(pixels, "BMP"),
        encoded(pixels, "TIFF", compression="tiff_lzw"),
    ]
    for number in range(700):
        blob = bytearray(kinds[number % len(kinds)])
        if random.random() < 0.3:
            del blob[random.integers(len(blob)) :]
        else:
            reach = len(blob) if random.random() < 0.5 else min(len(blob), 200)
            for place in random.integers(0, reach, random.integers(1, 12)):
                blob[place] = random.integers(256)
        try:
            assert decode(bytes(blob), channels=3).mode == "RGB"
        except UnreadableImage as error:
            refused += 1
            assert "0x" not in str(error)
    assert 100 < refused < 700
