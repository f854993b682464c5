"""Images that look alike: small thumbnails, and pairs of them that differ little."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

SIDE = 16  # of a thumbnail, in pixels
EDGE = 2.0  # grey levels between neighbouring cells that count as an edge; flat areas would flip with every compression
BANDS, BAND_BITS = 4, 14
NEAR_BITS = BANDS - 1  # hashes that differ in fewer bits than there are bands are equal in at least one band
CROWD = 1000  # images with an equal band that a later one is compared with, so that time does not grow with their square
NEAR_LEVELS = 4.0  # mean absolute difference of thumbnails, in levels of 256


def thumbnail(image: Image.Image) -> bytes:
    """The image in RGB, `SIDE` pixels square."""
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def near_duplicates(thumbnails: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield `(i, j)` for each image i that is nearly equal to an earlier image, j being the first of these.

    `thumbnails` is uint8 (N, SIDE, SIDE, 3). Two images are nearly equal if their hashes differ in at most `NEAR_BITS` bits
    (difference hash, Krawetz 2013: is each of 8 x 8 cells brighter than its left neighbour?) and their thumbnails by at most
    `NEAR_LEVELS`. Only images whose hashes are equal in one of `BANDS` bands are compared, with the first `CROWD` of them.
    """
    flat, first, inverse = np.unique(thumbnails.reshape(-1, SIDE * SIDE * 3), axis=0, return_index=True, return_inverse=True)
    by_age = np.argsort(first)  # distinct thumbnails in the order of their first images
    flat, first, age = flat[by_age], first[by_age], np.argsort(by_age)
    hashes = _hashes(flat)
    best = np.arange(len(flat))  # the first near thumbnail of each
    for band in range(BANDS):
        keys = (hashes >> np.uint64(BAND_BITS * band)) & np.uint64(2**BAND_BITS - 1)
        order = np.argsort(keys, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for position, member in enumerate(members[1:], start=1):
                earlier = members[: min(position, CROWD)]
                earlier = earlier[np.bitwise_count(hashes[earlier] ^ hashes[member]) <= NEAR_BITS]
                distance = np.abs(flat[earlier].astype(np.int16) - flat[member]).mean(axis=1)
                near = earlier[distance <= NEAR_LEVELS]
                if len(near):
                    best[member] = min(best[member], near[0])
    for i, number in enumerate(age[inverse.ravel()].tolist()):
        j = int(first[best[number]])
        if j < i:
            yield i, j


def _hashes(flat: np.ndarray) -> np.ndarray:
    """Difference hashes of 56 bits, uint64 (N,)."""
    cells = flat.reshape(-1, 8, SIDE // 8, 8, SIDE // 8, 3).mean(axis=(2, 4, 5))
    bits = (cells[:, :, 1:] - cells[:, :, :-1] > EDGE).reshape(len(flat), BANDS * BAND_BITS)
    return bits @ (np.uint64(1) << np.arange(bits.shape[1], dtype=np.uint64))
