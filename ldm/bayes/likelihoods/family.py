"""What a likelihood p(x | z) is made of: a family of distributions, and how its scale is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ldm.base.lazy import Tensor, torch
from ldm.base.options import Choice

if TYPE_CHECKING:
    from ldm.bayes.likelihoods.likelihood import Likelihood


class Family(Choice):
    """A location-scale family, every pixel by itself; the decoder gives the location.

    `scale` is one number, `learned` from `log_scale` or `fixed` to it, or `per_pixel` the second half of the decoder's channels.
    Continuous families are densities over [-1, 1]; discrete ones give probabilities of 8-bit values, so that
    -log2 p(x | z) / dims is a code length in bits/dim.
    """

    discrete: ClassVar[bool] = False  # whether `log_prob` is of probabilities, not of densities
    scale: Literal["learned", "fixed", "per_pixel"] = "learned"
    log_scale: float = -3.0

    def build(self) -> Likelihood:
        from ldm.bayes.likelihoods.likelihood import Likelihood

        return Likelihood(self)

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        """In nats, of every value of x (B, C, H, W)."""
        raise NotImplementedError

    def noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Draws at location 0 and scale 1."""
        raise NotImplementedError

    def mean(self, location: Tensor) -> Tensor:
        """The mean image; of a discretised family the mean before discretisation, which is within half a bin of it.

        (Except where the range ends within the tails: all that lies beyond counts as the last value.)
        """
        return location

    def sample(self, location: Tensor, log_scale: Tensor, rng: torch.Generator) -> Tensor:
        """x ~ p(x | z), not yet rounded to 8-bit values."""
        return location + log_scale.exp() * self.noise(location.shape, rng).to(location)
