"""Near duplicates: found after recompression, rescaling and small edits, not among different pictures; against all pairs."""

import io

import numpy as np
from PIL import Image, ImageEnhance

from ldm.data.shards import NEAR_BITS, NEAR_LEVELS, SIDE, _hashes, near_duplicates, thumbnail


def picture(seed: int, side: int = 96) -> Image.Image:
    """Soft shapes of random colours."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.frombuffer(thumbnail(image), dtype=np.uint8).reshape(SIDE, SIDE, 3) for image in images])


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def test_altered_copies_are_found_and_other_pictures_are_not() -> None:
    originals = [picture(seed) for seed in range(200)]
    assert not list(near_duplicates(thumbnails(originals)))
    alterations = {
        "copy": lambda image: image,
        "JPEG 85": lambda image: recompressed(image, 85),
        "JPEG 50": lambda image: recompressed(image, 50),
        "half the size": lambda image: image.resize((48, 48), Image.Resampling.LANCZOS),
        "a little brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.02),
    }
    for name, alter in alterations.items():
        pairs = dict(near_duplicates(thumbnails([*originals, *map(alter, originals)])))
        assert all(pairs[i] == i - 200 for i in pairs), name
        assert len(pairs) >= 190, (name, len(pairs))


def test_equals_a_comparison_of_all_pairs() -> None:
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (40, SIDE, SIDE, 3), dtype=np.int16)
    noisy = base[random.integers(0, 40, 300)] + random.integers(-9, 10, (300, SIDE, SIDE, 3)) * random.integers(
        0, 2, (300, 1, 1, 1)
    )
    looks = np.concatenate([noisy.clip(0, 255), np.zeros((20, SIDE, SIDE, 3)), np.full((20, SIDE, SIDE, 3), 3)]).astype(np.uint8)
    hashes = _hashes(looks.reshape(len(looks), -1))
    expected = {}
    for i in range(len(looks)):
        for j in range(i):
            bits = bin(int(hashes[i]) ^ int(hashes[j])).count("1")
            if bits <= NEAR_BITS and np.abs(looks[i].astype(float) - looks[j]).mean() <= NEAR_LEVELS:
                expected[i] = j
                break
    assert dict(near_duplicates(looks)) == expected
    assert 100 < len(expected) < 340


def test_hashes_compare_each_cell_with_its_left_neighbour() -> None:
    ramp = np.tile(np.arange(SIDE, dtype=np.uint8)[:, None] * 4, (SIDE, 1, 3))
    bright_to_the_right, dark, flat = _hashes(np.stack([ramp, ramp[:, ::-1], ramp * 0]).reshape(3, -1)).tolist()
    assert (bright_to_the_right, dark, flat) == (2**56 - 1, 0, 0)


def test_none_and_one() -> None:
    assert not list(near_duplicates(np.zeros((0, SIDE, SIDE, 3), dtype=np.uint8)))
    assert not list(near_duplicates(np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8)))
