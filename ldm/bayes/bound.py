"""One number for the whole system: an evidence lower bound of autoencoder and diffusion model together.

log p(x) >= E_q[log p(x | z)] - E_q[log q(z | x)] + E_q[log p_diffusion(z)], the last term bounded below by
-log p(z) <= KL(N(z, sigma_max²) || N(0, sigma_max² + 1))
             + (ln sigma_max - ln sigma_min) E_u[|z - D(z + sigma n; sigma)|² / sigma²]
             + (d / 2) (1 + ln 2 pi sigma_min²),    u = ln sigma uniform on [ln sigma_min, ln sigma_max]
(Kingma et al. 2021, "Variational diffusion models", in the variance-exploding form). Everything is computed in the
space of standardised latents, entropy included, so no Jacobian is missing. With prompts it bounds log p(x | prompt).
It needs a likelihood of 8-bit values, not a density, and latents with a density, which the codes of a VQ autoencoder
have not: report rate and distortion for those.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.bayes.elbo import Autoencoder, LowerBound
from ldm.bayes.likelihoods.likelihood import Likelihood


@dataclass(frozen=True)
class Bound(LowerBound):
    """A lower bound on log p(x | prompt); every term in nats per image (B,), `dims` the values in an image."""

    reconstruction: Tensor  # E_q[log p(x | z)]
    entropy: Tensor  # -E_q[log q(z | x)]
    prior: Tensor  # lower bound of E_q[log p_diffusion(z)]
    dims: int

    @property
    def nats(self) -> Tensor:
        return self.reconstruction + self.entropy + self.prior


def diffusion_bound(
    denoise: Callable[[Tensor, Tensor], Tensor], z: Tensor, sigma_min: float, sigma_max: float, u: Tensor, noise: Tensor
) -> Tensor:
    """A lower bound on log p(z) for standardised latents z (B, C, H, W), in nats, (B,).

    `u` (L, B) are positions in [0, 1) uniform over ln sigma and `noise` (L, B, C, H, W) standard normal: the
    expectation over noise levels is their mean over L. `denoise(x, sigma)` must be without guidance.
    """
    d = z[0].numel()
    span = math.log(sigma_max / sigma_min)
    error = torch.zeros(len(z), dtype=torch.float64)
    for position, n in zip(u, noise, strict=True):
        sigma = sigma_min * torch.exp(position * span)
        residual = z - denoise(z + sigma.view(-1, 1, 1, 1).to(z) * n, sigma.to(z))
        error += residual.flatten(1).square().sum(1).double().cpu() / sigma.double().cpu() ** 2
    square = z.flatten(1).square().sum(1).double().cpu()
    variance = sigma_max**2
    endpoint = 0.5 * (d * (variance / (variance + 1) - 1 - math.log(variance / (variance + 1))) + square / (variance + 1))
    return -(endpoint + span * error / len(u) + 0.5 * d * (1 + math.log(2 * math.pi * sigma_min**2)))


def whole_bound(
    autoencoder: Autoencoder,
    likelihood: Likelihood,
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    *,
    latent_mean: Tensor,
    latent_std: Tensor,
    sigma_min: float,
    sigma_max: float,
    latent_noise: Tensor,
    u: Tensor,
    noise: Tensor,
) -> Bound:
    """The bound for images x (B, C, H, W), 8-bit values in [-1, 1], with one posterior sample an image.

    `latent_mean` and `latent_std` (1, C, 1, 1) standardise the latents; `latent_noise` (B, c, h, w) draws the
    posterior sample; `u` and `noise` as in `diffusion_bound`.
    """
    if hasattr(autoencoder, "quantize"):
        raise InputError("the whole system's bound is undefined for a VQ autoencoder: report rate and distortion instead")
    if not likelihood.discrete:
        raise InputError(
            f"the whole system's bound needs probabilities of 8-bit values and a {likelihood.kind} likelihood gives densities: "
            "take discretized_gaussian or discretized_logistic (bernoulli for binary images)"
        )
    posterior = autoencoder.encode(x)
    sample = posterior.sample(latent_noise)
    reconstruction = likelihood.log_prob(x, autoencoder.decode(sample)).double().flatten(1).sum(1)
    entropy = (posterior.entropy() - latent_std.log()).double().flatten(1).sum(1)
    prior = diffusion_bound(denoise, (sample - latent_mean) / latent_std, sigma_min, sigma_max, u, noise)
    return Bound(reconstruction.cpu(), entropy.cpu(), prior, x[0].numel())
