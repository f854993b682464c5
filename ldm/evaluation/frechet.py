"""Distances between two sets of features: Fréchet (biased at finite N) and kernel (unbiased, with a standard error).

A Fréchet distance between samples of one distribution is not 0: report N, d and a real-against-real floor beside it.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]  # (N, d)


def frechet_distance(a: Features, b: Features) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½), the squared Fréchet distance of the fitted Gaussians.

    Dowson & Landau 1982; Heusel et al. 2017. In float64, from symmetric eigenvalues, which unlike a general matrix
    square root stay real when a covariance is nearly singular. Needs more samples than dimensions on both sides.
    """
    a, b = _checked(a, b)
    for features in (a, b):
        if len(features) <= features.shape[1]:
            raise ValueError(
                f"a Fréchet distance needs more samples than dimensions, found N = {len(features)} and "
                f"d = {features.shape[1]}: give more images or fewer dimensions"
            )
    cov_a, cov_b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)).sum()
    shift = a.mean(axis=0) - b.mean(axis=0)
    return max(0.0, float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def kernel_distance(a: Features, b: Features) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x·y/d + 1)³ ("KID", Bińkowski et al. 2018), and its standard error.

    `a` and `b` must be independent samples. The standard error is a jackknife over both; it errs to the large side
    near distance 0.
    """
    a, b = _checked(a, b)
    m, n = len(a), len(b)
    if min(m, n) < 3:
        raise ValueError(f"a kernel distance needs at least 3 samples on both sides, found {m} and {n}")
    in_a, in_b, cross = (_kernel(x, y) for x, y in ((a, a), (b, b), (a, b)))
    np.fill_diagonal(in_a, 0)
    np.fill_diagonal(in_b, 0)
    sum_a, sum_b, sum_cross = in_a.sum(), in_b.sum(), cross.sum()
    without_a = _mmd(sum_a - 2 * in_a.sum(axis=1), sum_b, sum_cross - cross.sum(axis=1), m - 1, n)
    without_b = _mmd(sum_a, sum_b - 2 * in_b.sum(axis=1), sum_cross - cross.sum(axis=0), m, n - 1)
    variance = (m - 1) * without_a.var() + (n - 1) * without_b.var()
    return float(_mmd(sum_a, sum_b, sum_cross, m, n)), float(np.sqrt(variance))


def _mmd(sum_a: Any, sum_b: Any, sum_cross: Any, m: int, n: int) -> Any:
    """From the kernel summed over pairs within m, within n and across; floats, or arrays of leave-one-out sums."""
    return sum_a / (m * (m - 1)) + sum_b / (n * (n - 1)) - 2 * sum_cross / (m * n)


def _kernel(a: Features, b: Features) -> NDArray[np.float64]:
    kernel: NDArray[np.float64] = (a @ b.T / a.shape[1] + 1) ** 3
    return kernel


def _checked(a: Features, b: Features) -> tuple[Features, Features]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected features (N, d) with one d, found {a.shape} and {b.shape}")
    for side, features in (("first", a), ("second", b)):
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
            raise ValueError(f"row {row} of the {side} features is not finite")
    return a, b
