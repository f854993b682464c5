"""Decode with each posterior sample of the decoder's weights: averages, and how much they differ."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.pixels import to_float
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.langevin.chains import Draws
from ldm.nets.autoencoder import Autoencoder

BATCH = 64  # images decoded at once


class DecoderPosterior:
    """p(x | z) averaged over S draws of weights of the decoder, named as in `autoencoder.decoder`."""

    def __init__(self, autoencoder: Autoencoder, likelihood: Likelihood, draws: Draws) -> None:
        known = {name: tuple(value.shape) for name, value in autoencoder.decoder.named_parameters()}
        for name, value in draws.values.items():
            if known.get(name) != (shape := tuple(value.shape[2:])):
                raise InputError(f"posterior samples have {name} {shape}, the decoder {known.get(name, 'has not')}")
        self.autoencoder, self.likelihood, self.draws = autoencoder, likelihood, draws
        self.device = likelihood.log_scale.device
        self.weights = (draws.weights / draws.weights.sum() / draws.chains).repeat(draws.chains)  # (S,), sum 1

    def outputs(self, z: Tensor) -> Iterator[Tensor]:
        """The decoder's output (B, C, H, W) for latents z (B, c, h, w) under each draw."""
        h = self.autoencoder.post_quant_conv(z)
        for draw in self.draws:
            on_device = {name: value.to(z.device) for name, value in draw.items()}
            yield torch.func.functional_call(self.autoencoder.decoder, on_device, (h,))

    @torch.no_grad()
    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z, θ) of images x (B, C, H, W) in [-1, 1] for each draw θ, in nats, (S, B), float64."""
        return torch.stack([self.likelihood.log_prob(x, output).double().flatten(1).sum(1).cpu() for output in self.outputs(z)])

    def average(self, log_prob: Tensor) -> Tensor:
        """log p(x | z) of the Bayesian model average, the log of the mean of p(x | z, θ), from `log_prob` (S, B); nats (B,)."""
        return torch.logsumexp(log_prob + self.weights.log()[:, None], 0)

    def spread(self, log_prob: Tensor) -> Tensor:
        """Standard deviation of `log_prob` (S, B) over draws, nats (B,). It is also that of the bound: no other term has θ."""
        return self._moments(log_prob)[1]

    @torch.no_grad()
    def scores(self, pixels: Tensor) -> Tensor:
        """How unlike the training data uint8 images (N, C, H, W) are: `spread` at the mean of q(z | x), nats (N,)."""
        return torch.cat([self.spread(self.log_prob(x, z)) for x, z in self._encoded(pixels)])

    @torch.no_grad()
    def uncertainty(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over draws of the decoded images, each (B, C, H, W) in [-1, 1]."""
        return self._moments(torch.stack([self.likelihood.mean(output).clamp(-1, 1) for output in self.outputs(z)]))

    @torch.no_grad()
    def reconstructions(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`uncertainty` at the mean of q(z | x) of uint8 images (N, C, H, W), on the CPU."""
        mean, std = zip(*(self.uncertainty(z) for _, z in self._encoded(pixels)), strict=True)
        return torch.cat(mean).cpu(), torch.cat(std).cpu()

    def _encoded(self, pixels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Images in [-1, 1] and the means of q(z | x), batch after batch."""
        for x in (to_float(part).to(self.device) for part in pixels.split(BATCH)):
            yield x, self.autoencoder.encode(x).mean

    def _moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean and unbiased standard deviation over the first dimension, the draws."""
        if len(values) < 2:
            raise InputError("a standard deviation takes 2 or more posterior samples")
        w = self.weights.to(values).view(-1, *[1] * (values.ndim - 1))
        mean = (w * values).sum(0)
        variance = (w * (values - mean).square()).sum(0) / (1 - float(self.weights.square().sum()))
        return mean, variance.sqrt()
