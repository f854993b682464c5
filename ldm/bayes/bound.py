"""One number for the whole system: an evidence lower bound of autoencoder and diffusion model together (`README.md`)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.bayes.elbo import LowerBound
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.nets.autoencoder import Autoencoder

Denoise = Callable[[Tensor, Tensor], Tensor]  # from x at noise level sigma (B,) to the denoised latents, without guidance


@dataclass(frozen=True)
class Bound(LowerBound):
    """log p(x | prompt) >= reconstruction + entropy + prior, nats per image (B,)."""

    reconstruction: Tensor  # E_q[log p(x | z)]
    entropy: Tensor  # -E_q[log q(z | x)]
    prior: Tensor  # lower bound of E_q[log p_diffusion(z)]
    dims: int | Tensor  # values in an image

    @property
    def nats(self) -> Tensor:
        return self.reconstruction + self.entropy + self.prior


def diffusion_bound(denoise: Denoise, z: Tensor, sigma_min: float, sigma_max: float, u: Tensor, noise: Tensor) -> Tensor:
    """A lower bound on log p(z) for standardised latents z (B, C, H, W), d values each, in nats, (B,).

    -log p(z) <= KL(N(z, sigma_max²) || N(0, sigma_max² + 1)) + span E_u[|z - D(z + sigma n; sigma)|² / sigma²]
                 + (d / 2) (1 + ln 2 pi sigma_min²),    sigma = sigma_min exp(u span), span = ln sigma_max - ln sigma_min
    (Kingma et al. 2021, "Variational diffusion models", in the variance-exploding form). The expectation is a mean over L draws
    `u` (L, B), uniform in [0, 1), and n, `noise` (L, B, C, H, W), standard normal.
    """
    d, span, variance = z[0].numel(), math.log(sigma_max / sigma_min), sigma_max**2
    error = torch.zeros(len(z), dtype=torch.float64)
    for position, n in zip(u, noise, strict=True):
        sigma = sigma_min * torch.exp(position * span)
        residual = z - denoise(z + sigma.view(-1, 1, 1, 1).to(z) * n, sigma.to(z))
        error += residual.flatten(1).square().sum(1).double().cpu() / sigma.double().cpu() ** 2
    square = z.flatten(1).square().sum(1).double().cpu()
    endpoint = 0.5 * (d * (variance / (variance + 1) - 1 - math.log(variance / (variance + 1))) + square / (variance + 1))
    return -(endpoint + span * error / len(u) + 0.5 * d * (1 + math.log(2 * math.pi * sigma_min**2)))


def whole_bound(
    autoencoder: Autoencoder, likelihood: Likelihood, denoise: Denoise, x: Tensor, *, latent_mean: Tensor, latent_std: Tensor,
    sigma_min: float, sigma_max: float, latent_noise: Tensor, u: Tensor, noise: Tensor,
) -> Bound:  # fmt: skip
    """log p(x) >= E_q[log p(x | z)] - E_q[log q(z | x)] + E_q[log p_diffusion(z)], from one sample of q(z | x) an image.

    Images x (B, C, H, W) are 8-bit values in [-1, 1]. `latent_noise` (B, c, h, w) makes the samples, `latent_mean` and
    `latent_std` (1, c, 1, 1) standardise them, and all terms use them so. `u` and `noise` are those of `diffusion_bound`.
    `InputError` for a VQ autoencoder, whose latents have no density, and if p(x | z) is a density.
    """
    if hasattr(autoencoder, "quantize"):
        raise InputError("the whole system's bound is undefined for a VQ autoencoder: report rate and distortion instead")
    if not likelihood.discrete:
        take = "take discretized_gaussian, discretized_logistic or bernoulli"
        raise InputError(f"the bound needs probabilities of 8-bit values, a {likelihood.kind} likelihood gives densities: {take}")
    posterior = autoencoder.encode(x)
    sample = posterior.sample(latent_noise)
    reconstruction = likelihood.log_prob(x, autoencoder.decode(sample)).double().flatten(1).sum(1)
    entropy = (posterior.entropy() - latent_std.log()).double().flatten(1).sum(1)
    prior = diffusion_bound(denoise, (sample - latent_mean) / latent_std, sigma_min, sigma_max, u, noise)
    return Bound(reconstruction.cpu(), entropy.cpu(), prior, x[0].numel())
