"""The first-order samplers: DDIM, and its two extremes, DDPM and Euler."""

import math
from functools import partial
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from ldm.base.lazy import Tensor
from ldm.diffusion.samplers.sampler import DenoiseFn, NoiseFn, SampleFn, Sampler, draw, level


def ddim(denoiser: DenoiseFn, x: Tensor, sigmas: Tensor, noise: NoiseFn | None = None, *, eta: float = 0.0) -> Tensor:
    """Song et al. 2021, equations 12 and 16, divided by the square root of alpha_bar."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        fresh = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)  # standard deviation of the new noise
        x0 = denoiser(x, level(x, sigma))
        x = x0 + math.sqrt(sigma_next**2 - fresh**2) / sigma * (x - x0)
        if fresh:
            x = x + fresh * draw(noise, i, x)
    return x


class Ddim(Sampler):
    kind: Literal["ddim"] = "ddim"
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0  # 0 is deterministic, 1 is ddpm

    def build(self, sigma_max: float) -> SampleFn:
        return partial(ddim, eta=self.eta)


class Ddpm(Sampler):
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, equations 6 and 7): `ddim` with eta 1."""

    kind: Literal["ddpm"] = "ddpm"

    def build(self, sigma_max: float) -> SampleFn:
        return partial(ddim, eta=1.0)


class Euler(Sampler):
    """Euler's method in sigma: `ddim` with eta 0."""

    kind: Literal["euler"] = "euler"

    def build(self, sigma_max: float) -> SampleFn:
        return ddim
