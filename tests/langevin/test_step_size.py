"""The step-size finder on quadratic losses, whose Hessian and gradient noise are chosen, and its formulas by simulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from targets import Target, run
from torch import Tensor, nn

from ldm.base.errors import InputError
from ldm.langevin.sgld import SGHMC, SGLD
from ldm.langevin.step_size import StepSize, find_step_size

NUM_DATA, PRIOR = 30, 2.0
EIGENVALUES = torch.tensor([0.1, 0.5, 1.0, 4.0], dtype=torch.float64)  # of the mean loss
SPREADS = torch.tensor([0.3, 2.0, 0.5, 0.7], dtype=torch.float64)  # of minibatches' gradients along the eigenvectors
ROTATION = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q


class Quadratic:
    """Minibatch i's mean loss is ½ wᵀ H w + gᵢ w, w being all parameters; the g have exactly the variances `SPREADS`²."""

    def __init__(self, minibatches: int, eigenvalues: Tensor = EIGENVALUES) -> None:
        self.params = [nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(2))]
        self.hessian = ROTATION @ torch.diag(eigenvalues) @ ROTATION.T
        noise = torch.randn(minibatches, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        noise -= noise.mean(0)
        self.shifts = noise / noise.std(0) * SPREADS @ ROTATION.T

    def __call__(self, i: int) -> Tensor:
        w = torch.cat([p.flatten() for p in self.params]).double()
        return (0.5 * w @ self.hessian @ w + self.shifts[i] @ w).float()


@pytest.mark.parametrize("minibatches", [2, 16])
def test_curvature_and_gradient_noise(minibatches):
    loss = Quadratic(minibatches)
    found = find_step_size(loss, loss.params, num_data=NUM_DATA, prior_precision=PRIOR, minibatches=minibatches)
    assert found.curvature == pytest.approx(NUM_DATA * 4.0 + PRIOR, rel=1e-3)
    assert found.gradient_noise == pytest.approx((NUM_DATA * 0.7) ** 2, rel=1e-2)
    assert found.mean_gradient_noise == pytest.approx(NUM_DATA**2 * float(SPREADS.square().mean()), rel=1e-4)
    assert all(p.grad is None for p in loss.params)


def test_a_negative_eigenvalue_counts_by_its_size():
    loss = Quadratic(4, torch.tensor([-4.0, 0.5, 1.0, 0.1], dtype=torch.float64))
    found = find_step_size(loss, loss.params, num_data=NUM_DATA, minibatches=4)
    assert found.curvature == pytest.approx(NUM_DATA * 4.0, rel=1e-3)


def test_against_the_hessian_of_a_network():
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    x, y = torch.randn(4, 20, 3, generator=generator), torch.randn(4, 20, 1, generator=generator)
    loss = lambda i: (net(x[i]) - y[i]).square().mean()  # noqa: E731
    params = list(net.parameters())
    found = find_step_size(loss, params, num_data=80, minibatches=4)
    names = [name for name, _ in net.named_parameters()]

    def whole(*weights: Tensor) -> Tensor:
        return (torch.func.functional_call(net, dict(zip(names, weights, strict=True)), x) - y).square().mean()

    blocks = torch.autograd.functional.hessian(whole, tuple(params))
    rows = [torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for p, row in zip(params, blocks, strict=True)]
    assert found.curvature == pytest.approx(80 * np.abs(np.linalg.eigvalsh(torch.cat(rows).double().numpy())).max(), rel=0.01)


def test_a_loss_without_curvature():
    """As of a weight that enters linearly: the prior bends alone, or nothing does."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    linear = lambda i: params[0].sum()  # noqa: E731
    assert find_step_size(linear, params, num_data=10, prior_precision=5.0).curvature == pytest.approx(5.0)
    with pytest.raises(InputError, match="neither curvature nor gradient noise"):
        find_step_size(linear, params, num_data=10).recommended()


def test_one_minibatch_has_no_variance():
    with pytest.raises(InputError, match="minibatches 1"):
        find_step_size(Quadratic(2), [], num_data=10, minibatches=1)


CASES = [
    Target(lr=0.4, precision=2.0, noise=10.0),
    Target(lr=0.05, precision=2.0, noise=10.0, friction=0.3),
    Target(lr=0.04, precision=2.0, noise=10.0, temperature=0.1),
]


def measured(target: Target) -> StepSize:
    return StepSize(target.precision, target.noise, target.noise / 2, target.friction, target.temperature)


@pytest.mark.parametrize("target", CASES)
def test_inflation_by_simulation(target):
    make = SGLD if target.friction == 1 else lambda *a, **o: SGHMC(*a, friction=target.friction, **o)
    expected = measured(target).inflation(target.lr)
    assert expected > 1.2
    found = float(run(target, make).var()) * target.precision / target.temperature
    assert found == pytest.approx(expected, rel=3 * math.sqrt(2 / 100_000))


@pytest.mark.parametrize("target", CASES)
def test_what_is_recommended_is_as_inflated_as_stated(target):
    for tolerance in (0.01, 0.05, 0.5):
        lr = measured(target).recommended(tolerance)
        assert measured(target).inflation(lr) == pytest.approx(1 + tolerance)
        variance = replace(target, lr=lr).lyapunov
        assert variance * target.precision / target.temperature == pytest.approx(1 + tolerance)


def test_the_noisier_of_the_two_counts():
    assert StepSize(1.0, 3.0, 12.0).noise_ratio(0.1) == StepSize(1.0, 12.0, 3.0).noise_ratio(0.1) == pytest.approx(4 / 1.2)
    assert StepSize(1.0, 0.0, 0.0).noise_ratio(0.1) == math.inf


def test_contraction_and_divergence():
    """Where |1 - εa/2| reaches 1 the drift alone no longer contracts."""
    found = StepSize(curvature=10.0, gradient_noise=0.0, mean_gradient_noise=0.0)
    assert found.contraction(0.1) == pytest.approx(0.5)
    assert found.inflation(0.399) > 100 and found.inflation(0.4) == math.inf
    grown = run(Target(lr=0.41, precision=10.0), SGLD, chains=100, steps=400)
    assert grown.abs().min() > 1e3 and run(Target(lr=0.39, precision=10.0), SGLD, chains=100, steps=400).abs().max() < 20


@pytest.mark.parametrize("friction", [1.0, 0.3, 0.01])
def test_contraction_is_an_eigenvalue_of_the_update(friction):
    for lr in (0.01, 0.5, 1.0, 3.0, 7.0):
        eigenvalues = np.linalg.eigvals(Target(lr=lr, precision=1.0, friction=friction).transition)
        expected = eigenvalues[np.abs(eigenvalues).argmax()]
        found = StepSize(1.0, 0.0, 0.0, friction).contraction(lr)
        assert abs(found) == pytest.approx(abs(expected)) and (expected.imag or found == pytest.approx(expected.real))


def test_without_noise_there_is_no_step_size():
    with pytest.raises(InputError, match="temperature 0"):
        find_step_size(Quadratic(2), [], num_data=10, temperature=0.0)


def test_warnings():
    found = StepSize(curvature=10.0, gradient_noise=40.0, mean_gradient_noise=0.0)
    good = found.recommended()
    assert found.warnings(good) == []
    (wide,) = found.warnings(5 * good)
    assert f"take {good:.3g}" in wide and f"{found.inflation(5 * good):.2f} times what they should be" in wide
    (far,) = found.warnings(0.5)
    assert "diverges" in far and "-1.5" in far
    cold = replace(found, temperature=0.5)
    assert "to the power of 2" in cold.warnings(cold.recommended())[0]
    assert len(cold.warnings(0.5)) == 2
