"""PSNR and variance by hand in numpy, and a classifier of real handwriting."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ldm.evaluation.metrics.prompt_accuracy import fit_classifier
from ldm.evaluation.metrics.psnr import psnr
from ldm.evaluation.metrics.variance_ratio import variance_ratio

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits at 32x32, as (N, 1, 32, 32) in random order, and their labels."""
    data = load_digits()
    scans = (data.images * (255 / 16)).round().astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(scan).resize((32, 32), Image.Resampling.LANCZOS)) for scan in scans])
    order = np.random.default_rng(1).permutation(len(images))
    return images[order, None], data.target[order]


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def test_psnr_by_hand() -> None:
    a, b = noise(4, 3, 5, 6), noise(4, 3, 5, 6)
    error = [
        np.mean([(int(p) - int(q)) ** 2 for p, q in zip(x.ravel(), y.ravel(), strict=True)]) for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(psnr(a, b), [10 * np.log10(255**2 / e) for e in error])


def test_psnr_of_known_pairs() -> None:
    black = np.zeros((3, 1, 8, 8), np.uint8)
    other = black.copy()
    other[0] = 255  # the worst: 0 dB
    other[1, 0, 0, 0] = 1  # one level in one of 64 pixels; the third is identical and gets the same, finite value
    np.testing.assert_allclose(psnr(black, other), [0, *[10 * np.log10(255**2 * 64)] * 2])


def test_psnr_refuses_other_shapes_and_types() -> None:
    as_floats: Any = noise(4, 1, 8, 8) / 255
    with pytest.raises(ValueError, match="one shape"):
        psnr(noise(4, 1, 8, 8), noise(4, 1, 8, 4))
    with pytest.raises(ValueError, match="shorter"):
        psnr(noise(4, 1, 8, 8), noise(1, 1, 8, 8))
    with pytest.raises(ValueError, match="float64"):
        psnr(noise(4, 1, 8, 8), as_floats)


def test_the_classifier_tells_held_out_digits_apart(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    cut = int(0.75 * len(images))
    classifier = fit_classifier(images[:cut], labels[:cut])
    assert classifier.score(images[cut:], labels[cut:]) >= 0.97
    right = [classifier.score(images[i : i + 1], labels[i : i + 1]) for i in range(cut, len(images))]
    assert classifier.score(images[cut:], labels[cut:]) == pytest.approx(np.mean(right))
    wrong = (labels[cut:] + 1) % 10
    assert classifier.score(images[cut:], wrong) < 0.02
    with pytest.raises(ValueError, match="inconsistent numbers"):
        classifier.score(images[cut:], labels[:1])


def test_the_classifier_takes_words_and_colours() -> None:
    red, blue = noise(40, 3, 40, 24), noise(40, 3, 40, 24)
    red[:, 0] //= 2
    blue[:, 2] //= 2
    classifier = fit_classifier(np.concatenate([red[:30], blue[:30]]), ["red"] * 30 + ["blue"] * 30)
    assert classifier.score(np.concatenate([red[30:], blue[30:]]), ["red"] * 10 + ["blue"] * 10) == 1.0


def test_variance_ratio_by_hand() -> None:
    real, generated = noise(9, 1, 4, 4), noise(7, 1, 4, 4)
    of_real, of_generated = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 1, 0, 2])

    def spread(images: np.ndarray) -> float:
        mean = sum(image.astype(float) for image in images) / len(images)
        return float(sum(((image - mean) ** 2).mean() for image in images) / (len(images) - 1))

    tops = [spread(generated[[0, 2, 5]]), spread(generated[[1, 3, 4]])]  # label 2 has one generated image: left out
    bottoms = [spread(real[:3]), spread(real[3:7])]
    assert variance_ratio(real, of_real, generated, of_generated) == pytest.approx(sum(tops) / sum(bottoms))


def test_variance_ratio_of_copies_collapse_and_few(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    assert variance_ratio(images, labels, images, labels) == pytest.approx(1)
    one_each = np.array([np.flatnonzero(labels == label)[0] for label in range(10)])
    collapsed = np.repeat(images[one_each], 5, axis=0)
    assert variance_ratio(images, labels, collapsed, np.repeat(labels[one_each], 5)) == 0
    few = [i for label in range(10) for i in np.flatnonzero(labels == label)[:4]]  # few images do not look less varied
    assert variance_ratio(images, labels, images[few], labels[few]) == pytest.approx(1, abs=0.2)


def test_variance_ratio_refuses_what_it_cannot_compare() -> None:
    images = noise(4, 1, 4, 4)
    assert variance_ratio(images, [0, 0, 1, 1], images, [2, 2, 3, 3]) is None
    assert variance_ratio(images, [0, 0, 1, 1], images, [0, 1, 2, 3]) is None
    same = np.repeat(images[:1], 4, axis=0)
    with pytest.raises(ValueError, match="all the same"):
        variance_ratio(same, [0, 0, 1, 1], images, [0, 0, 1, 1])
