"""Densities over [-1, 1]."""

from __future__ import annotations

import math
from typing import Literal

from ldm.base.lazy import Tensor, torch
from ldm.bayes.likelihoods.family import Family


class Gaussian(Family):
    """N(location, scale²): minus its logarithm is the squared error."""

    kind: Literal["gaussian"] = "gaussian"

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return -0.5 * ((x - location) * (-log_scale).exp()).square() - (log_scale + 0.5 * math.log(2 * math.pi))


class Laplace(Family):
    """exp(-|x - location| / scale) / (2 scale): minus its logarithm is the absolute error."""

    kind: Literal["laplace"] = "laplace"
    scale: Literal["learned", "fixed"] = "learned"

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return -(x - location).abs() * (-log_scale).exp() - (log_scale + math.log(2))

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        first, second = torch.empty((2, *shape), device=rng.device).exponential_(generator=rng)
        return first - second
