"""Samplers: plain functions `(denoiser, x, sigmas, noise) -> x0`, with `x` at noise level `sigmas[0]`.

`denoiser(x, sigma (B,))` estimates x0; `sigmas` descends and may end in 0; `noise(i)` is the i-th standard normal draw, like x
(fresh from torch's generator where None). The deterministic ones follow the probability-flow ODE
dx/dsigma = (x - D(x; sigma)) / sigma, the others a stochastic equation with the same marginals (Karras et al. 2022,
equations 3 and 6).
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

DenoiseFn = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]
Sampler = Callable[..., Tensor]


def ddim(denoiser: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None, *, eta: float = 0.0) -> Tensor:
    """First order (Song et al. 2021, equations 12 and 16, divided by the square root of alpha_bar).

    `eta` from 0, deterministic, to 1, where each step draws from the posterior of the noising Markov chain.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        fresh = eta * following * math.sqrt(1 - (following / sigma) ** 2)  # deviation of the noise that is new
        x0 = denoiser(x, _level(x, sigma))
        x = x0 + math.sqrt(following**2 - fresh**2) / sigma * (x - x0)
        if fresh:
            x = x + fresh * _draw(noise, i, x)
    return x


def ddpm(denoiser: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Tensor:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, equations 6 and 7): `ddim` with eta 1."""
    return ddim(denoiser, x, sigmas, noise, eta=1.0)


def euler(denoiser: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Tensor:
    """Euler's method in sigma: `ddim` with eta 0."""
    return ddim(denoiser, x, sigmas, noise)


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

    With `churn` (their S_churn), each step from a level within [churn_min, churn_max] first adds noise of deviation
    `churn_noise` and starts from a higher level.
    """
    gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for i, (level, following) in enumerate(pairwise(sigmas.tolist())):
        sigma = level
        if gamma and churn_min <= level <= churn_max:
            sigma = level * (1 + gamma)
            x = x + churn_noise * math.sqrt(sigma**2 - level**2) * _draw(noise, i, x)
        slope = (x - denoiser(x, _level(x, sigma))) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope_ahead = (ahead - denoiser(ahead, _level(x, following))) / following
            ahead = x + (following - sigma) * (slope + slope_ahead) / 2
        x = ahead
    return x


def dpmpp_2m(denoiser: DenoiseFn, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Tensor:
    """Second order, one evaluation a step (DPM-Solver++ 2M; Lu et al. 2022, algorithm 2)."""
    previous: Tensor | None = None
    levels = sigmas.tolist()
    logs = sigmas.log().neg().tolist()  # lambda = -ln sigma
    for i, (sigma, following) in enumerate(pairwise(levels)):
        x0 = denoiser(x, _level(x, sigma))
        estimate = x0
        if previous is not None and following > 0:
            ratio = (logs[i] - logs[i - 1]) / (logs[i + 1] - logs[i])
            estimate = x0 + (x0 - previous) / (2 * ratio)
        x = estimate + (following / sigma) * (x - estimate)
        previous = x0
    return x


def langevin(
    denoiser: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    *,
    corrections: int = 1,
    step: float = 0.3,
) -> Tensor:
    """Predictor and corrector (Song et al. 2021, "Score-based generative modeling", algorithm 1): an Euler step to the
    next level, and there `corrections` steps of Langevin dynamics, annealed as the level falls (Song & Ermon 2019):

    x <- x + (eps / 2) grad log p(x; sigma) + N(0, eps), eps = (step sigma)², grad log p = (D(x; sigma) - x) / sigma².

    This is the update of stochastic gradient Langevin dynamics with -log p for the energy. Where p is normal with variance
    v >= sigma², it settles at v / (1 - eps / (4 v)): at most step² / 4 of v too wide, to leading order.
    """
    for i, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoiser(x, _level(x, sigma))
        x = x0 + (following / sigma) * (x - x0)
        for j in range(corrections if following > 0 else 0):
            drift = denoiser(x, _level(x, following)) - x  # sigma² times the score
            x = x + 0.5 * step**2 * drift + step * following * _draw(noise, i * corrections + j, x)
    return x


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "langevin": langevin,
}


def _level(x: Tensor, sigma: float) -> Tensor:
    return x.new_full((len(x),), sigma)


def _draw(noise: Noise | None, i: int, x: Tensor) -> Tensor:
    return torch.randn_like(x) if noise is None else noise(i).to(x)
