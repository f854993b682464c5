"""Noise levels in use: drawn for training, as fractional timesteps, and as the descending grid of a sampler's steps."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.diffusion.noise.distribution import Noise, Schedule


@dataclass(frozen=True)
class NoiseLevels:
    """Training noise levels: `table` (T,) of sigmas, ascending, and the distribution `noise` that levels are drawn from."""

    noise: Noise
    table: Tensor
    _logs: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sigma_min(self) -> float:
        return float(self.table[0])

    @property
    def sigma_max(self) -> float:
        return float(self.table[-1])

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Sigmas for a training batch, float32 (count,)."""
        # Stratified over the batch: the same distribution with less spread between batches (Kingma et al. 2021, VDM).
        start = torch.rand((), generator=generator, dtype=torch.float64)
        return self.quantile((start + torch.arange(count, dtype=torch.float64) / count) % 1).float()

    def quantile(self, u: Tensor) -> Tensor:
        """The training distribution's quantile function of u in [0, 1), like u."""
        return self.noise.quantile(u, self.table)

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Fractional training timesteps of noise levels, interpolated in ln sigma, like `sigma`."""
        logs = self._log_table(sigma)
        log_sigma = sigma.log()
        upper = torch.searchsorted(logs, log_sigma).clamp(1, len(logs) - 1)
        low, high = logs[upper - 1], logs[upper]
        return (upper - 1 + (log_sigma - low) / (high - low)).clamp(0, len(logs) - 1)

    def grid(self, schedule: Schedule, steps: int) -> Tensor:
        """Noise levels for `steps` sampler steps, descending from sigma_max and ending in 0, float64 (steps + 1,).

        `karras` (Karras et al. 2022, equation 5); `exponential`, evenly apart in ln sigma, down to sigma_min; `uniform`, evenly
        apart in training timesteps (diffusers' "trailing"; Lin et al. 2023) or, for a continuous distribution, in t.
        """
        if steps < 1:
            raise InputError(f"steps {steps}: a sampler takes at least one")
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        if schedule == "karras":
            sigmas = _karras(ramp, self.sigma_min, self.sigma_max)
        elif schedule == "exponential":
            sigmas = self.sigma_max * (ramp * math.log(self.sigma_min / self.sigma_max)).exp()
        else:
            sigmas = self.noise.uniform_grid(1 - torch.arange(steps, dtype=torch.float64) / steps, self.table)
        return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])

    def _log_table(self, like: Tensor) -> Tensor:
        """ln of the table where `like` is, kept there: a copy for each call would make a GPU wait."""
        place = like.device, like.dtype
        if place not in self._logs:
            self._logs[place] = self.table.log().to(like)
        return self._logs[place]


def _karras(ramp: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho
