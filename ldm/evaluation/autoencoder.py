"""The autoencoder alone on a split of the data: its ELBO, its importance-weighted bound, a likelihood's scale fitted to it."""

import math

import numpy as np
import torch
from torch import Tensor

from ldm.base.pixels import to_float
from ldm.base.randomness import fill_rows
from ldm.bayes.elbo import Elbo, elbo, importance_bound
from ldm.bayes.likelihoods.discrete import DiscretizedLogistic
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.data.reader import ShardReader
from ldm.evaluation.parts import in_parts, of_each
from ldm.nets.autoencoder import Autoencoder

SCALE_IMAGES = 512  # to which a scale is fitted


def summary(bound: Elbo) -> dict[str, float]:
    """Means over images: the bound, with its standard error, and its terms, in nats per image and as bits per dimension."""
    per_dim = 1 / (torch.as_tensor(bound.dims, dtype=torch.float64).cpu() * math.log(2))  # of each image
    nats, reconstruction, kl = (term.double().cpu() for term in (bound.nats, bound.reconstruction, bound.kl))
    terms = {"elbo_nats": nats, "reconstruction_nats": reconstruction, "kl_nats": kl, "elbo_bits_per_dim": -nats * per_dim}
    terms |= {"distortion_bits_per_dim": -reconstruction * per_dim, "rate_bits_per_dim": kl * per_dim}
    errors = {f"{name}_se": float(terms[name].std()) / math.sqrt(len(nats)) for name in ("elbo_nats", "elbo_bits_per_dim")}
    return {name: float(values.mean()) for name, values in terms.items()} | errors


@torch.inference_mode()
def evaluate_elbo(autoencoder: Autoencoder, likelihood: Likelihood, reader: ShardReader, seed: int) -> Elbo:
    """The ELBO (beta = 1) of every image of a split."""

    def bound(positions: np.ndarray, images: Tensor) -> tuple[Tensor, ...]:
        x = to_float(images).to(likelihood.log_scale.device)
        found = elbo(autoencoder, likelihood, x, _noise(autoencoder, x, positions, seed, "elbo"))
        return found.reconstruction, found.kl, torch.full((len(x),), x[0].numel())

    return Elbo(*of_each(reader, likelihood.log_scale.device, bound))


@torch.inference_mode()
def evaluate_importance(autoencoder: Autoencoder, likelihood: Likelihood, reader: ShardReader, seed: int, samples: int) -> Tensor:
    """The importance-weighted bound of every image of a split with `samples` posterior samples each, nats (N,), float64."""

    def bound(positions: np.ndarray, images: Tensor) -> tuple[Tensor, ...]:
        x = to_float(images).to(likelihood.log_scale.device)
        noises = (_noise(autoencoder, x, positions, seed, "importance", k) for k in range(samples))
        return (importance_bound(autoencoder, likelihood, x, noises),)

    return of_each(reader, likelihood.log_scale.device, bound)[0]


@torch.inference_mode()
def fit_scale(autoencoder: Autoencoder, reader: ShardReader, seed: int) -> Likelihood:
    """Fit the one scale of a discretised logistic to a split: gives bits/dim to an autoencoder trained without such a scale."""
    from scipy.optimize import minimize_scalar  # takes long to import

    device = next(autoencoder.parameters()).device
    likelihood, some = DiscretizedLogistic().build().to(device), reader.subset(np.arange(min(len(reader), SCALE_IMAGES)))

    def reconstructed(positions: np.ndarray, images: Tensor) -> tuple[Tensor, Tensor]:
        x = to_float(images).to(device)
        noise = _noise(autoencoder, x, positions, seed, "scale")
        return x.cpu(), autoencoder.decode(autoencoder.encode(x).sample(noise)).cpu()

    pairs = [pair for _, pair in in_parts(some, device, reconstructed)]

    def negative(log_scale: float) -> float:
        likelihood.log_scale.fill_(log_scale)
        total = sum(float(likelihood.log_prob(x.to(device), output.to(device)).double().sum()) for x, output in pairs)
        return -total / sum(x.numel() for x, _ in pairs)

    likelihood.log_scale.fill_(float(minimize_scalar(negative, bounds=(-9, 2), method="bounded").x))
    return likelihood


def _noise(autoencoder: Autoencoder, x: Tensor, positions: np.ndarray, *purpose: str | int) -> Tensor:
    """Standard normal latents for images x (N, C, H, W) at these positions, whatever other images are computed with them."""
    drawn = torch.empty(len(x), *autoencoder.latent_shape(*x.shape[2:]))  # on the CPU, so that every device measures the same
    return fill_rows(drawn, positions.tolist(), *purpose).to(x)
