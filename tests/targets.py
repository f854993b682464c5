"""Posteriors that are known, for samplers to be compared with: a Gaussian, and the mixture of Welling & Teh (2011)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_discrete_lyapunov
from scipy.stats import norm
from torch import Tensor

from ldm.langevin.sgld import SGLD, Schedule

NUM_DATA = 50


@dataclass(frozen=True)
class Target:
    """A posterior N(centre, 1 / precision) of a weight, and how it is sampled."""

    lr: float  # ε
    precision: float  # a, of which `prior` belongs to the prior N(0, 1 / prior)
    noise: float = 0.0  # V, variance of the gradient of U
    prior: float = 0.0
    centre: float = 0.0
    friction: float = 1.0  # α; 1 is SGLD
    temperature: float = 1.0

    @property
    def start(self) -> float:
        return self.centre + self.precision**-0.5

    def gradient(self, weight: Any) -> Any:
        """Of the negative log-likelihood."""
        likelihood = self.precision - self.prior
        return likelihood * weight - self.precision * self.centre

    @property
    def formula(self) -> float:
        """The stationary variance, as the README has it."""
        most = self.temperature + self.lr * self.noise / (4 * self.friction)
        return most / (self.precision * (1 - self.lr * self.precision / (4 * (2 - self.friction))))

    @property
    def transition(self) -> np.ndarray:
        """Of (θ, v), the update of SGHMC without its noise."""
        kept, drift = 1 - self.friction, self.lr * self.precision / 2
        return np.array([[1 - drift, kept], [-drift, kept]])

    @property
    def lyapunov(self) -> float:
        """The stationary variance as a solution of s = A s Aᵀ + Q."""
        added = self.friction * self.lr * self.temperature + self.lr**2 * self.noise / 4
        return float(solve_discrete_lyapunov(self.transition, np.full((2, 2), added))[0, 0])

    @property
    def steps(self) -> int:
        """After which 1e-5 of a start is left."""
        return math.ceil(math.log(1e-5) / math.log(np.abs(np.linalg.eigvals(self.transition)).max()))


def run(
    target: Target, make: Callable[..., Any], *, chains: int = 100_000, steps: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights, float64 (chains,), of independent chains after `steps` (by default `target.steps`) of a sampler.

    `make` is called as the samplers are. The first gradient has no noise, so that a preconditioner which adapts to it alone is
    the same for all.
    """
    weights = torch.full((chains,), target.start, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    optimizer = make(
        [weights], target.lr, num_data=NUM_DATA, prior_precision=target.prior, temperature=target.temperature, seed=11
    )  # fmt: skip
    for step in range(steps or target.steps):
        gradient = target.gradient(weights)
        if step and target.noise:
            gradient += math.sqrt(target.noise) * torch.randn(chains, generator=generator, dtype=torch.float32)
        weights.grad = gradient / NUM_DATA
        optimizer.step()
    return weights.double()


@dataclass(frozen=True)
class Mixture:
    """x ~ ½ N(θ1, 2) + ½ N(θ1 + θ2, 2), θ1 ~ N(0, 10), θ2 ~ N(0, 1), 100 points of (0, 1) (Welling & Teh 2011, section 5.1).

    Its posterior has a mode near (0, 1) and one near (1, -1), where the two components have changed places.
    """

    seed: int = 30
    count: int = 100
    cells: int = 40
    prior_precisions = (1 / 10, 1.0)

    @cached_property
    def points(self) -> np.ndarray:
        random = np.random.default_rng(self.seed)
        return random.normal(np.where(random.random(self.count) < 0.5, 0, 1), math.sqrt(2))

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the cells of a grid over θ1 and θ2, outside of which there is next to nothing."""
        return np.linspace(-1.5, 2.5, self.cells + 1), np.linspace(-3, 3, self.cells + 1)

    def posterior(self, inside: int = 4, power: float = 1.0) -> np.ndarray:
        """Probabilities of the cells (cells, cells), from `inside`² points in each; of the density to some power."""
        first, second = (
            (e[:-1, None] + (np.arange(inside) + 0.5) / inside * (e[1] - e[0])).ravel() for e in self.edges
        )  # fmt: skip
        one = norm.logpdf(self.points, first[:, None], 2**0.5)[:, None]
        other = norm.logpdf(self.points, (first[:, None] + second)[..., None], 2**0.5)
        log_density = np.logaddexp(one, other).sum(-1) + norm.logpdf(first, 0, 10**0.5)[:, None] + norm.logpdf(second)
        density = np.exp(power * (log_density - log_density.max()))
        cells = density.reshape(self.cells, inside, self.cells, inside).sum((1, 3))
        return cells / cells.sum()

    def gradient(self, first: Tensor, second: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Of the mean negative log-likelihood of `points` (batch, chains), by θ1 and θ2, both (chains,)."""
        from_one = points - first
        from_other = from_one - second
        other = torch.sigmoid((from_one.square() - from_other.square()) / 4)  # whose it is
        by_second = other * from_other / 2
        return -((1 - other) * from_one / 2 + by_second).mean(0), -by_second.mean(0)

    def sample(
        self, lr: float | Schedule, steps: int, *, chains: int, batch: int, burn_in: int, thin: int = 20, seed: int = 0
    ) -> np.ndarray:
        """Probabilities of the cells (cells, cells) by SGLD from draws of the prior, weighted by step size."""
        generator = torch.Generator().manual_seed(seed)
        points = torch.from_numpy(self.points).float()
        weights = [torch.randn(chains, generator=generator) / p**0.5 for p in self.prior_precisions]
        groups = [{"params": [w], "prior_precision": p} for w, p in zip(weights, self.prior_precisions, strict=True)]
        optimizer = SGLD(groups, lr, num_data=self.count, seed=seed)
        found, total = np.zeros((self.cells, self.cells)), 0.0
        for step in range(steps):
            drawn = points[torch.randint(self.count, (batch, chains), generator=generator)]
            for weight, gradient in zip(weights, self.gradient(*weights, drawn), strict=True):
                weight.grad = gradient
            size = optimizer.step_size()
            optimizer.step()
            if step >= burn_in and step % thin == 0:
                found += size * np.histogram2d(*(w.numpy() for w in weights), bins=self.edges)[0]
                total += size * chains
        return found / total

    @staticmethod
    def distance(one: np.ndarray, other: np.ndarray) -> float:
        """Total variation; what lies outside of the grid counts as different."""
        return float(0.5 * np.abs(one - other).sum() + 0.5 * abs(one.sum() - other.sum()))
