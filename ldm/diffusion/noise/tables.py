"""Tables of timesteps, drawn uniformly, of variance-preserving schedules.

The cumulative product `alpha_bar` of 1 - beta gives sigma = sqrt((1 - alpha_bar) / alpha_bar) (Karras et al. 2022, appendix C).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from ldm.base.errors import InputError
from ldm.base.lazy import Tensor, torch
from ldm.diffusion.noise.distribution import TIMESTEPS, Noise


class Table(Noise):
    """`zero_terminal_snr` rescales the table so that its last timestep is noise alone (Lin et al. 2023, algorithm 1).

    Sigma then grows without bound, as it nearly does in the cosine table, and timesteps beyond `sigma_max` are left out.
    """

    zero_terminal_snr: bool = False

    def betas(self) -> Tensor:
        """float64 (TIMESTEPS,)."""
        raise NotImplementedError

    def table(self) -> Tensor:
        alpha = torch.cumprod(1 - self.betas(), 0).sqrt()
        if self.zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        table = self.shift * (1 - alpha**2).sqrt() / alpha
        table = table[table <= self.sigma_max]
        if len(table) < 2:
            raise InputError(
                f"diffusion.noise {self.kind}, shift {self.shift}: no two levels lie below sigma_max {self.sigma_max}; raise it"
            )
        return table

    def quantile(self, u: Tensor, table: Tensor) -> Tensor:
        return table[(u * len(table)).long()].to(u)

    def uniform_grid(self, t: Tensor, table: Tensor) -> Tensor:
        position = t * len(table) - 1
        lower = position.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[lower].log(), table[lower + 1].log(), position - lower).exp()


class _Linear(Table):
    """beta to the power `power` rises linearly from the first to the last."""

    first: ClassVar[float]
    last: ClassVar[float]
    power: ClassVar[float]

    def betas(self) -> Tensor:
        ends = self.first**self.power, self.last**self.power
        return torch.linspace(*ends, TIMESTEPS, dtype=torch.float64) ** (1 / self.power)


class Linear(_Linear):
    """Ho et al. 2020."""

    kind: Literal["linear"] = "linear"
    first: ClassVar[float] = 1e-4
    last: ClassVar[float] = 0.02
    power: ClassVar[float] = 1.0


class ScaledLinear(_Linear):
    """Rombach et al. 2022."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    first: ClassVar[float] = 0.00085
    last: ClassVar[float] = 0.012
    power: ClassVar[float] = 0.5


class Cosine(Table):
    """Nichol & Dhariwal 2021."""

    kind: Literal["cosine"] = "cosine"

    def betas(self) -> Tensor:
        t = torch.linspace(0, 1, TIMESTEPS + 1, dtype=torch.float64)
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
