"""The autoencoder alone on a split of the data: its ELBO, its importance-weighted bound, a likelihood's scale fitted to it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.base.pixels import to_float
from ldm.base.randomness import generator
from ldm.bayes.elbo import Elbo, elbo, importance_bound
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.data.reader import ShardReader
from ldm.nets.autoencoder import Autoencoder

SCALE_IMAGES, PIXELS = 512, 1 << 18  # to which a scale is fitted; of the images that are measured at once


def summary(bound: Elbo) -> dict[str, float]:
    """Means over images: the bound, with its standard error, and its terms, in nats per image and as bits per dimension."""
    per_dim = 1 / (bound.dims * math.log(2))
    terms = {"elbo_nats": bound.nats, "reconstruction_nats": bound.reconstruction, "kl_nats": bound.kl}
    terms |= {"elbo_bits_per_dim": bound.bits_per_dim, "distortion_bits_per_dim": -bound.reconstruction * per_dim}
    terms["rate_bits_per_dim"] = bound.kl * per_dim
    means = {name: float(value.double().mean()) for name, value in terms.items()}
    return means | {"elbo_nats_se": bound.standard_error, "elbo_bits_per_dim_se": bound.standard_error * per_dim}


@torch.inference_mode()
def evaluate_elbo(autoencoder: Autoencoder, likelihood: Likelihood, reader: ShardReader, seed: int) -> Elbo:
    """The ELBO (beta = 1) of every image of a split."""
    parts = [
        elbo(autoencoder, likelihood, x, autoencoder.latent_noise(x, generator(seed, "elbo", start)))
        for start, x in _images(autoencoder, reader)
    ]
    return Elbo(torch.cat([p.reconstruction for p in parts]), torch.cat([p.kl for p in parts]), parts[0].dims)


@torch.inference_mode()
def evaluate_importance(autoencoder: Autoencoder, likelihood: Likelihood, reader: ShardReader, seed: int, samples: int) -> Tensor:
    """The importance-weighted bound of every image of a split with `samples` posterior samples each, nats (N,), float64."""
    parts = []
    for start, x in _images(autoencoder, reader):
        noises = (autoencoder.latent_noise(x, generator(seed, "importance", start, k)) for k in range(samples))
        parts.append(importance_bound(autoencoder, likelihood, x, noises).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def fit_scale(autoencoder: Autoencoder, reader: ShardReader, seed: int) -> Likelihood:
    """Fit the one scale of a discretised logistic to a split: gives bits/dim to an autoencoder trained without such a scale."""
    from scipy.optimize import minimize_scalar  # takes long to import

    device = next(autoencoder.parameters()).device
    likelihood, pairs = DiscretizedLogistic().build().to(device), []
    for start, x in _images(autoencoder, reader, SCALE_IMAGES):
        noise = autoencoder.latent_noise(x, generator(seed, "scale", start))
        pairs.append((x.cpu(), autoencoder.decode(autoencoder.encode(x).sample(noise)).cpu()))

    def negative(log_scale: float) -> float:
        likelihood.log_scale.fill_(log_scale)
        total = sum(float(likelihood.log_prob(x.to(device), output.to(device)).double().sum()) for x, output in pairs)
        return -total / sum(x.numel() for x, _ in pairs)

    likelihood.log_scale.fill_(float(minimize_scalar(negative, bounds=(-9, 2), method="bounded").x))
    return likelihood


def _images(autoencoder: Autoencoder, reader: ShardReader, most: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """The first `most` images of a split (default: all) on the autoencoder's device, in parts, and where each starts."""
    device, count = next(autoencoder.parameters()).device, min(len(reader), most or len(reader))
    size = min(256, max(1, PIXELS // reader.preprocessing.image_size**2))
    for start in range(0, count, size):
        yield start, to_float(reader.images(range(start, min(start + size, count)))).to(device)
