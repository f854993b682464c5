"""Heun's method, with churn if asked for."""

import math
from functools import partial
from itertools import pairwise
from typing import Literal

from ldm.base.lazy import Tensor
from ldm.base.options import NonNegative
from ldm.diffusion.samplers.sampler import DenoiseFn, NoiseFn, SampleFn, Sampler, draw, level


def heun(
    denoiser: DenoiseFn, x: Tensor, sigmas: Tensor, noise: NoiseFn | None = None, *, churn: float = 0.0,
    churn_max: float = math.inf,
) -> Tensor:  # fmt: skip
    """Second order (Karras et al. 2022, algorithms 1, 2); `churn`, their S_churn, adds noise at levels up to `churn_max`."""
    gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        if gamma and sigma <= churn_max:
            before, sigma = sigma, sigma * (1 + gamma)
            x = x + math.sqrt(sigma**2 - before**2) * draw(noise, i, x)
        slope = (x - denoiser(x, level(x, sigma))) / sigma
        ahead = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (ahead - denoiser(ahead, level(x, sigma_next))) / sigma_next
            ahead = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = ahead
    return x


class Heun(Sampler):
    kind: Literal["heun"] = "heun"
    churn: NonNegative = 0.0  # noise added on the way

    def build(self, sigma_max: float) -> SampleFn:
        return partial(heun, churn=self.churn, churn_max=sigma_max / math.sqrt(2))  # no level above those of training
