"""The evidence lower bound of a variational autoencoder (Kingma & Welling 2014; Rezende et al. 2014)."""

import math
from dataclasses import dataclass

from torch import Tensor

from ldm.bayes.likelihoods import DiscretizedLogistic
from ldm.nets.autoencoder import AutoencoderKL


@dataclass(frozen=True)
class Elbo:
    """log p(x) >= reconstruction - kl, each in nats per image (B,); `dims` is the number of values in an image."""

    reconstruction: Tensor  # E_q[log p(x | z)]
    kl: Tensor  # KL(q(z | x) || N(0, I))
    dims: int

    @property
    def nats(self) -> Tensor:
        return self.reconstruction - self.kl

    @property
    def bits_per_dim(self) -> Tensor:
        """The bound as a code length: -nats / (dims ln 2)."""
        return -self.nats / (self.dims * math.log(2))


def elbo(autoencoder: AutoencoderKL, likelihood: DiscretizedLogistic, x: Tensor, noise: Tensor) -> Elbo:
    """One-sample estimate for images x (B, C, H, W) in [-1, 1]; `noise` ~ N(0, I) has the latents' shape."""
    posterior = autoencoder.encode(x)
    reconstruction = likelihood.log_prob(x, autoencoder.decode(posterior.sample(noise)))
    return Elbo(reconstruction.flatten(1).sum(1), posterior.kl().flatten(1).sum(1), x[0].numel())
