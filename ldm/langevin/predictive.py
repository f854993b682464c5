"""What an autoencoder says when its decoder's weights are known only as draws from their posterior."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.pixels import to_float
from ldm.bayes.likelihoods import Likelihood
from ldm.langevin.chains import Draws
from ldm.nets.autoencoder import Autoencoder

BATCH = 64  # images decoded at once


class DecoderPosterior:
    """p(x | z) averaged over draws of some of the decoder's weights, named as in `autoencoder.decoder`."""

    def __init__(self, autoencoder: Autoencoder, likelihood: Likelihood, draws: Draws) -> None:
        known = {name: tuple(value.shape) for name, value in autoencoder.decoder.named_parameters()}
        for name, value in draws.values.items():
            if known.get(name) != tuple(value.shape[2:]):
                raise InputError(
                    f"posterior samples have {name} {tuple(value.shape[2:])}, the decoder {known.get(name, 'has not')}"
                )
        self.autoencoder, self.likelihood, self.draws = autoencoder, likelihood, draws
        self.weights = (draws.weights / draws.weights.sum() / draws.chains).repeat(draws.chains)  # (S,), sum 1

    def outputs(self, z: Tensor) -> Iterator[Tensor]:
        """The decoder's output for latents z (B, c, h, w) under each draw, S times (B, C, H, W)."""
        h = self.autoencoder.post_quant_conv(z)
        for draw in self.draws:
            on_device = {name: value.to(z.device) for name, value in draw.items()}
            yield torch.func.functional_call(self.autoencoder.decoder, on_device, (h,))

    @torch.no_grad()
    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z, θ) of images x (B, C, H, W) for each draw θ, in nats, (S, B), float64."""
        return torch.stack([self.likelihood.log_prob(x, output).double().flatten(1).sum(1).cpu() for output in self.outputs(z)])

    def average(self, log_prob: Tensor) -> Tensor:
        """log of the draws' mean of p(x | z, θ), given `log_prob` (S, B): the Bayesian model average's, (B,)."""
        return torch.logsumexp(log_prob + self.weights.log()[:, None], 0)

    def spread(self, log_prob: Tensor) -> Tensor:
        """Standard deviation over draws of `log_prob` (S, B), so of the bound, whose other terms have no θ: nats (B,)."""
        return _moments(log_prob, self.weights)[1]

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """How unlike the training data images x (B, C, H, W) are: `spread` with the latents at their posterior mean, (B,)."""
        return self.spread(self.log_prob(x, self.autoencoder.encode(x).mean))

    def scores(self, pixels: Tensor) -> Tensor:
        """`score` of any number of uint8 images (N, C, H, W), (N,)."""
        device = self.likelihood.log_scale.device
        return torch.cat([self.score(to_float(part).to(device)) for part in pixels.split(BATCH)])

    @torch.no_grad()
    def uncertainty(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over draws of the image that the decoder means, in [-1, 1]: (B, C, H, W) each."""
        return _moments(torch.stack([self.likelihood.mean(output).clamp(-1, 1) for output in self.outputs(z)]), self.weights)


def _moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and unbiased standard deviation over the first dimension."""
    if len(values) < 2:
        raise InputError("a spread takes 2 or more posterior samples")
    w = weights.to(values).view(-1, *[1] * (values.ndim - 1))
    mean = (w * values).sum(0)
    variance = (w * (values - mean).square()).sum(0) / (1 - float(weights.square().sum()))
    return mean, variance.sqrt()
