"""Gaussian likelihoods: a density, and probabilities of 8-bit values."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from ldm.base.lazy import Tensor, torch
from ldm.bayes.likelihoods.family import Family


def _noise(shape: torch.Size, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, device=rng.device)


class Gaussian(Family):
    """A density N(location, scale²)."""

    kind: Literal["gaussian"] = "gaussian"

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return -0.5 * ((x - location) * (-log_scale).exp()).square() - (log_scale + 0.5 * math.log(2 * math.pi))

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        return _noise(shape, rng)


class DiscretizedGaussian(Family):
    """A Gaussian integrated over each of the 256 values of an 8-bit pixel, the outermost ones reaching to infinity.

    (Ho et al. 2020, "Denoising diffusion probabilistic models", equation 13.)
    """

    kind: Literal["discretized_gaussian"] = "discretized_gaussian"
    discrete: ClassVar[bool] = True

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        from ldm.base.pixels import BIN, centred_levels

        # In float64 whatever x is: a narrow bin's mass is a difference of two nearly equal numbers.
        distance = centred_levels(x.double()) * BIN - location.double()
        precision = torch.exp(-log_scale.double())
        # By symmetry, take the bin below the mean: Phi(near) - Phi(far), as Phi(near) (1 - Phi(far) / Phi(near)).
        # An outermost bin is Phi(near) alone, with its finite edge.
        outermost = x.abs() > 1 - BIN / 2
        depth = torch.where(outermost, -distance * x.sign(), -distance.abs())
        near, far = (BIN / 2 + depth) * precision, (-BIN / 2 - distance.abs()) * precision
        log_near = _log_cdf(near)
        rest = torch.log(-torch.expm1(_log_cdf(far) - log_near))
        return torch.where(outermost, log_near, log_near + rest).to(x.dtype)

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        return _noise(shape, rng)


def _log_cdf(x: Tensor) -> Tensor:
    """ln Phi(x) whose gradient holds in the far tail (torch's log_ndtr is 1 % off at -1e7 and wrong at -1e9)."""
    tail, rest = x.clamp(max=-1.0), x.clamp(min=-1.0)
    below = torch.log(torch.special.erfcx(-tail * math.sqrt(0.5)) / 2) - 0.5 * tail.square()
    return torch.where(x < -1, below, torch.log1p(-0.5 * torch.erfc(rest * math.sqrt(0.5))))
