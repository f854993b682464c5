"""Distances against closed forms, scipy's matrix square root and plain loops."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ldm.evaluation.metrics.frechet import frechet_distance
from ldm.evaluation.metrics.kernel import kernel_distance

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def reseed() -> None:
    """Each test draws the same numbers whichever tests run before it."""
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state


def with_moments(n: int, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """A sample whose own mean and covariance are exactly those given."""
    z = RANDOM.standard_normal((n, len(mean)))
    z -= z.mean(axis=0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(z, rowvar=False)))).T
    return np.asarray(z @ np.linalg.cholesky(cov).T + mean)


def random_cov(d: int) -> np.ndarray:
    root = RANDOM.standard_normal((d, d))
    return root @ root.T / d + 0.1 * np.eye(d)


def test_diagonal_gaussians_have_a_closed_form() -> None:
    s, t = np.array([0.5, 1.0, 2.0, 3.0]), np.array([1.5, 1.0, 0.1, 2.0])
    shift = np.array([1.0, -2.0, 0.0, 0.5])
    a, b = with_moments(50, np.zeros(4), np.diag(s**2)), with_moments(70, shift, np.diag(t**2))
    assert frechet_distance(a, b) == pytest.approx(shift @ shift + ((s - t) ** 2).sum(), abs=1e-10)


@pytest.mark.parametrize("d", [1, 2, 16])
def test_equals_scipys_matrix_square_root(d: int) -> None:
    cov_a, cov_b, shift = random_cov(d), random_cov(d), RANDOM.standard_normal(d)
    expected = shift @ shift + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    a, b = with_moments(100, np.zeros(d), cov_a), with_moments(100, shift, cov_b)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, abs=1e-9)


def test_identical_and_degenerate_samples() -> None:
    a = RANDOM.standard_normal((60, 8))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    a[:, 5:] = 0  # singular covariances, with eigenvalues just below zero once rotated
    b = a.copy()
    b[:, 7] = 3.0
    turn = np.linalg.qr(RANDOM.standard_normal((8, 8)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(9.0, abs=1e-6)


@pytest.mark.parametrize("n", [256, 1000, 5000])
def test_bias_between_equal_gaussians(n: int) -> None:
    """Means differ by 2d/N and covariances by d(d + 1)/2N, to leading order in 1/N: about 8.6, 2.2 and 0.44."""
    d = 64
    distances = [frechet_distance(*RANDOM.standard_normal((2, n, d))) for _ in range(4)]
    assert np.mean(distances) == pytest.approx(2 * d / n + d * (d + 1) / (2 * n), rel=0.04)


@pytest.mark.parametrize("sizes", [(8, 50), (50, 8), (5, 50)])
def test_too_few_samples_are_refused(sizes: tuple[int, int]) -> None:
    a, b = (RANDOM.standard_normal((n, 8)) for n in sizes)
    with pytest.raises(ValueError, match=f"N = {min(sizes)} and d = 8"):
        frechet_distance(a, b)


def test_features_of_two_spaces_are_refused() -> None:
    a = RANDOM.standard_normal((20, 3))
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="mismatch"):
            distance(a, a[:, :2])


def test_kernel_distance_equals_plain_loops() -> None:
    a, b = RANDOM.standard_normal((6, 3)), RANDOM.standard_normal((5, 3)) + 1

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    def mmd(a: np.ndarray, b: np.ndarray) -> float:
        within = [np.mean([k(x, y) for i, x in enumerate(z) for j, y in enumerate(z) if i != j]) for z in (a, b)]
        return float(sum(within) - 2 * np.mean([k(x, y) for x in a for y in b]))

    value, error = kernel_distance(a, b)
    assert value == pytest.approx(mmd(a, b))
    without_a = np.array([mmd(np.delete(a, i, 0), b) for i in range(6)])
    without_b = np.array([mmd(a, np.delete(b, i, 0)) for i in range(5)])
    assert error == pytest.approx(np.sqrt(5 * without_a.var() + 4 * without_b.var()))


def test_kernel_distance_is_unbiased_and_its_error_honest() -> None:
    def draws(shift: float, count: int = 200) -> np.ndarray:
        pairs = (RANDOM.standard_normal((2, 60, 4)) for _ in range(count))
        return np.array([kernel_distance(a, b + shift) for a, b in pairs])

    same, moved = draws(0.0), draws(1.0)
    assert abs(same[:, 0].mean()) < 4 * same[:, 0].std() / np.sqrt(len(same))
    # E (1 + x·y/4)³ from Gaussian moments: 1.75 with both at 0, 2.5 with one at (1, 1, 1, 1), 12.875 with both there
    tolerance = 4 * moved[:, 0].std() / np.sqrt(len(moved))
    assert moved[:, 0].mean() == pytest.approx(1.75 + 12.875 - 2 * 2.5, abs=tolerance)
    assert moved[:, 1].mean() == pytest.approx(moved[:, 0].std(), rel=0.25)
