"""Annealed Langevin dynamics as a corrector."""

from functools import partial
from itertools import pairwise
from typing import Literal

from ldm.base.lazy import Tensor
from ldm.base.options import Count, Rate
from ldm.diffusion.samplers.sampler import DenoiseFn, NoiseFn, SampleFn, Sampler, draw, level


def langevin(
    denoiser: DenoiseFn, x: Tensor, sigmas: Tensor, noise: NoiseFn | None = None, *, corrections: int = 1, step: float = 0.3
) -> Tensor:
    """Predictor and corrector (Song et al. 2021, "Score-based generative modeling", algorithm 1).

    Each Euler step to the next level is followed by `corrections` steps of Langevin dynamics there (Song & Ermon 2019):
    x <- x + (eps / 2) grad log p(x; sigma) + N(0, eps), eps = (step sigma)², grad log p = (D(x; sigma) - x) / sigma².
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoiser(x, level(x, sigma))
        x = x0 + (sigma_next / sigma) * (x - x0)
        for j in range(corrections if sigma_next > 0 else 0):
            drift = denoiser(x, level(x, sigma_next)) - x  # sigma² times the score
            x = x + 0.5 * step**2 * drift + step * sigma_next * draw(noise, i * corrections + j, x)
    return x


class Langevin(Sampler):
    kind: Literal["langevin"] = "langevin"
    corrections: Count = 1  # steps of Langevin dynamics at each level
    step: Rate = 0.3  # their size, in units of the level

    def build(self, sigma_max: float) -> SampleFn:
        return partial(langevin, corrections=self.corrections, step=self.step)
