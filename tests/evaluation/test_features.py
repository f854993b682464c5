"""Pixel PCA against scikit-learn's, and averaging down against means by hand."""

from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from ldm.evaluation.features import Pca, common_size, flat

RANDOM = np.random.default_rng(0)


def images(n: int, shape: tuple[int, int, int] = (1, 8, 8)) -> np.ndarray:
    return RANDOM.integers(0, 256, (n, *shape), dtype=np.uint8)


def test_pca_equals_scikit_learns() -> None:
    real, new = images(120), images(30)
    _, pca = Pca(dim=10).build(real, 119)
    peer = PCA(10, svd_solver="full").fit(real.reshape(120, -1) / 255)
    np.testing.assert_allclose(pca(new), peer.transform(new.reshape(30, -1) / 255), atol=1e-10)
    assert pca(new).dtype == np.float64


def test_the_dimension_is_what_the_images_allow() -> None:
    real, new = images(60), images(5)
    for dim, most, found in ((10, 59, 10), (10, 4, 4), (100, 59, 59)):
        name, extract = Pca(dim=dim).build(real, most)
        assert name == f"pca{found}" and extract(new).shape == (5, found)
    assert Pca(dim=100).build(images(90, (1, 4, 4)), 80)[0] == "pca16"
    assert Pca(dim=2000).build(images(1030, (1, 64, 64)), 1029)[0] == "pca1024"  # of 32 x 32 averages


def test_signs_and_order_do_not_depend_on_the_order_of_images() -> None:
    real, new = images(60), images(5)
    reordered = real[RANDOM.permutation(60)]
    first, second = (Pca(dim=6).build(images, 59)[1] for images in (real, reordered))
    np.testing.assert_allclose(first(new), second(new), atol=1e-9)


@pytest.mark.parametrize(("size", "side"), [(32, 16), (10, 4), (7, 3), (5, 8)])
def test_averaging_down_by_hand(size: int, side: int) -> None:
    picture = images(2, (3, size, size + 1))
    small = flat(picture, common_size(picture, side)).reshape(2, 3, min(size, side), min(size + 1, side))
    rows, columns = ([n * i // min(n, side) for i in range(min(n, side) + 1)] for n in (size, size + 1))
    block = picture[1, 2, rows[1] : rows[2], columns[2] : columns[3]]
    assert small[1, 2, 1, 2] == pytest.approx(block.mean() / 255)


def test_large_images_are_averaged_down_first() -> None:
    large = images(20, (3, 80, 70))
    small = np.concatenate([flat(large[i : i + 1], (32, 32)) for i in range(20)])
    assert small.shape == (20, 3 * 32 * 32)
    _, pca = Pca(dim=4).build(large, 19)
    np.testing.assert_allclose(pca(large), PCA(4, svd_solver="full").fit_transform(small), atol=1e-10)


@pytest.mark.parametrize("most", [0, 20, 65])
def test_impossible_dimensions_are_refused(most: int) -> None:
    with pytest.raises(ValueError, match=f"{min(most, 64)} components of 20 images"):
        Pca(dim=100).build(images(20), most)


def test_wrong_images_are_refused() -> None:
    _, pca = Pca(dim=4).build(images(20), 19)
    as_floats: Any = images(3) / 255.0
    with pytest.raises(ValueError, match=r"\(3,192\) \(64,\)"):
        pca(images(3, (3, 8, 8)))
    with pytest.raises(ValueError, match="uint8 images"):
        pca(as_floats)


def test_images_of_several_shapes_are_compared_in_blocks_of_their_own() -> None:
    """A picture that is stretched in whole blocks has the features of the picture itself."""
    real = images(40, (3, 12, 8))
    mixed = [image.repeat(1 + i % 3, axis=1).repeat(1 + i % 2, axis=2) for i, image in enumerate(real)]
    assert len({image.shape for image in mixed}) == 6 and common_size(mixed, 32) == common_size(mixed) == (12, 8)
    np.testing.assert_allclose(flat(mixed, (12, 8)), real.reshape(40, -1) / 255, atol=1e-12)
    first, second = (Pca(dim=5).build(found, 39)[1] for found in (real, mixed))
    np.testing.assert_allclose(first(real), second(mixed), atol=1e-9)
    assert flat([images(1, (1, 2, 4))[0]], (4, 4)).shape == (1, 16)  # fewer pixels than blocks
