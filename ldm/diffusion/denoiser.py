"""One denoiser for every parameterisation: D(x; sigma) = c_skip x + c_out F(c_in x, c_noise)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.diffusion.noise import NoiseLevels


class Scalings(NamedTuple):
    """The coefficients c_skip, c_out, c_in and c_noise, each like `sigma` (Karras et al. 2022, equation 7 and table 1)."""

    skip: Tensor
    out: Tensor
    inp: Tensor
    noise: Tensor


class Denoiser(nn.Module):
    """E[x0 | x] for x = x0 + sigma n, by the network `net(c_in x, c_noise, **cond)`.

    `kind` says what the network predicts: `eps` (Ho et al. 2020), `x0`, `v` (Salimans & Ho 2022), `edm` (Karras et al. 2022;
    `sigma_data` is the data's standard deviation) or `flow` (Lipman et al. 2023: n - x0 at time sigma / (1 + sigma)).
    """

    def __init__(self, net: nn.Module, kind: str, levels: NoiseLevels, sigma_data: float = 1.0):
        super().__init__()
        self.net, self.kind, self.levels, self.sigma_data = net, kind, levels, sigma_data

    def scalings(self, sigma: Tensor) -> Scalings:
        """The coefficients at noise levels `sigma` (B,)."""
        if self.kind == "edm":
            total = (sigma**2 + self.sigma_data**2).sqrt()
            return Scalings((self.sigma_data / total) ** 2, sigma * self.sigma_data / total, 1 / total, 250 * sigma.log())
        if self.kind == "flow":
            scale = 1 / (1 + sigma)
            return Scalings(scale, -sigma * scale, scale, 1000 * sigma * scale)
        inp, one = 1 / (1 + sigma**2).sqrt(), torch.ones_like(sigma)
        skip, out = {"eps": (one, -sigma), "x0": (0 * one, one), "v": (inp**2, -sigma * inp)}[self.kind]
        return Scalings(skip, out, inp, self.levels.timesteps(sigma))

    def forward(self, x: Tensor, sigma: Tensor, **cond: Tensor | None) -> Tensor:
        """The estimate of x0, like x (B, C, H, W), at noise levels sigma (B,)."""
        c = self.scalings(sigma)
        return _wide(c.skip, x) * x + _wide(c.out, x) * self.net(_wide(c.inp, x) * x, c.noise, **cond)

    def loss(self, x0: Tensor, noise: Tensor, sigma: Tensor, **cond: Tensor | None) -> Tensor:
        """The standard loss of `kind`: each image's mean squared error of the network's own target, (B,)."""
        c = self.scalings(sigma)
        x = x0 + _wide(sigma, x0) * noise
        target = (x0 - _wide(c.skip, x) * x) / _wide(c.out, x)
        return (self.net(_wide(c.inp, x) * x, c.noise, **cond) - target).square().flatten(1).mean(1)


def _wide(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
