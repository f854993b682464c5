"""Noise levels sigma, x = x0 + sigma n: their distributions in training, as timesteps, and as the grid of a sampler's steps."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ldm.base.lazy import Tensor, torch
from ldm.base.options import Choice

TIMESTEPS = 1000
SIGMA_MIN = 0.002  # Karras et al. 2022


class Noise(Choice):
    """A distribution over noise levels of latents with unit variance."""

    sigma_max: Annotated[float, Field(ge=1)] = 80.0  # noise levels stop here
    shift: Annotated[float, Field(ge=1 / 16, le=16)] = 1.0  # multiplies them (Hoogeboom et al. 2023; Esser et al. 2024, eq. 23)

    def build(self) -> NoiseLevels:
        return NoiseLevels(self, self.table())

    def table(self) -> Tensor:
        """The sigmas of the training timesteps, ascending, float64 (T,)."""
        raise NotImplementedError

    def quantile(self, u: Tensor, table: Tensor) -> Tensor:
        """The quantile function of the training distribution: sigmas for u in [0, 1), like u."""
        raise NotImplementedError

    def uniform_grid(self, t: Tensor, table: Tensor) -> Tensor:
        """Sigmas for times t, which descend evenly from 1 to above 0: timesteps, or the time of flow matching."""
        raise NotImplementedError


class NoiseLevels:
    """Training noise levels: `table` (T,) of sigmas, ascending, and the distribution `noise` that levels are drawn from."""

    def __init__(self, noise: Noise, table: Tensor) -> None:
        self.noise, self.table = noise, table
        self.sigma_min, self.sigma_max = float(table[0]), float(table[-1])
        self._logs: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Sigmas for a training batch, float32 (count,)."""
        # Stratified over the batch: the same distribution with less spread between batches (Kingma et al. 2021, VDM).
        start = torch.rand((), generator=generator, dtype=torch.float64)
        return self.quantile((start + torch.arange(count, dtype=torch.float64) / count) % 1).float()

    def quantile(self, u: Tensor) -> Tensor:
        return self.noise.quantile(u, self.table)

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Fractional training timesteps of noise levels, interpolated in ln sigma, like `sigma`."""
        place = sigma.device, sigma.dtype
        if place not in self._logs:  # kept, because a copy for each call would make a GPU wait
            self._logs[place] = self.table.log().to(sigma)
        logs, log_sigma = self._logs[place], sigma.log()
        upper = torch.searchsorted(logs, log_sigma).clamp(1, len(logs) - 1)
        low, high = logs[upper - 1], logs[upper]
        return (upper - 1 + (log_sigma - low) / (high - low)).clamp(0, len(logs) - 1)

    def grid(self, schedule: str, steps: int) -> Tensor:
        """Noise levels for `steps` sampler steps, descending from sigma_max and ending in 0, float64 (steps + 1,).

        `karras`: Karras et al. 2022, equation 5, with rho = 7. `exponential`: evenly spaced in ln sigma, down to sigma_min.
        `uniform`: evenly spaced in timesteps (diffusers' "trailing"; Lin et al. 2023) or in the time of flow matching.
        """
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        if schedule == "karras":
            low, high = self.sigma_min ** (1 / 7), self.sigma_max ** (1 / 7)
            sigmas = (high + ramp * (low - high)) ** 7.0
        elif schedule == "exponential":
            sigmas = self.sigma_max * (ramp * math.log(self.sigma_min / self.sigma_max)).exp()
        else:
            sigmas = self.noise.uniform_grid(1 - torch.arange(steps, dtype=torch.float64) / steps, self.table)
        return torch.cat([sigmas, sigmas.new_zeros(1)])


class Table(Noise):
    """A variance-preserving schedule, sigma² = (1 - alpha_bar) / alpha_bar, whose entries training draws uniformly."""

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
