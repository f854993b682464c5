"""Probabilities of 8-bit values, the outermost of which stand for all beyond them."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from ldm.base.errors import InputError
from ldm.base.lazy import Tensor, torch
from ldm.base.pixels import BIN, centred_levels, to_uint8
from ldm.bayes.likelihoods.family import Family


class DiscretizedLogistic(Family):
    """A logistic distribution integrated over the bin of each 8-bit value (Salimans et al. 2017, equation 2, one component)."""

    kind: Literal["discretized_logistic"] = "discretized_logistic"
    discrete: ClassVar[bool] = True

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        width = BIN * torch.exp(-log_scale)  # of a bin, in units of the scale
        # Counted in bins, neighbours share exactly the same edge: the 256 probabilities sum to 1 in float32 too.
        distance = torch.sub(centred_levels(x), location, alpha=1 / BIN)
        upper, lower = (distance + 0.5) * width, (distance - 0.5) * width
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), exact in every tail
        below, above = torch.nn.functional.logsigmoid(upper), torch.nn.functional.logsigmoid(-lower)
        inner = below + above + torch.log(-torch.expm1(-width))
        return torch.where(x < -1 + BIN / 2, below, torch.where(x > 1 - BIN / 2, above, inner))

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=rng, device=rng.device, dtype=torch.float64).logit(eps=1e-16)


class DiscretizedGaussian(Family):
    """A Gaussian integrated over the bin of each 8-bit value (Ho et al. 2020, equation 13)."""

    kind: Literal["discretized_gaussian"] = "discretized_gaussian"
    discrete: ClassVar[bool] = True

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        # In float64 whatever x is: a narrow bin's mass is a difference of two nearly equal numbers.
        distance, precision = centred_levels(x.double()) * BIN - location.double(), torch.exp(-log_scale.double())
        # By symmetry, take the bin below the mean: Phi(near) - Phi(far), as Phi(near) (1 - Phi(far) / Phi(near)).
        # An outermost bin is Phi(near) alone, with its finite edge.
        outermost = x.abs() > 1 - BIN / 2
        depth = torch.where(outermost, -distance * x.sign(), -distance.abs())
        near, far = (BIN / 2 + depth) * precision, (-BIN / 2 - distance.abs()) * precision
        log_near = _log_cdf(near)
        rest = torch.log(-torch.expm1(_log_cdf(far) - log_near))
        return torch.where(outermost, log_near, log_near + rest).to(x.dtype)


def _log_cdf(x: Tensor) -> Tensor:
    """ln Phi(x), with a gradient that is right in the far tail (that of torch's log_ndtr is 1 % off at -1e7, wrong at -1e9)."""
    tail, rest = x.clamp(max=-1.0), x.clamp(min=-1.0)
    below = torch.log(torch.special.erfcx(-tail * math.sqrt(0.5)) / 2) - 0.5 * tail.square()
    return torch.where(x < -1, below, torch.log1p(-0.5 * torch.erfc(rest * math.sqrt(0.5))))


class Bernoulli(Family):
    """Values 0 and 255 only: the decoder's output is the logit of 255. There is no scale."""

    kind: Literal["bernoulli"] = "bernoulli"
    discrete: ClassVar[bool] = True
    scale: ClassVar = "fixed"  # type: ignore[misc]  # not an option
    log_scale: ClassVar = 0.0  # type: ignore[misc]

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        if len(grey := x[x.abs() != 1]):
            found = f"train_vae.likelihood bernoulli needs images of 0 and 255 only, found {int(to_uint8(grey[0]))}"
            raise InputError(f"{found}; threshold them, or choose a discretized likelihood")
        return torch.nn.functional.logsigmoid(x * location)

    def mean(self, location: Tensor) -> Tensor:
        return (location / 2).tanh()

    def sample(self, location: Tensor, log_scale: Tensor, rng: torch.Generator) -> Tensor:
        uniform = torch.rand(location.shape, generator=rng, device=rng.device).to(location)
        return torch.where(uniform < torch.sigmoid(location), 1.0, -1.0).to(location)
