"""Continuous distributions of noise levels within [sigma_min, sigma_max].

The time t of flow matching, x = (1 - t) x0 + t n, is sigma / (1 + sigma). The table of timesteps, by which networks are told the
noise level, has `TIMESTEPS` sigmas evenly apart in ln sigma.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from ldm.base.lazy import Tensor, torch
from ldm.diffusion.noise.distribution import TIMESTEPS, Noise

SIGMA_MIN = 0.002  # Karras et al. 2022


class Continuous(Noise):
    def table(self) -> Tensor:
        return torch.logspace(math.log10(SIGMA_MIN), math.log10(self.sigma_max), TIMESTEPS, dtype=torch.float64)

    def uniform_grid(self, t: Tensor, table: Tensor) -> Tensor:
        t = t * _time(float(table[-1]) / self.shift)
        return self.shift * t / (1 - t)


class _Normal(Continuous):
    """ln sigma is normal, truncated to the range."""

    mean: ClassVar[float]
    std: ClassVar[float]

    def quantile(self, u: Tensor, table: Tensor) -> Tensor:
        ends = torch.tensor([float(table[0]), float(table[-1])], dtype=u.dtype)
        low, high = torch.special.ndtr((ends.div(self.shift).log() - self.mean) / self.std)
        return self.shift * (self.mean + self.std * torch.special.ndtri(low + u * (high - low))).exp()


class LogNormal(_Normal):
    """Karras et al. 2022 (EDM)."""

    kind: Literal["lognormal"] = "lognormal"
    mean: ClassVar[float] = -1.2
    std: ClassVar[float] = 1.2


class LogitNormal(_Normal):
    """The logit of t is standard normal (Esser et al. 2024)."""

    kind: Literal["logitnormal"] = "logitnormal"
    mean: ClassVar[float] = 0.0
    std: ClassVar[float] = 1.0


class LogUniform(Continuous):
    """ln sigma is uniform: no shift, as the ends stay where they are."""

    kind: Literal["loguniform"] = "loguniform"
    shift: ClassVar[float] = 1.0  # type: ignore[misc]

    def quantile(self, u: Tensor, table: Tensor) -> Tensor:
        low, high = float(table[0]), float(table[-1])
        return low * (u * math.log(high / low)).exp()


class Uniform(Continuous):
    """t is uniform (Lipman et al. 2023)."""

    kind: Literal["uniform"] = "uniform"

    def quantile(self, u: Tensor, table: Tensor) -> Tensor:
        low, high = (_time(float(sigma) / self.shift) for sigma in (table[0], table[-1]))
        t = low + u * (high - low)
        return self.shift * t / (1 - t)


def _time(sigma: float) -> float:
    return sigma / (1 + sigma)
