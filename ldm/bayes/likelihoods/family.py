"""What all likelihoods p(x | z) have in common: a location, a scale, and how the scale is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ldm.base.lazy import Tensor, torch
from ldm.base.options import Choice

if TYPE_CHECKING:
    from ldm.bayes.likelihoods.likelihood import Likelihood


class Family(Choice):
    """A location-scale family: independent values, whose locations the decoder computes."""

    discrete: ClassVar[bool] = False  # probabilities of 8-bit values, not densities over [-1, 1]
    scale: Literal["learned", "fixed", "per_pixel"] = "learned"  # one number, or the second half of the decoder's channels
    log_scale: float = -3.0

    def build(self) -> Likelihood:
        from ldm.bayes.likelihoods.likelihood import Likelihood

        return Likelihood(self)

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        """Log-probability or log-density in nats of every value of x (B, C, H, W); like x."""
        raise NotImplementedError

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Draws at location 0 and scale 1; standard normal ones unless a family has others."""
        return torch.randn(shape, generator=rng, device=rng.device)

    def mean(self, location: Tensor) -> Tensor:
        """E[x | z]; of discretised families before discretisation, so up to half a bin off, and more near the range's ends."""
        return location

    def sample(self, location: Tensor, log_scale: Tensor, rng: torch.Generator) -> Tensor:
        """x ~ p(x | z), not yet rounded to 8-bit values."""
        return location + log_scale.exp() * self.noise(location.shape, rng).to(location)
