"""Noise levels sigma, x = x0 + sigma n: their distribution in training, as timesteps, and as the grid of a sampler's steps."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from ldm.base.lazy import Tensor, torch
from ldm.base.options import Choice


class Noise(Choice):
    """A distribution over noise levels of latents with unit variance."""

    sigma_max: Annotated[float, Field(ge=1)] = 80.0  # noise levels stop here
    # Multiplies noise levels: an image of twice the side needs twice the noise to hide what it shows (Hoogeboom et al. 2023; in
    # terms of sigma, the timestep shift of Esser et al. 2024, equation 23, is the same).
    shift: Annotated[float, Field(ge=1 / 16, le=16)] = 1.0

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
        return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
