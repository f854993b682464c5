"""The autoencoder's objective: the negative evidence lower bound, its KL term weighted if asked for."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.base.pixels import to_float
from ldm.bayes.likelihoods.likelihood import Likelihood
from ldm.data.batches import Batches
from ldm.nets.autoencoder import Autoencoder, VQModel
from ldm.nets.regulariser import Kl, Regulariser

SCALE_LR = 10.0  # the likelihood's one scale has far to go and Adam moves every parameter by about lr a step


class VaeObjective:
    """Negative ELBO per value of an image; of a VQ model, negative log-likelihood and commitment (van den Oord et al. 2017).

    The KL term is weighted by beta (Higgins et al. 2017; 1 is the bound itself), which rises linearly from 0 over
    `beta_warmup_images` (Bowman et al. 2016), and each channel of an image costs `free_bits` nats at least: Kingma et al. 2016,
    but for each image, not for a batch's mean, so that a batch may be divided. The metrics are of the bound itself.
    """

    def __init__(self, autoencoder: Autoencoder, likelihood: Likelihood, batches: Batches, regulariser: Regulariser):
        self.module = nn.ModuleDict({"autoencoder": autoencoder, "likelihood": likelihood})
        self.autoencoder, self.likelihood, self.batches, self.regulariser = autoencoder, likelihood, batches, regulariser
        self._held: tuple[int, Tensor] | None = None  # the batch that is being divided

    def parameter_groups(self) -> list[dict[str, Any]]:
        scale = [{"params": [p], "lr_multiplier": SCALE_LR} for p in self.likelihood.parameters()]
        return [{"params": list(self.autoencoder.parameters())}, *scale]

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]:
        """This rank's share of the batch at a position, uint8 (N, C, H, W)."""
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
        noise = self.autoencoder.latent_noise(x, rng, batch_size)[part]
        posterior = self.autoencoder.encode(x)
        if isinstance(self.autoencoder, VQModel):
            quantized = self.autoencoder.quantize(posterior.mean)
            output = self.autoencoder.decoder(self.autoencoder.post_quant_conv(quantized.latents))
            metrics = {"commitment": (rate := quantized.commitment.mean())}
        else:
            output = self.autoencoder.decode(posterior.sample(noise))
            kl, options = posterior.kl(), self.regulariser  # (B, c, h, w)
            assert isinstance(options, Kl)
            metrics = {"kl_nats": kl.detach().flatten(1).sum(1).mean()}
            warm = min(1.0, images_seen / options.beta_warmup_images) if options.beta_warmup_images else 1.0
            channels = kl.sum((2, 3)).clamp(min=options.free_bits) if options.free_bits else kl.sum((2, 3))
            rate = options.beta * warm * channels.sum(1).mean() / x[0].numel()
        distortion, more = self._distortion(x, output, images_seen)
        return distortion + rate, metrics | more

    def _distortion(self, x: Tensor, output: Tensor, images_seen: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative log-likelihood in nats per value."""
        negative = -self.likelihood.log_prob(x, output).mean()
        return negative, {"distortion_nats": negative * x[0].numel()}
