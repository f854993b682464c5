"""Posteriors from minibatches: linear regression in closed form, and the mixture of Welling & Teh (2011) on a grid."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from targets import Mixture

from ldm.langevin.chains import Chains
from ldm.langevin.sgld import SGLD, Polynomial

MIXTURE = Mixture()


def test_linear_regression():
    """Mean within 0.03 posterior standard deviations and covariance within 5 %, of which 2 % are the step size's own error."""
    count, dims, batch, chains, steps, std, precision = 60, 3, 30, 1000, 3000, 0.5, 2.0
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(count, dims, generator=generator) * torch.tensor([1.0, 0.7, 0.5])
    targets = inputs @ torch.tensor([1.0, -2.0, 0.5]) + std * torch.randn(count, generator=generator)

    def loss(weights, x, y):
        return (y - x @ weights["w"]).square().mean() / (2 * std**2)

    sampler = partial(SGLD, lr=Polynomial.between(1e-3, 1e-4, steps), num_data=count, prior_precision=precision, seed=1)
    start = {"w": torch.randn(chains, dims, generator=generator)}
    run = Chains(loss, start, sampler, burn_in=steps // 3, thin=20)
    for _ in range(steps):
        rows = torch.randint(count, (chains, batch), generator=generator)
        run.step(inputs[rows], targets[rows])
    draws = run.draws()

    x, y = inputs.double().numpy(), targets.double().numpy()
    covariance = np.linalg.inv(x.T @ x / std**2 + precision * np.eye(dims))
    mean = covariance @ x.T @ y / std**2
    found = draws.values["w"].double().numpy().reshape(-1, dims)
    weights = np.tile(draws.weights.numpy(), chains)
    error = (np.average(found, axis=0, weights=weights) - mean) / np.sqrt(np.diag(covariance))
    assert np.abs(error).max() < 0.03
    whiten = np.linalg.inv(np.linalg.cholesky(covariance))
    np.testing.assert_allclose(whiten @ np.cov(found.T, aweights=weights) @ whiten.T, np.eye(dims), atol=0.05)


def modes(cells: np.ndarray) -> list[tuple[float, float]]:
    """The fullest cell of either sign of θ2."""
    first, second = (e[:-1] + np.diff(e) / 2 for e in MIXTURE.edges)
    found = []
    for sign in (1, -1):
        i, j = np.unravel_index(np.argmax(cells * (sign * second > 0)), cells.shape)
        found.append((float(first[i]), float(second[j])))
    return found


def assert_mixture(cells: np.ndarray, bound: float) -> None:
    exact = MIXTURE.posterior()
    for mode, expected in zip(modes(cells), modes(exact), strict=True):
        assert math.dist(mode, expected) < 0.5
    assert Mixture.distance(cells, exact) < bound


def test_the_bound_on_the_mixture_tells_posteriors_apart():
    """That at temperature 1.5 is twice as far, one mode alone nine times."""
    exact = MIXTURE.posterior()
    np.testing.assert_allclose(modes(exact), [(0, 1), (1, -1)], atol=0.25)
    assert Mixture.distance(exact, MIXTURE.posterior(power=1 / 1.5)) > 2 * 0.05
    one = exact * (MIXTURE.edges[1][1:] > 0)
    assert Mixture.distance(exact, one / one.sum()) > 9 * 0.05
    assert Mixture.distance(exact, MIXTURE.posterior(inside=8)) < 1e-3


def test_mixture():
    """Batches of 10."""
    cells = MIXTURE.sample(Polynomial.between(2e-3, 3e-4, 8000), 8000, chains=1000, batch=10, burn_in=3000)
    assert_mixture(cells, 0.05)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_mixture_at_full_length():
    """The paper's schedule and one datum a step, a hundred times over, without the first half, where the gradients add
    too much noise of their own."""
    schedule = Polynomial.between(0.01, 1e-4, 10**6)
    cells = MIXTURE.sample(schedule, 10**6, chains=100, batch=1, burn_in=500_000, thin=100)
    assert_mixture(cells, 0.07)
