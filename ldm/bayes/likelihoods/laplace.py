"""The Laplace likelihood, whose negative logarithm is the absolute error."""

from __future__ import annotations

import math
from typing import Literal

from ldm.base.lazy import Tensor, torch
from ldm.bayes.likelihoods.family import Family


class Laplace(Family):
    """A density of mean absolute deviation `scale`: exp(-|x - location| / scale) / (2 scale)."""

    kind: Literal["laplace"] = "laplace"
    scale: Literal["learned", "fixed"] = "learned"  # fewer than the base class has

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return -(x - location).abs() * (-log_scale).exp() - (log_scale + math.log(2))

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        first, second = torch.empty((2, *shape), device=rng.device).exponential_(generator=rng)
        return first - second
