"""The autoencoder's objective: the negative evidence lower bound."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ldm.bayes.elbo import Elbo, elbo
from ldm.bayes.likelihoods import DiscretizedLogistic, to_float
from ldm.data.batches import Batches
from ldm.data.reader import ShardReader
from ldm.nets.autoencoder import AutoencoderKL
from ldm.randomness import generator

SCALE_LR = 10.0  # the likelihood's one scale has far to go and Adam moves every parameter by about lr a step


class VaeObjective:
    """-ELBO per value of an image, with the KL term weighted by `beta` (Higgins et al. 2017; 1 is the bound itself)."""

    def __init__(self, autoencoder: AutoencoderKL, likelihood: DiscretizedLogistic, batches: Batches, beta: float):
        self.module = nn.ModuleDict({"autoencoder": autoencoder, "likelihood": likelihood})
        self.autoencoder, self.likelihood, self.batches, self.beta = autoencoder, likelihood, batches, beta

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return [
            {"params": list(self.autoencoder.parameters())},
            {"params": list(self.likelihood.parameters()), "lr_multiplier": SCALE_LR},
        ]

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        x = to_float(self.batches.at(images_seen, batch_size)).to(self.likelihood.log_scale.device)
        bound = elbo(self.autoencoder, self.likelihood, x, posterior_noise(self.autoencoder, x, rng))
        loss = (self.beta * bound.kl - bound.reconstruction).mean() / bound.dims
        return loss, summary(bound)


def summary(bound: Elbo) -> dict[str, Tensor]:
    """Means over a batch: the bound and its terms in nats per image, and as code lengths in bits per dimension."""
    per_dim = 1 / (bound.dims * math.log(2))
    terms = {
        "elbo_nats": bound.nats,
        "reconstruction_nats": bound.reconstruction,
        "kl_nats": bound.kl,
        "elbo_bits_per_dim": bound.bits_per_dim,
        "reconstruction_bits_per_dim": -bound.reconstruction * per_dim,
        "kl_bits_per_dim": bound.kl * per_dim,
    }
    return {name: value.detach().mean() for name, value in terms.items()}


@torch.inference_mode()
def evaluate_elbo(
    autoencoder: AutoencoderKL, likelihood: DiscretizedLogistic, reader: ShardReader, seed: int, batch_size: int = 256
) -> Elbo:
    """The ELBO (beta = 1) of every image of a split."""
    parts = []
    for start in range(0, len(reader), batch_size):
        x = to_float(reader.images(range(start, min(start + batch_size, len(reader))))).to(likelihood.log_scale.device)
        parts.append(elbo(autoencoder, likelihood, x, posterior_noise(autoencoder, x, generator(seed, "elbo", start))))
    return Elbo(torch.cat([p.reconstruction for p in parts]), torch.cat([p.kl for p in parts]), parts[0].dims)


def posterior_noise(autoencoder: AutoencoderKL, x: Tensor, rng: torch.Generator) -> Tensor:
    """Standard normal noise of the latents' shape for images x."""
    return torch.randn(len(x), *autoencoder.latent_shape(*x.shape[2:]), generator=rng).to(x)
