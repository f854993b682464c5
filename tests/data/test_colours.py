"""Pixels are what a viewer shows: colour profiles against float64 colorimetry, transparency of 16 bits, nothing of the camera."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from icc import coded, grey_profile, in_srgb, linear, profile
from image_folders import OPTIONS, SIZE
from PIL import Image, ImageCms

from ldm.data.images import CROPPED, PROFILE, Preprocessing, decode, to_array
from ldm.data.jpeg import bare
from ldm.data.reader import SPLITS, open_shards
from ldm.data.shards import write_shards

SECRET = b"N 48 8 14, E 11 34 31"


def encoded(image: Any, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, form, **options)
    return buffer.getvalue()


def colours(count: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, count, 3), dtype=np.uint8)


def shown(blob: bytes, channels: int = 3) -> np.ndarray:
    return to_array(decode(blob, channels=channels)).transpose(1, 2, 0).astype(float)


# colour profiles


def test_a_known_colour_of_display_p3() -> None:
    blob = encoded(np.full((4, 4, 3), (200, 60, 60), dtype=np.uint8), icc_profile=profile("Display P3"))
    assert shown(blob)[0, 0].tolist() == [217, 42, 52]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("space", ["Display P3", "Adobe RGB", "ProPhoto-like"])
def test_colours_of_a_profile_become_those_of_srgb(space: str, form: str) -> None:
    pixels = colours()
    blob = encoded(pixels, form, icc_profile=profile(space), **({"lossless": True} if form == "WEBP" else {}))
    np.testing.assert_allclose(shown(blob), in_srgb(pixels, space), atol=1.5)
    assert decode(blob, channels=3).info == {PROFILE: space}


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparent_images_are_converted_before_they_are_composited(mode: str) -> None:
    image = Image.fromarray(colours(4)).convert("L" if mode == "LA" else "RGB")
    opaque = np.asarray(image.convert("RGB"))
    if mode == "P":
        image = image.quantize(8, dither=Image.Dither.NONE)
        opaque = np.asarray(image.convert("RGB"))
    else:
        alpha = Image.new("L", (4, 4), 255)
        alpha.putpixel((0, 0), 0)
        image.putalpha(alpha)
    found = shown(encoded(image, icc_profile=grey_profile(1.8) if mode == "LA" else profile("Display P3")))
    expected = coded(linear(opaque / 255, 1.8)) if mode == "LA" else in_srgb(opaque, "Display P3")
    if mode != "P":
        expected[0, 0] = 255
    np.testing.assert_allclose(found, expected, atol=1.5)


@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_greys_of_a_profile(gamma: float) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_allclose(
        shown(encoded(ramp, icc_profile=grey_profile(gamma)), channels=1)[..., 0], coded(linear(ramp / 255, gamma)), atol=1.5
    )


@pytest.mark.parametrize(
    "blob",
    [profile("sRGB"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"damaged", b"",
     profile("Adobe RGB")[:200], grey_profile(1.8)],
    ids=["ours", "lcms", "damaged", "empty", "cut", "of greys"],
)  # fmt: skip
def test_pixels_stay_under_srgb_and_under_profiles_that_do_not_fit(blob: bytes) -> None:
    pixels = colours()
    assert np.array_equal(shown(encoded(pixels, icc_profile=blob)), pixels)
    assert decode(encoded(pixels, icc_profile=blob), channels=3).info == {}


def test_lab_is_read() -> None:
    grey = shown(encoded(Image.new("LAB", (2, 2), (128, 128, 128)), "TIFF"))  # L* of 50.2
    light = ((50.2 + 16) / 116) ** 3
    np.testing.assert_allclose(grey, coded(np.full(grey.shape, light)), atol=1.5)


# transparency of 16 bits


def test_the_transparent_value_of_16_bit_greys() -> None:
    blob = encoded(np.array([[0, 32639], [65535, 1]], dtype=np.uint16), transparency=0)
    assert shown(blob, channels=1)[..., 0].tolist() == [[255, 127], [255, 0]]


def test_the_transparent_value_of_16_bit_colours() -> None:
    pixels, transparent = np.array([[[0x1234, 0x5678, 0x9ABC], [0x4321, 0x8765, 0xCBA9]]], dtype=">u2"), (0x1234, 0x5678, 0x9ABC)

    def chunk(name: bytes, blob: bytes) -> bytes:
        return struct.pack(">I", len(blob)) + name + blob + struct.pack(">I", zlib.crc32(name + blob))

    blob = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    blob += chunk(b"tRNS", struct.pack(">HHH", *transparent)) + chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))
    assert shown(blob + chunk(b"IEND", b""))[0].tolist() == [[255, 255, 255], [0x43, 0x87, 0xCB]]


# what is stored


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}, {"comment": SECRET}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_bare_jpeg_has_the_picture_and_nothing_else(mode: str, options: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    image = Image.fromarray(colours(33)).convert(mode)
    blob = encoded(image, "JPEG", quality=90, exif=exif, icc_profile=b"x" * 2000 + SECRET, xmp=SECRET, **options) + SECRET
    found = bare(blob)
    assert SECRET in blob and SECRET not in found and bare(found) == found
    first, second = (np.asarray(Image.open(io.BytesIO(file))) for file in (blob, found))
    assert np.array_equal(first, second)
    assert {"exif", "icc_profile", "comment", "xmp"}.isdisjoint(Image.open(io.BytesIO(found)).info)


@pytest.mark.parametrize("rubbish", [b"abcd", b"\0\x10\0\x04", b"\xff\xff\xff"])
def test_what_stands_between_segments_hides_nothing(rubbish: bytes) -> None:
    """Decoders look for the next marker."""
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    blob = encoded(colours(), "JPEG", exif=exif)
    start = blob.index(b"\xff\xe1")
    blob = blob[:start] + rubbish + b"\xff\xe0\0\x1cJFXX\0\x10" + SECRET[:20] + blob[start:]
    found = bare(blob)
    assert SECRET[:9] in blob and SECRET[:9] not in found
    assert np.array_equal(*(np.asarray(Image.open(io.BytesIO(file))) for file in (blob, found)))


@pytest.mark.parametrize("cut", [2, 3, 20, 400])
def test_a_jpeg_that_is_cut_short_ends_where_it_ends(cut: int) -> None:
    blob = encoded(colours(), "JPEG")
    assert bare(blob) == blob and blob.startswith(bare(blob[:cut]))


def test_shards_hold_nothing_of_the_camera_and_count_profiles(tmp_path: Path) -> None:
    source, expected = tmp_path / "source", {}
    source.mkdir()
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    for number in range(40):
        pixels = np.kron(colours(2, number), np.ones((SIZE // 2, SIZE // 2, 1))).astype(np.uint8)
        name, spaces = f"{number:02d}", ("sRGB", "Display P3", "Adobe RGB", None)
        space = spaces[number % 4]
        options = {"exif": exif, "xmp": SECRET} | ({"icc_profile": profile(space)} if space else {})
        form = ("JPEG", "PNG", "WEBP")[number % 3]
        blob = encoded(pixels, form, **options, **({"quality": 100, "subsampling": 0} if form == "JPEG" else {"lossless": True}))
        assert SECRET in blob
        (source / f"{name}.{form.lower()}").write_bytes(blob)
        (source / f"{name}.txt").write_text(name)
        expected[name] = in_srgb(pixels, space or "sRGB")
    index = write_shards(source, tmp_path / "shards", **OPTIONS)
    assert index["converted"] == {"Adobe RGB": 10, "Display P3": 10}
    assert not any(SECRET in path.read_bytes() for path in (tmp_path / "shards").iterdir())
    for split in SPLITS:
        reader = open_shards(tmp_path / "shards", split)
        for sample in (reader[i] for i in range(len(reader))):
            np.testing.assert_allclose(sample.image.transpose(1, 2, 0), expected[sample.text], atol=5)  # JPEG rounds too
    kept = [
        entry
        for path in (tmp_path / "shards").glob("*.tar")
        for entry in path.read_bytes().split(b"\0")
        if entry.endswith(b".jpg")
    ]
    assert len(kept) == sum(number % 3 == 0 and number % 4 in (0, 3) for number in range(40))  # JPEGs in sRGB


def test_files_are_drawn_as_they_are_stored(tmp_path: Path) -> None:
    """What `reconstruct` and `drift` show a model is what the shards hold."""
    prepared = Preprocessing(image_size=8, channels=3)
    blob = encoded(colours(24), icc_profile=profile("Display P3"))
    assert np.array_equal(prepared.as_seen(blob), to_array(prepared.read(blob)))
    assert json.dumps(prepared.read(blob).info) == json.dumps({PROFILE: "Display P3", CROPPED: 0.0})
