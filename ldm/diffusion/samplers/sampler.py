"""What all samplers share: plain functions `(denoiser, x, sigmas, noise) -> x0`, with `x` at noise level `sigmas[0]`.

`denoiser(x, sigma (B,))` estimates x0; `sigmas` descends and may end in 0; `noise(i)` is the i-th standard normal draw, like x.
They follow the ODE dx/dsigma = (x - D(x; sigma)) / sigma or an SDE of the same marginals (Karras et al. 2022, eq. 3 and 6).
"""

from collections.abc import Callable

from ldm.base.lazy import Tensor, torch
from ldm.base.options import Choice

DenoiseFn = Callable[[Tensor, Tensor], Tensor]
NoiseFn = Callable[[int], Tensor]
SampleFn = Callable[..., Tensor]


class Sampler(Choice):
    """The options of one sampler."""

    def build(self, sigma_max: float) -> SampleFn:
        """The function, with these options; `sigma_max` is the highest noise level of training."""
        raise NotImplementedError


def level(x: Tensor, sigma: float) -> Tensor:
    """The noise level of every image of x, (B,)."""
    return x.new_full((len(x),), sigma)


def draw(noise: NoiseFn | None, i: int, x: Tensor) -> Tensor:
    return torch.randn_like(x) if noise is None else noise(i).to(x)
