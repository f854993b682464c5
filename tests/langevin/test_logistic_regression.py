"""SGLD with minibatches against a reference run of NUTS: logistic regression on scikit-learn's breast cancer data, prior N(0, 1).

Figures are printed with `-s`.
"""

import math
from dataclasses import dataclass
from functools import cached_property, partial

import arviz
import numpy as np
import pyro
import pytest
import torch
from pyro.infer import MCMC, NUTS
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from ldm.langevin import SGLD, Chains, find_step_size

BATCH = 128


@dataclass(frozen=True)
class Regression:
    """Standardised features and a constant one (N, 31), classes 0 and 1 (N,), float64."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def breast_cancer(cls) -> "Regression":
        features, classes = load_breast_cancer(return_X_y=True)
        x, test_x, y, test_y = train_test_split(features, classes, test_size=0.25, random_state=0, stratify=classes)
        mean, std = x.mean(0), x.std(0)

        def design(values: np.ndarray) -> Tensor:
            return torch.tensor(np.column_stack([(values - mean) / std, np.ones(len(values))]))

        return cls(design(x), torch.tensor(y, dtype=torch.float64), design(test_x), torch.tensor(test_y, dtype=torch.float64))

    def potential(self, w: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(self.x @ w, self.y, reduction="sum") + 0.5 * w.square().sum()

    @cached_property
    def mode(self) -> Tensor:
        """By Newton's method, from 0."""
        w = torch.zeros(self.x.shape[1], dtype=torch.float64)
        for _ in range(12):
            gradient = torch.func.grad(self.potential)(w)
            w = w - torch.linalg.solve(torch.func.hessian(self.potential)(w), gradient)
        assert gradient.norm() < 1e-9
        return w

    def predictive(self, draws: Tensor) -> Tensor:
        """log p(class | data) of the test patients, (n,), averaged over draws (S, 31)."""
        each = logsigmoid((2 * self.test_y - 1) * (draws.double() @ self.test_x.T))
        return torch.logsumexp(each, 0) - math.log(len(draws))


def nuts(data: Regression, count: int, warmup: int = 100) -> Tensor:
    """(count, 31), one chain, which moves in the coordinates in which the posterior is nearly N(0, I)."""
    factor = torch.linalg.cholesky(torch.func.hessian(data.potential)(data.mode))
    spread = torch.linalg.inv(factor).T
    pyro.set_rng_seed(1)
    kernel = NUTS(potential_fn=lambda z: data.potential(data.mode + spread @ z["z"]), target_accept_prob=0.7)
    start = {"z": torch.zeros_like(data.mode)}
    run = MCMC(kernel, num_samples=count, warmup_steps=warmup, initial_params=start, disable_progbar=True)
    run.run()
    return data.mode + run.get_samples()["z"] @ spread.T


def sgld(data: Regression, chains: int, steps: int, burn_in: int, seed: int = 0) -> tuple[Tensor, float]:
    """(chains, draws, 31) from the mode, and the step size that `find_step_size` recommends there."""
    x, y, rng = data.x.float(), data.y.float(), torch.Generator().manual_seed(seed)
    start = data.mode.float().requires_grad_()
    batches = torch.randint(len(x), (64, BATCH), generator=rng)

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(x @ weights["w"], y)

    common = {"num_data": len(x), "prior_precision": 1.0}
    found = find_step_size(lambda i: loss({"w": start}, x[batches[i]], y[batches[i]]), [start], minibatches=64, **common)
    sampler = partial(SGLD, lr=found.recommended(), seed=seed, **common)
    run = Chains(loss, {"w": start.expand(chains, -1)}, sampler, burn_in=burn_in, thin=50)
    for _ in range(steps):
        batch = torch.randint(len(x), (chains, BATCH), generator=rng)
        run.step(x[batch], y[batch])
    return run.draws().values["w"], found.recommended()


@pytest.mark.parametrize(
    ("chains", "steps", "burn_in", "reference"),
    [(64, 5000, 1500, 800), pytest.param(128, 20_000, 4000, 10_000, marks=pytest.mark.soak)],
)
def test_predicts_no_worse_than_nuts(chains: int, steps: int, burn_in: int, reference: int) -> None:
    data = Regression.breast_cancer()
    theirs = nuts(data, reference)
    ours, lr = sgld(data, chains, steps, burn_in)
    effective = min(arviz.ess(theirs[None, :, i].numpy()) for i in range(theirs.shape[1]))
    assert effective > reference / 2

    predicted, expected = data.predictive(ours.flatten(0, 1)), data.predictive(theirs)
    difference, error = (predicted - expected).mean(), (predicted - expected).std() / math.sqrt(len(expected))
    print(f"\nlog-likelihood of a test patient: SGLD {predicted.mean():.5f}, NUTS {expected.mean():.5f} (ESS {effective:.0f}),")
    print(f"  difference {difference:.5f} ± {error:.5f}; {chains} chains of {steps} steps of {lr:.5f}")

    # Chains are independent of each other, so their means tell the Monte-Carlo error.
    means, std = ours.double().mean(1), theirs.std(0)
    mcse = torch.tensor([arviz.mcse(theirs[None, :, i].numpy()) for i in range(theirs.shape[1])])
    off = (means.mean(0) - theirs.mean(0)).abs()
    errors = (means.var(0) / chains + mcse**2).sqrt()
    variances = (ours.double().flatten(0, 1).var(0) / std**2).mean()
    print(f"  posterior means: off by {(off / std).max():.3f} standard deviations, {(off / errors).max():.2f} MCSE at most;")
    print(f"  variances: {variances:.3f} times NUTS' on average")

    assert difference >= -error
    assert (off / errors).max() < 4  # of 31
    assert variances == pytest.approx(1, abs=0.08)  # what `recommended` allows SGLD, 0.05, and both sides' errors
