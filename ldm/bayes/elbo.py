"""Lower bounds on log p(x) of an autoencoder and its prior: the ELBO and the importance-weighted bound (`README.md`)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.nets.autoencoder import DiagonalGaussian

LOG_2PI = math.log(2 * math.pi)
LogPrior = Callable[[Tensor], Tensor]  # latents (B, c, h, w) to log p(z) in nats (B,)


class Autoencoder(Protocol):
    """What the bounds need of one; a VQ autoencoder has a `quantize` besides."""

    config: dict[str, Any]

    def encode(self, x: Tensor) -> DiagonalGaussian: ...

    def decode(self, z: Tensor) -> Tensor: ...


class LowerBound:
    """A lower bound on log p(x): `nats` (B,) of images with `dims` values each."""

    dims: int

    @property
    def nats(self) -> Tensor:
        raise NotImplementedError

    @property
    def bits_per_dim(self) -> Tensor:
        """The bound as a code length, -nats / (dims ln 2), (B,): of 8-bit values only under a discrete likelihood."""
        return -self.nats / (self.dims * math.log(2))

    @property
    def standard_error(self) -> float:
        """Of the mean of `nats` over the images; NaN for a single one."""
        return self.nats.double().std().item() / math.sqrt(len(self.nats)) if len(self.nats) > 1 else math.nan


@dataclass(frozen=True)
class Elbo(LowerBound):
    """log p(x) >= reconstruction - kl, each in nats per image (B,); `dims` is the number of values in an image."""

    reconstruction: Tensor  # E_q[log p(x | z)]
    kl: Tensor  # KL(q(z | x) || p(z))
    dims: int
    kl_per_dim: Tensor | None = None  # (B, c, h, w), sums to kl; None for a prior without closed form

    @property
    def nats(self) -> Tensor:
        return self.reconstruction - self.kl


def elbo(autoencoder: Autoencoder, likelihood: Likelihood, x: Tensor, noise: Tensor, log_prior: LogPrior | None = None) -> Elbo:
    """One-sample estimate for images x (B, C, H, W) in [-1, 1]; `noise` ~ N(0, I) has the latents' shape.

    (Kingma & Welling 2014, equation 7; Rezende et al. 2014.) The prior is N(0, I), the KL term exact; with `log_prior` it
    is the sample's log q(z | x) - log p(z). A VQ autoencoder (one with a `quantize`) has discrete latents, a uniform prior
    over its K codes and an encoder that is sure of one: ln K nats a position (van den Oord et al. 2017), kl_per_dim
    (B, 1, h, w), and no sampling: `noise` goes unused.
    """
    posterior = autoencoder.encode(x)
    vq = hasattr(autoencoder, "quantize")
    if vq and log_prior is not None:
        raise InputError("a VQ autoencoder's prior is uniform over its codes: call elbo without log_prior")
    z = posterior.mean if vq else posterior.sample(noise)  # VQ's decode begins with the quantisation
    reconstruction = _total(likelihood.log_prob(x, autoencoder.decode(z)))
    if log_prior is not None:
        return Elbo(reconstruction, _log_q(posterior, noise) - log_prior(z), x[0].numel())
    kl_per_dim = torch.full_like(z[:, :1], math.log(autoencoder.config["num_vq_embeddings"])) if vq else posterior.kl()
    return Elbo(reconstruction, _total(kl_per_dim), x[0].numel(), kl_per_dim)


@torch.no_grad()
def importance_bound(
    autoencoder: Autoencoder, likelihood: Likelihood, x: Tensor, noises: Iterable[Tensor], log_prior: LogPrior | None = None
) -> Tensor:
    """log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x) of images x (B, C, H, W), in nats (B,), float64.

    (Burda et al. 2016, equation 8.) Its mean rises from the ELBO at K = 1 to log p(x). K is how many `noises` there are,
    each ~ N(0, I) of the latents' shape; one is held at a time, so that K can be anything. Not for training: no gradients.
    """
    if hasattr(autoencoder, "quantize"):
        raise InputError(
            "importance_bound has nothing to weigh for a VQ autoencoder, whose posterior is a single code: report its elbo"
        )
    posterior = autoencoder.encode(x)
    total, count = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device), 0
    for count, noise in enumerate(noises, start=1):  # noqa: B007 (count is K in the end)
        z = posterior.sample(noise)
        reconstruction = _total(likelihood.log_prob(x, autoencoder.decode(z)).double())
        prior = _total(standard_normal(z.double())) if log_prior is None else log_prior(z).double()
        total = torch.logaddexp(total, reconstruction + prior - _log_q(posterior, noise).double())
    if count == 0:
        raise InputError("importance_bound got no noises: give K >= 1 draws from N(0, I) of the latents' shape")
    return total - math.log(count)


def standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1), every dimension by itself."""
    return -0.5 * (LOG_2PI + z.square())


def _log_q(posterior: DiagonalGaussian, noise: Tensor) -> Tensor:
    """log q(z | x) (B,) of the sample that `noise` makes: from z itself, a narrow posterior would lose its digits."""
    return _total(standard_normal(noise) - 0.5 * posterior.logvar)


def _total(values: Tensor) -> Tensor:
    """Sum over everything but the batch."""
    return values.flatten(1).sum(1)
