"""Noise levels: the training distributions, the table of timesteps, and the grids that samplers walk.

Everywhere `x = x0 + sigma * n`. A variance-preserving schedule with cumulative product `alpha_bar` has
`sigma = sqrt((1 - alpha_bar) / alpha_bar)` (Karras et al. 2022, "Elucidating the design space", appendix C), and the
time t of flow matching, x = (1 - t) x0 + t n, is sigma / (1 + sigma).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.base.errors import InputError

TIMESTEPS = 1000
SIGMA_MIN = 0.002  # of the continuous distributions (Karras et al. 2022)
BETAS = {"linear": (1e-4, 0.02, 1.0), "scaled_linear": (0.00085, 0.012, 0.5)}  # first, last, linear in beta to this power
TABLES = (*BETAS, "cosine")
NORMAL = {"lognormal": (-1.2, 1.2), "logitnormal": (0.0, 1.0)}  # mean and standard deviation of ln sigma
SCHEDULES = ("karras", "exponential", "uniform")


@dataclass(frozen=True)
class NoiseLevels:
    """Training noise levels: `table` (T,) of sigmas, ascending, and how a level is drawn from it.

    `noise` is `linear` (Ho et al. 2020), `scaled_linear` (Rombach et al. 2022), `cosine` (Nichol & Dhariwal 2021):
    timesteps drawn uniformly; or continuous, within [sigma_min, sigma_max]: `lognormal` (Karras et al. 2022), `logitnormal`
    (Esser et al. 2024: the logit of t is standard normal), `loguniform` (ln sigma uniform), `uniform` (t uniform).
    Their table has `TIMESTEPS` sigmas evenly apart in ln sigma.

    `shift` multiplies noise levels: images of more pixels need more noise to hide what they show, in proportion to their side
    (Hoogeboom et al. 2023; the timestep shift of Esser et al. 2024, equation 23, is the same in terms of sigma).
    """

    noise: str
    table: Tensor
    shift: float = 1.0
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
        """The training distribution's quantile function: sigmas below which a share `u` in [0, 1) of the draws lies, like `u`."""
        if self.noise in NORMAL:
            mean, std = NORMAL[self.noise]
            standard = (torch.tensor([self.sigma_min, self.sigma_max], dtype=u.dtype).div(self.shift).log() - mean) / std
            low, high = torch.special.ndtr(standard)
            return self.shift * (mean + std * torch.special.ndtri(low + u * (high - low))).exp()
        if self.noise == "loguniform":
            return self.sigma_min * (u * math.log(self.sigma_max / self.sigma_min)).exp()
        if self.noise == "uniform":
            low, high = (_time(s / self.shift) for s in (self.sigma_min, self.sigma_max))
            t = low + u * (high - low)
            return self.shift * t / (1 - t)
        return self.table[(u * len(self.table)).long()].to(u)

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Fractional training timesteps of noise levels, interpolated in ln sigma, like `sigma`."""
        logs = self._log_table(sigma)
        log_sigma = sigma.log()
        upper = torch.searchsorted(logs, log_sigma).clamp(1, len(logs) - 1)
        low, high = logs[upper - 1], logs[upper]
        return (upper - 1 + (log_sigma - low) / (high - low)).clamp(0, len(logs) - 1)

    def grid(self, schedule: str, steps: int) -> Tensor:
        """Noise levels for `steps` sampler steps, descending from sigma_max and ending in 0, float64 (steps + 1,).

        `karras`, `exponential` (evenly apart in ln sigma, down to sigma_min), or `uniform`: evenly apart in training
        timesteps (diffusers' "trailing"; Lin et al. 2023), or of a continuous distribution in t, its shift undone.
        """
        if steps < 1:
            raise InputError(f"steps {steps}: a sampler takes at least one")
        if schedule == "karras":
            return karras_sigmas(steps, self.sigma_min, self.sigma_max)
        falling = 1 - torch.arange(steps, dtype=torch.float64) / steps  # 1, ..., 1 / steps
        if schedule == "exponential":
            ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
            sigmas = self.sigma_max * (ramp * math.log(self.sigma_min / self.sigma_max)).exp()
        elif schedule != "uniform":
            raise InputError(f"schedule {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        elif self.noise in TABLES:
            position = falling * len(self.table) - 1
            lower = position.floor().long().clamp(0, len(self.table) - 2)
            sigmas = torch.lerp(self.table[lower].log(), self.table[lower + 1].log(), position - lower).exp()
        else:
            t = falling * _time(self.sigma_max / self.shift)
            sigmas = self.shift * t / (1 - t)
        return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])

    def _log_table(self, like: Tensor) -> Tensor:
        """ln of the table where `like` is, kept there: a copy for each call would make a GPU wait."""
        place = like.device, like.dtype
        if place not in self._logs:
            self._logs[place] = self.table.log().to(like)
        return self._logs[place]


def noise_levels(noise: str, sigma_max: float, shift: float = 1.0, zero_terminal_snr: bool = False) -> NoiseLevels:
    """The named training distribution, ending at `sigma_max`.

    `zero_terminal_snr` rescales a table of timesteps so that its last one is noise alone (Lin et al. 2023, algorithm 1):
    sigma then grows without bound, as it nearly does in the cosine table, and timesteps beyond `sigma_max` are left out.
    """
    if noise not in TABLES:
        low, high = math.log10(SIGMA_MIN), math.log10(sigma_max)
        return NoiseLevels(noise, torch.logspace(low, high, TIMESTEPS, dtype=torch.float64), shift)
    if noise == "cosine":
        t = torch.linspace(0, 1, TIMESTEPS + 1, dtype=torch.float64)
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        first, last, power = BETAS[noise]
        betas = torch.linspace(first**power, last**power, TIMESTEPS, dtype=torch.float64) ** (1 / power)
    alpha = torch.cumprod(1 - betas, 0).sqrt()
    if zero_terminal_snr:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    table = shift * (1 - alpha**2).sqrt() / alpha
    table = table[table <= sigma_max]
    if len(table) < 2:
        raise InputError(f"noise {noise}, shifted by {shift}, has no two levels below sigma_max {sigma_max}; raise it")
    return NoiseLevels(noise, table, shift)


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels for `steps` sampler steps, descending and ending in 0, float64 (steps + 1,).

    Karras et al. 2022, equation 5.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


def _time(sigma: float) -> float:
    return sigma / (1 + sigma)
