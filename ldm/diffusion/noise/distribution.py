"""What a distribution of training noise levels has to say of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ldm.base.lazy import Tensor
from ldm.base.options import Choice

if TYPE_CHECKING:
    from ldm.diffusion.noise.levels import NoiseLevels

TIMESTEPS = 1000
Schedule = Literal["karras", "exponential", "uniform"]  # how the noise levels of a sampler's steps are spaced


class Noise(Choice):
    """A distribution over noise levels sigma, x = x0 + sigma * n; latents have unit variance.

    `shift` multiplies noise levels: images of more pixels need more noise to hide what they show, in proportion to their side
    (Hoogeboom et al. 2023; the timestep shift of Esser et al. 2024, equation 23, is the same in terms of sigma).
    """

    sigma_max: Annotated[float, Field(ge=1)] = 80.0  # noise levels stop here
    shift: Annotated[float, Field(ge=1 / 16, le=16)] = 1.0  # side of the latents over the side the schedule was made for

    def build(self) -> NoiseLevels:
        """Raises `InputError` if no two levels are left below `sigma_max`."""
        from ldm.diffusion.noise.levels import NoiseLevels

        return NoiseLevels(self, self.table())

    def table(self) -> Tensor:
        """The sigmas of the training timesteps, ascending, float64 (T,)."""
        raise NotImplementedError

    def quantile(self, u: Tensor, table: Tensor) -> Tensor:
        """The sigma below which a share u in [0, 1) of the draws lies, elementwise."""
        raise NotImplementedError

    def uniform_grid(self, t: Tensor, table: Tensor) -> Tensor:
        """The sigmas at times t, descending from 1 to above 0, uniform in this distribution's own time."""
        raise NotImplementedError
