"""The discretised logistic likelihood."""

from __future__ import annotations

from typing import ClassVar, Literal

from ldm.base.lazy import Tensor, torch
from ldm.bayes.likelihoods.family import Family


class DiscretizedLogistic(Family):
    """A logistic distribution integrated over each of the 256 values of an 8-bit pixel.

    Salimans et al. 2017 (PixelCNN++), equation 2 with a single component: the outermost bins reach to infinity,
    so that the 256 probabilities sum to 1.
    """

    kind: Literal["discretized_logistic"] = "discretized_logistic"
    discrete: ClassVar[bool] = True

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        from ldm.base.pixels import BIN, centred_levels

        width = BIN * torch.exp(-log_scale)  # of a bin, in scales
        # Counted in bins, neighbours share the very same edge, so that the 256 probabilities sum to 1 in float32 too.
        distance = torch.sub(centred_levels(x), location, alpha=1 / BIN)
        upper, lower = (distance + 0.5) * width, (distance - 0.5) * width
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), exact in every tail
        below, above = torch.nn.functional.logsigmoid(upper), torch.nn.functional.logsigmoid(-lower)
        inner = below + above + torch.log(-torch.expm1(-width))
        return torch.where(x < -1 + BIN / 2, below, torch.where(x > 1 - BIN / 2, above, inner))

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=rng, device=rng.device, dtype=torch.float64).logit(eps=1e-16)
