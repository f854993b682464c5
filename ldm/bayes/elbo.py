"""Lower bounds on log p(x) of an autoencoder and its prior: the ELBO and the importance-weighted bound (`README.md`)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.nets.autoencoder import Autoencoder, DiagonalGaussian

LogPrior = Callable[[Tensor], Tensor]  # from latents (B, c, h, w) to log p(z) in nats (B,)


class LowerBound:
    """A lower bound on log p(x): `nats` per image (B,), of images with `dims` values, a number for all or a tensor (B,)."""

    dims: int | Tensor

    @property
    def nats(self) -> Tensor:
        raise NotImplementedError

    @property
    def bits_per_dim(self) -> Tensor:
        """-nats / (dims ln 2), (B,): the length of a code for 8-bit values if the likelihood is discrete."""
        return -self.nats / (self.dims * math.log(2))

    @property
    def standard_error(self) -> float:
        """Of the mean of `nats` over the images; NaN for a single one."""
        return self.nats.double().std().item() / math.sqrt(len(self.nats)) if len(self.nats) > 1 else math.nan


@dataclass(frozen=True)
class Elbo(LowerBound):
    """log p(x) >= reconstruction - kl, nats per image (B,)."""

    reconstruction: Tensor  # E_q[log p(x | z)]
    kl: Tensor  # KL(q(z | x) || p(z))
    dims: int | Tensor

    @property
    def nats(self) -> Tensor:
        return self.reconstruction - self.kl


def elbo(autoencoder: Autoencoder, likelihood: Likelihood, x: Tensor, noise: Tensor, log_prior: LogPrior | None = None) -> Elbo:
    """One-sample estimate for images x (B, C, H, W) in [-1, 1] (Kingma & Welling 2014, equation 7).

    `noise` ~ N(0, I) has the latents' shape. The prior is N(0, I) and the KL term exact; with `log_prior` it is estimated from
    the sample. For a VQ autoencoder, the KL term is ln K nats a position (van den Oord et al. 2017) and `noise` is unused.
    """
    posterior, vq = autoencoder.encode(x), hasattr(autoencoder, "quantize")
    if vq and log_prior is not None:
        raise InputError("a VQ autoencoder's prior is uniform over its codes: call elbo without log_prior")
    z = posterior.mean if vq else posterior.sample(noise)  # the decoder of a VQ autoencoder quantises first
    reconstruction = likelihood.log_prob(x, autoencoder.decode(z)).flatten(1).sum(1)
    if log_prior is not None:
        kl = _log_q(posterior, noise) - log_prior(z)
    else:
        each = torch.full_like(z[:, :1], math.log(autoencoder.config["num_vq_embeddings"])) if vq else posterior.kl()
        kl = each.flatten(1).sum(1)
    return Elbo(reconstruction, kl, x[0].numel())


@torch.no_grad()
def importance_bound(
    autoencoder: Autoencoder, likelihood: Likelihood, x: Tensor, noises: Iterable[Tensor], log_prior: LogPrior | None = None
) -> Tensor:
    """log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x), nats (B,), float64, by K `noises` ~ N(0, I) (Burda et al. 2016, eq. 8)."""
    if hasattr(autoencoder, "quantize"):
        raise InputError("importance_bound has nothing to weigh: a VQ autoencoder's posterior is a single code; report its elbo")
    posterior = autoencoder.encode(x)
    total, count = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device), 0
    for count, noise in enumerate(noises, start=1):  # noqa: B007 (count is K in the end)
        z = posterior.sample(noise)
        reconstruction = likelihood.log_prob(x, autoencoder.decode(z)).double().flatten(1).sum(1)
        prior = standard_normal(z.double()).flatten(1).sum(1) if log_prior is None else log_prior(z).double()
        total = torch.logaddexp(total, reconstruction + prior - _log_q(posterior, noise).double())
    if count == 0:
        raise InputError("importance_bound got no noises: give K >= 1 draws from N(0, I) of the latents' shape")
    return total - math.log(count)


def standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1) of every dimension."""
    return -0.5 * (math.log(2 * math.pi) + z.square())


def _log_q(posterior: DiagonalGaussian, noise: Tensor) -> Tensor:
    """log q(z | x) (B,) of the sample that `noise` makes: computed from z, it would lose precision if q is narrow."""
    return (standard_normal(noise) - 0.5 * posterior.logvar).flatten(1).sum(1)
