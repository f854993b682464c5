"""Distributions of training noise levels: tables of timesteps, and continuous ones within [SIGMA_MIN, sigma_max]."""

import math
from typing import ClassVar, Literal

from ldm.base.lazy import Tensor, torch
from ldm.diffusion.noise.levels import Noise

TIMESTEPS = 1000
SIGMA_MIN = 0.002  # Karras et al. 2022


class Table(Noise):
    """A variance-preserving schedule, whose entries training draws uniformly. Timesteps beyond `sigma_max` are left out.

    sigma = sqrt((1 - alpha_bar) / alpha_bar), where alpha_bar is the cumulative product of 1 - beta (Karras et al. 2022, app. C).
    """

    zero_terminal_snr: bool = False  # rescale it, so that the last timestep is noise alone (Lin et al. 2023, algorithm 1)

    def betas(self) -> Tensor:
        """float64 (TIMESTEPS,)."""
        raise NotImplementedError

    def table(self) -> Tensor:
        alpha = torch.cumprod(1 - self.betas(), 0).sqrt()
        if self.zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        table = self.shift * (1 - alpha**2).sqrt() / alpha
        return table[table <= self.sigma_max]

    def quantile(self, u: Tensor, table: Tensor) -> Tensor:
        return table[(u * len(table)).long()].to(u)

    def uniform_grid(self, t: Tensor, table: Tensor) -> Tensor:
        position = t * len(table) - 1
        lower = position.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[lower].log(), table[lower + 1].log(), position - lower).exp()


class Linear(Table):
    """Ho et al. 2020."""

    kind: Literal["linear"] = "linear"

    def betas(self) -> Tensor:
        return torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)


class ScaledLinear(Table):
    """The square root of beta is linear (Rombach et al. 2022)."""

    kind: Literal["scaled_linear"] = "scaled_linear"

    def betas(self) -> Tensor:
        return torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2


class Cosine(Table):
    """Nichol & Dhariwal 2021."""

    kind: Literal["cosine"] = "cosine"

    def betas(self) -> Tensor:
        t = torch.linspace(0, 1, TIMESTEPS + 1, dtype=torch.float64)
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)


class Continuous(Noise):
    """In the time of flow matching, x = (1 - t) x0 + t n, t = sigma / (1 + sigma). The table is evenly spaced in ln sigma."""

    def table(self) -> Tensor:
        return torch.logspace(math.log10(SIGMA_MIN), math.log10(self.sigma_max), TIMESTEPS, dtype=torch.float64)

    def uniform_grid(self, t: Tensor, table: Tensor) -> Tensor:
        t = t * _time(float(table[-1]) / self.shift)
        return self.shift * t / (1 - t)


class _Normal(Continuous):
    """ln sigma is normal, truncated to the range."""

    mean: ClassVar[float] = 0.0
    std: ClassVar[float] = 1.0

    def quantile(self, u: Tensor, table: Tensor) -> Tensor:
        ends = torch.tensor([float(table[0]), float(table[-1])], dtype=u.dtype)
        low, high = torch.special.ndtr((ends.div(self.shift).log() - self.mean) / self.std)
        return self.shift * (self.mean + self.std * torch.special.ndtri(low + u * (high - low))).exp()


class LogNormal(_Normal):
    """Karras et al. 2022 (EDM)."""

    kind: Literal["lognormal"] = "lognormal"
    mean, std = -1.2, 1.2


class LogitNormal(_Normal):
    """The logit of t, which is ln sigma, is standard normal (Esser et al. 2024)."""

    kind: Literal["logitnormal"] = "logitnormal"


class LogUniform(Continuous):
    """ln sigma is uniform. There is no shift, because the ends stay where they are."""

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
