"""DPM-Solver++ 2M."""

from itertools import pairwise
from typing import Literal

from ldm.base.lazy import Tensor
from ldm.diffusion.samplers.sampler import DenoiseFn, NoiseFn, SampleFn, Sampler, level


def dpmpp_2m(denoiser: DenoiseFn, x: Tensor, sigmas: Tensor, noise: NoiseFn | None = None) -> Tensor:
    """Second order, one evaluation a step (Lu et al. 2022, algorithm 2)."""
    previous: Tensor | None = None
    logs = sigmas.log().neg().tolist()  # lambda = -ln sigma
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = estimate = denoiser(x, level(x, sigma))
        if previous is not None and sigma_next > 0:
            ratio = (logs[i] - logs[i - 1]) / (logs[i + 1] - logs[i])
            estimate = x0 + (x0 - previous) / (2 * ratio)
        x = estimate + (sigma_next / sigma) * (x - estimate)
        previous = x0
    return x


class DpmPP2M(Sampler):
    kind: Literal["dpmpp_2m"] = "dpmpp_2m"

    def build(self, sigma_max: float) -> SampleFn:
        return dpmpp_2m
