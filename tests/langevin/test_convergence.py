"""Diagnostics of chains whose mixing is known."""

import numpy as np
import pandas as pd
import pytest
from scipy.signal import lfilter

from ldm.langevin.chains import convergence, warnings

RANDOM = np.random.default_rng(0)


def autoregressive(phi: float, chains: int, draws: int, quantities: int) -> np.ndarray:
    """Stationary x_t = φ x_(t-1) + noise of variance 1, whose first draw has the stationary variance."""
    noise = RANDOM.standard_normal((chains, draws, quantities))
    noise[:, 0] /= np.sqrt(1 - phi**2)
    return lfilter([1.0], [1.0, -phi], noise, axis=1)


def test_independent_draws_are_as_many_as_they_are():
    found = convergence(RANDOM.standard_normal((4, 1000, 20)))
    assert list(found.columns) == ["rhat", "ess"] and len(found) == 20
    assert (found.rhat < 1.01).all() and (found.rhat > 0.99).all()
    assert found.ess.mean() == pytest.approx(4000, rel=0.05)
    assert warnings(found) == []


def test_quantities_keep_their_order():
    values = RANDOM.standard_normal((4, 500, 3))
    values[0, :, 1] += 3
    found = convergence(values)
    assert found.rhat[1] > 1.1 and (found.rhat[[0, 2]] < 1.02).all()
    assert found.ess[1] < 50 < 400 < found.ess[[0, 2]].min()


@pytest.mark.parametrize("phi", [0.5, 0.9, -0.5])
def test_the_effective_sample_size_of_an_autoregressive_chain(phi):
    """n (1 - φ) / (1 + φ) for the mean of n draws; the mean over many chains, as one estimate is off by some percent."""
    found = convergence(autoregressive(phi, 4, 2000, 20))
    assert found.ess.mean() == pytest.approx(8000 * (1 - phi) / (1 + phi), rel=0.1)
    assert found.rhat.max() < 1.05


@pytest.mark.parametrize("kind", ["shifted", "drifting", "wider"])
def test_chains_that_have_not_mixed(kind):
    """Rank-normalised split R-hat sees other means, a trend within a chain and, by folding, other variances."""
    values = RANDOM.standard_normal((4, 500, 1))
    if kind == "shifted":
        values[0] += 2
    elif kind == "drifting":
        values += np.linspace(0, 3, 500)[None, :, None]
    else:
        values[:2] *= 5
    found = convergence(values)
    assert found.rhat[0] > 1.1
    assert f"R-hat is {found.rhat[0]:.3g} where it should be 1.01 at most" in warnings(found)[0]


def test_warnings_are_of_the_worst_quantity():
    assert warnings(pd.DataFrame({"rhat": [1.0, 1.01], "ess": [400.0, 9000.0]})) == []
    (few,) = warnings(pd.DataFrame({"rhat": [1.0, 1.0], "ess": [399.0, 9000.0]}))
    assert few == "the effective sample size is 399 where 400 are asked for; take more draws, farther apart"
    (mixed,) = warnings(pd.DataFrame({"rhat": [1.0, 1.02], "ess": [500.0, 9000.0]}))
    assert mixed.startswith("R-hat is 1.02")


def test_too_few_draws_are_never_called_converged():
    found = convergence(RANDOM.standard_normal((2, 3, 1)))
    assert found.isna().all(axis=None)
    assert len(warnings(found)) == 2
