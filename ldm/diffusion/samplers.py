"""Samplers: plain functions `(denoiser, x, sigmas) -> x0`, with `x` at noise level `sigmas[0]`.

`denoiser(x, sigma (B,))` estimates x0; `sigmas` descends and may end in 0. All three follow the probability-flow
ODE dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, equation 3).
"""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

DenoiseFn = Callable[[Tensor, Tensor], Tensor]


def euler(denoiser: DenoiseFn, x: Tensor, sigmas: Tensor) -> Tensor:
    """First order; the same steps as deterministic DDIM (Song et al. 2021)."""
    for sigma, following in pairwise(sigmas.tolist()):
        x0 = denoiser(x, x.new_full((len(x),), sigma))
        x = x0 + (following / sigma) * (x - x0)
    return x


def heun(denoiser: DenoiseFn, x: Tensor, sigmas: Tensor) -> Tensor:
    """Second order, two evaluations a step (Karras et al. 2022, algorithm 1)."""
    for sigma, following in pairwise(sigmas.tolist()):
        slope = (x - denoiser(x, x.new_full((len(x),), sigma))) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope_ahead = (ahead - denoiser(ahead, x.new_full((len(x),), following))) / following
            ahead = x + (following - sigma) * (slope + slope_ahead) / 2
        x = ahead
    return x


def dpmpp_2m(denoiser: DenoiseFn, x: Tensor, sigmas: Tensor) -> Tensor:
    """Second order, one evaluation a step (DPM-Solver++ 2M; Lu et al. 2022, algorithm 2)."""
    previous: Tensor | None = None
    levels = sigmas.tolist()
    logs = sigmas.log().neg().tolist()  # lambda = -ln sigma
    for i, (sigma, following) in enumerate(pairwise(levels)):
        x0 = denoiser(x, x.new_full((len(x),), sigma))
        estimate = x0
        if previous is not None and following > 0:
            ratio = (logs[i] - logs[i - 1]) / (logs[i + 1] - logs[i])
            estimate = x0 + (x0 - previous) / (2 * ratio)
        x = estimate + (following / sigma) * (x - estimate)
        previous = x0
    return x


SAMPLERS: dict[str, Callable[[DenoiseFn, Tensor, Tensor], Tensor]] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
