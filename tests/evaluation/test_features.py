"""Pixel PCA against scikit-learn's, and averaging down against means by hand."""

from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from ldm.evaluation.features import PixelPCA, averaged_down

RANDOM = np.random.default_rng(0)


def images(n: int, shape: tuple[int, int, int] = (1, 8, 8)) -> np.ndarray:
    return RANDOM.integers(0, 256, (n, *shape), dtype=np.uint8)


def test_pca_equals_scikit_learns() -> None:
    real, new = images(120), images(30)
    pca = PixelPCA.fit(real, 10)
    peer = PCA(10, svd_solver="full").fit(real.reshape(120, -1) / 255)
    np.testing.assert_allclose(pca(new), peer.transform(new.reshape(30, -1) / 255), atol=1e-10)
    assert pca.name == "pca10"
    assert pca(new).dtype == np.float64


def test_signs_and_order_do_not_depend_on_the_order_of_images() -> None:
    real, new = images(60), images(5)
    reordered = real[RANDOM.permutation(60)]
    np.testing.assert_allclose(PixelPCA.fit(real, 6)(new), PixelPCA.fit(reordered, 6)(new), atol=1e-9)


@pytest.mark.parametrize(("size", "side"), [(32, 16), (10, 4), (7, 3), (5, 8)])
def test_averaging_down_by_hand(size: int, side: int) -> None:
    picture = images(2, (3, size, size + 1))
    small = averaged_down(picture, side)
    assert small.shape == (2, 3, min(size, side), min(size + 1, side))
    rows, columns = ([n * i // min(n, side) for i in range(min(n, side) + 1)] for n in (size, size + 1))
    block = picture[1, 2, rows[1] : rows[2], columns[2] : columns[3]]
    assert small[1, 2, 1, 2] == pytest.approx(block.mean() / 255)


def test_large_images_are_averaged_down_first() -> None:
    large = images(20, (3, 80, 70))
    pca = PixelPCA.fit(large, 4)
    assert pca.components.shape == (4, 3 * 32 * 32)
    assert pca(large).shape == (20, 4)


@pytest.mark.parametrize("dim", [0, 20, 65])
def test_impossible_dimensions_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"{dim} components of 20 images of 64 pixels"):
        PixelPCA.fit(images(20), dim)


def test_wrong_images_are_refused() -> None:
    pca = PixelPCA.fit(images(20), 4)
    as_floats: Any = images(3) / 255.0
    with pytest.raises(ValueError, match=r"\(1, 8, 8\), found \(1, 4, 4\)"):
        pca(images(3, (1, 4, 4)))
    with pytest.raises(ValueError, match="uint8 images"):
        pca(as_floats)
