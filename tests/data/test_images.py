"""Pixels against float64 arithmetic in numpy; damaged files."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import images
from ldm.data.images import Preprocessing, UnreadableImage, decode, decode_stored, fit_to, from_array, to_array, to_png


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def encoded(image: Image.Image | np.ndarray, suffix: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, suffix, **options)
    return buffer.getvalue()


# pixels


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


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA"])
def test_other_formats_are_refused_whatever_their_suffix(kind: str) -> None:
    """Pillow would run Ghostscript on an EPS that calls itself a PNG."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, kind)
    with pytest.raises(UnreadableImage, match="not an image of a known format"):
        decode(file.getvalue(), channels=3)


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
    found = to_array(fit_to(Image.fromarray(pixels), (8, 8), "box")).transpose(1, 2, 0)
    assert np.abs(found - blocks).max() <= 1.01  # rounded once in each direction
    tall = to_array(fit_to(Image.fromarray(pixels.transpose(1, 0, 2)), (8, 8), "box"))
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
    found = to_array(fit_to(Image.fromarray(pixels), (size, size), "lanczos"))[0]
    assert np.abs(found - expected).max() <= 1.5


@pytest.mark.parametrize("resize_filter", images.FILTERS)
def test_an_image_of_the_right_size_is_left_as_it_is(resize_filter: str) -> None:
    pixels = noise(8, 8)
    assert np.array_equal(to_array(fit_to(Image.fromarray(pixels), (8, 8), resize_filter)), pixels.transpose(2, 0, 1))


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


# what becomes of sizes


def test_contain_pads_with_the_background_and_stretch_distorts() -> None:
    pixels = noise(8, 16)
    image = Image.fromarray(pixels)
    padded = to_array(fit_to(image, (16, 16), "box", "contain", "#102030")).transpose(1, 2, 0)
    assert np.array_equal(padded[4:12], pixels) and (padded[[0, 3, 12, 15]] == [0x10, 0x20, 0x30]).all()
    grey = to_array(fit_to(image.convert("L"), (16, 16), "box", "contain", "#ffffff"))[0]
    assert (grey[:4] == 255).all()
    wide = to_array(fit_to(image, (8, 8), "box", "stretch")).transpose(1, 2, 0)
    assert np.abs(wide - pixels.reshape(8, 8, 2, 3).mean(axis=2)).max() <= 1


def test_the_background_shows_through_transparency() -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
    read = to_array(decode(encoded(image), channels=3, background="#0000ff"))[:, 0, 0]
    assert np.abs(read - np.array([200, 0, 0]) * 128 / 255 - np.array([0, 0, 255]) * 127 / 255).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    options = {"lossless": True} if kind == "WEBP" else {}
    blob = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (to_array(decode(blob, channels=3))[:, 3, 3] == [255, 0, 0]).all()


def test_limits_are_checked_before_pixels_are_decoded() -> None:
    blob = encoded(noise(20, 30))
    assert decode(blob, channels=3, min_side=20, max_pixels=600).size == (30, 20)
    with pytest.raises(UnreadableImage, match=r"30 x 20 pixels, smaller than data\.min_side 21"):
        decode(blob, channels=3, min_side=21)
    cut = blob[:60]  # the header alone
    with pytest.raises(UnreadableImage, match=r"30 x 20 pixels, more than data\.max_pixels 599"):
        decode(cut, channels=3, max_pixels=599)


# stored images


@pytest.mark.parametrize(
    ("channels", "mode", "side", "options", "kept"),
    [
        (3, "RGB", 16, {}, True),
        (3, "RGB", 16, {"progressive": True}, True),
        (1, "L", 16, {}, True),
        (3, "L", 16, {}, False),
        (1, "RGB", 16, {}, False),
        (3, "CMYK", 16, {}, False),
        (3, "RGB", 17, {}, False),
        (3, "RGB", 16, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}, False),
    ],
)
def test_a_jpeg_is_kept_as_it_is_only_if_nothing_would_change(
    channels: int, mode: str, side: int, options: dict[str, object], kept: bool
) -> None:
    blob = encoded(Image.fromarray(noise(side, side)).convert(mode), "JPEG", **options)
    preprocessing = Preprocessing(image_size=12, margin=4, channels=channels)
    assert preprocessing.is_stored(blob) == kept
    if kept:
        pixels = to_array(preprocessing.read(blob)).transpose(1, 2, 0)
        assert np.array_equal(decode_stored(blob, preprocessing, (12, 12)), pixels)
    assert not preprocessing.is_stored(encoded(noise(16, 16)))


def test_a_stored_image_of_another_shape_is_refused() -> None:
    with pytest.raises(UnreadableImage, match="RGB of 8 x 9 pixels, expected RGB of 8 x 8"):
        decode_stored(encoded(noise(9, 8)), Preprocessing(image_size=8, channels=3), (8, 8))
