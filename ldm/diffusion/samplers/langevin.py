"""Annealed Langevin dynamics as a corrector."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from ldm.base.lazy import Tensor
from ldm.base.options import Count, Rate
from ldm.diffusion.samplers.sampler import DenoiseFn, Noise, Sampler, draw, level


def langevin(
    denoiser: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    *,
    corrections: int = 1,
    step: float = 0.3,
) -> Tensor:
    """Predictor and corrector (Song et al. 2021, "Score-based generative modeling", algorithm 1).

    An Euler step to the next level, and there `corrections` steps of Langevin dynamics, annealed as the level falls (Song &
    Ermon 2019): x <- x + (eps / 2) grad log p(x; sigma) + N(0, eps), eps = (step sigma)²,
    grad log p = (D(x; sigma) - x) / sigma².

    This is the update of stochastic gradient Langevin dynamics with -log p for the energy. If p is normal with variance
    v >= sigma², it settles at v / (1 - eps / (4 v)): at most step² / 4 of v too wide, to leading order.
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
    step: Rate = 0.3  # of these steps, in units of the level

    def build(self, sigma_max: float) -> Callable[..., Any]:
        return partial(langevin, corrections=self.corrections, step=self.step)
