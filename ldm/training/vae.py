"""The autoencoder's objective: the negative evidence lower bound, its KL term weighted where asked."""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.base.randomness import generator
from ldm.bayes.elbo import Elbo, elbo, importance_bound
from ldm.bayes.likelihoods import Likelihood, make_likelihood, to_float
from ldm.data.batches import Batches
from ldm.data.reader import ShardReader
from ldm.nets.autoencoder import Autoencoder, VQModel

SCALE_LR = 10.0  # the likelihood's one scale has far to go and Adam moves every parameter by about lr a step
SCALE_IMAGES = 512  # validation images to which a scale is fitted
PIXELS = 1 << 18  # of the images that are measured at once


class Rate(Protocol):
    """The part of the settings that weighs the rate; see `ldm.config.TrainVae`."""

    beta: float
    beta_warmup_images: int
    free_bits: float


class VaeObjective:
    """Negative ELBO per value of an image; of a VQ model, negative log-likelihood and commitment (van den Oord et al. 2017).

    The KL term is weighted by beta (Higgins et al. 2017; 1 is the bound itself), which rises linearly from 0 over
    `beta_warmup_images` (Bowman et al. 2016), and each channel of an image costs `free_bits` nats at least: Kingma et al. 2016,
    but for each image, not for a batch's mean, so that a batch may be parted.
    What is reported is the bound itself.
    """

    def __init__(self, autoencoder: Autoencoder, likelihood: Likelihood, batches: Batches, rate: Rate):
        self.module = nn.ModuleDict({"autoencoder": autoencoder, "likelihood": likelihood})
        self.autoencoder, self.likelihood, self.batches, self.rate = autoencoder, likelihood, batches, rate
        self._held: tuple[int, Tensor] | None = None  # the batch that is being parted

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        scale = [{"params": [p], "lr_multiplier": SCALE_LR} for p in self.likelihood.parameters()]
        return [{"params": list(self.autoencoder.parameters())}, *scale]

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]:
        """This process's share of the batch at a position, uint8 (N, C, H, W)."""
        if self._held is None or self._held[0] != images_seen:
            self._held = images_seen, self.batches.at(images_seen, batch_size)
        return {"images": self._held[1]}

    def compile(self) -> None:
        self.autoencoder.encoder.compile()
        self.autoencoder.decoder.compile()

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = self.batch(images_seen, batch_size)["images"]
        first = self.batches.rank * len(pixels)
        x = to_float(pixels[part.start - first : part.stop - first].to(next(self.module.parameters()).device))
        noise = posterior_noise(self.autoencoder, x, rng, batch_size)[part]
        posterior = self.autoencoder.encode(x)
        if isinstance(self.autoencoder, VQModel):
            quantized = self.autoencoder.quantize(posterior.mean)
            output = self.autoencoder.decoder(self.autoencoder.post_quant_conv(quantized.latents))
            rate = quantized.commitment.mean()
            metrics = {"commitment": rate}
        else:
            output = self.autoencoder.decode(posterior.sample(noise))
            kl = posterior.kl()
            rate = self._weighted(kl, images_seen) / x[0].numel()
            metrics = {"kl_nats": kl.detach().flatten(1).sum(1).mean()}
        distortion, more = self._distortion(x, output, images_seen)
        return distortion + rate, metrics | more

    def _weighted(self, kl: Tensor, images_seen: int) -> Tensor:
        """What the objective counts of KL terms (B, c, h, w), nats per image."""
        warm = min(1.0, images_seen / self.rate.beta_warmup_images) if self.rate.beta_warmup_images else 1.0
        channels = kl.sum((2, 3))
        if self.rate.free_bits:
            channels = channels.clamp(min=self.rate.free_bits)
        return self.rate.beta * warm * channels.sum(1).mean()

    def _distortion(self, x: Tensor, output: Tensor, images_seen: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative log-likelihood in nats per value."""
        negative = -self.likelihood.log_prob(x, output).mean()
        return negative, {"distortion_nats": negative * x[0].numel()}


def summary(bound: Elbo) -> dict[str, float]:
    """Means over images: the bound, with its standard error, and its terms, in nats per image and as bits per dimension."""
    per_dim = 1 / (bound.dims * math.log(2))
    terms = {
        "elbo_nats": bound.nats,
        "reconstruction_nats": bound.reconstruction,
        "kl_nats": bound.kl,
        "elbo_bits_per_dim": bound.bits_per_dim,
        "distortion_bits_per_dim": -bound.reconstruction * per_dim,
        "rate_bits_per_dim": bound.kl * per_dim,
    }
    means = {name: float(value.double().mean()) for name, value in terms.items()}
    return means | {"elbo_nats_se": bound.standard_error, "elbo_bits_per_dim_se": bound.standard_error * per_dim}


@torch.inference_mode()
def evaluate_elbo(autoencoder: Autoencoder, likelihood: Likelihood, reader: ShardReader, seed: int) -> Elbo:
    """The ELBO (beta = 1) of every image of a split."""
    parts = []
    for start, x in _images(autoencoder, reader):
        parts.append(elbo(autoencoder, likelihood, x, posterior_noise(autoencoder, x, generator(seed, "elbo", start))))
    return Elbo(torch.cat([p.reconstruction for p in parts]), torch.cat([p.kl for p in parts]), parts[0].dims)


@torch.inference_mode()
def evaluate_importance(autoencoder: Autoencoder, likelihood: Likelihood, reader: ShardReader, seed: int, samples: int) -> Tensor:
    """The importance-weighted bound of every image of a split with `samples` posterior samples each, nats (N,), float64."""
    parts = []
    for start, x in _images(autoencoder, reader):
        noises = (posterior_noise(autoencoder, x, generator(seed, "importance", start, k)) for k in range(samples))
        parts.append(importance_bound(autoencoder, likelihood, x, noises).double().cpu())
    return torch.cat(parts)


@torch.inference_mode()
def fit_scale(autoencoder: Autoencoder, reader: ShardReader, seed: int) -> Likelihood:
    """The discretised logistic whose one scale gives images of a split the highest likelihood.

    It makes bits per dimension comparable for an autoencoder that was trained without a likelihood of 8-bit pixels.
    """
    from scipy.optimize import minimize_scalar  # imported where it is needed: it takes long

    device = next(autoencoder.parameters()).device
    pairs = []
    for start, x in _images(autoencoder, reader, SCALE_IMAGES):
        noise = posterior_noise(autoencoder, x, generator(seed, "scale", start))
        pairs.append((x.cpu(), autoencoder.decode(autoencoder.encode(x).sample(noise)).cpu()))
    likelihood = make_likelihood("discretized_logistic").to(device)

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


def posterior_noise(autoencoder: Autoencoder, x: Tensor, rng: torch.Generator, count: int | None = None) -> Tensor:
    """Standard normal noise of the latents' shape for `count` images (default: all) of the size of x (B, C, H, W)."""
    return torch.randn(count or len(x), *autoencoder.latent_shape(*x.shape[2:]), generator=rng).to(x)
