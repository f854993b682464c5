"""Heun's method, with churn if asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from ldm.base.lazy import Tensor
from ldm.base.options import NonNegative
from ldm.diffusion.samplers.sampler import DenoiseFn, Noise, Sampler, draw, level


def heun(
    denoiser: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """Second order, two evaluations a step (Karras et al. 2022, algorithms 1 and 2).

    With `churn` (their S_churn), each step from a level within [churn_min, churn_max] first adds noise of standard deviation
    `churn_noise` and starts from a higher level.
    """
    gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        if gamma and churn_min <= sigma <= churn_max:
            before, sigma = sigma, sigma * (1 + gamma)
            x = x + churn_noise * math.sqrt(sigma**2 - before**2) * draw(noise, i, x)
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

    def build(self, sigma_max: float) -> Callable[..., Any]:
        return partial(heun, churn=self.churn, churn_max=sigma_max / math.sqrt(2))  # churned levels are trained ones still
