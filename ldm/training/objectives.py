"""What the autoencoder is trained for: what `train_vae.objective` can name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ldm.base.errors import InputError
from ldm.base.lazy import Tensor, torch
from ldm.base.options import Choice, Count, NonNegative, Positive
from ldm.bayes.likelihoods.family import Family
from ldm.nets.regulariser import Kl, Regulariser

if TYPE_CHECKING:
    from ldm.bayes.likelihoods.likelihood import Likelihood
    from ldm.data.batches import Batches
    from ldm.nets.adversary import PatchDiscriminator, Perceptual
    from ldm.nets.autoencoder import Autoencoder

SCALE_LR = 10.0  # the likelihood's one scale has far to go and Adam moves every parameter by about lr a step
LARGEST_WEIGHT, SMALL = 1e4, 1e-4  # of the adaptive weight, and in its denominator


class VaeObjective:
    """Negative ELBO per value of an image; of a VQ model, negative log-likelihood and commitment (van den Oord et al. 2017).

    The KL term is weighted by beta (Higgins et al. 2017; 1 is the bound itself), which rises linearly from 0 over
    `beta_warmup_images` (Bowman et al. 2016), and each channel of an image costs `free_bits` nats at least: Kingma et al. 2016,
    but for each image, not for a batch's mean, so that a batch may be divided. The metrics are of the bound itself.

    `values` is the mean number of values of a training image: with it, images of all shapes count alike in nats, as in the bound
    of all data. Without it, they count alike per value.
    """

    def __init__(
        self, autoencoder: Autoencoder, likelihood: Likelihood, batches: Batches, regulariser: Regulariser,
        values: float | None = None,
    ):  # fmt: skip
        self.module = torch.nn.ModuleDict({"autoencoder": autoencoder, "likelihood": likelihood})
        self.autoencoder, self.likelihood, self.batches, self.regulariser = autoencoder, likelihood, batches, regulariser
        self._values = values
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
        from ldm.base.pixels import to_float
        from ldm.base.randomness import fill_rows
        from ldm.nets.autoencoder import VQModel

        pixels = self.batch(images_seen, batch_size)["images"]
        first = self.batches.rank * len(pixels)
        x = to_float(pixels[part.start - first : part.stop - first].to(next(self.module.parameters()).device))
        posterior = self.autoencoder.encode(x)
        if isinstance(self.autoencoder, VQModel):
            quantized = self.autoencoder.quantize(posterior.mean)
            output = self.autoencoder.decoder(self.autoencoder.post_quant_conv(quantized.latents))
            metrics = {"commitment": (rate := quantized.commitment.mean())}
        else:
            numbers = range(images_seen + part.start, images_seen + part.stop)
            noise = fill_rows(torch.empty_like(posterior.mean), numbers, self.batches.seed, "noise")
            output = self.autoencoder.decode(posterior.sample(noise))
            kl, options = posterior.kl(), self.regulariser  # (B, c, h, w)
            assert isinstance(options, Kl)
            metrics = {"kl_nats": kl.detach().flatten(1).sum(1).mean()}
            warm = min(1.0, images_seen / options.beta_warmup_images) if options.beta_warmup_images else 1.0
            channels = kl.sum((2, 3)).clamp(min=options.free_bits) if options.free_bits else kl.sum((2, 3))
            rate = options.beta * warm * channels.sum(1).mean() / x[0].numel()
        negative = -self.likelihood.log_prob(x, output).mean()
        metrics["distortion_nats"] = negative * x[0].numel()
        distortion, more = self._distortion(x, output, negative, images_seen)
        return (distortion + rate) * (x[0].numel() / self._values if self._values else 1.0), metrics | more

    def _distortion(self, x: Tensor, output: Tensor, negative: Tensor, seen: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised beside the rate, given the negative log-likelihood in nats per value; and further metrics."""
        return negative, {}


class AdversarialObjective(VaeObjective):
    """The latent diffusion paper's objective (Rombach et al. 2022, appendix G; Esser et al. 2021, eq. 6, 7).

    (|x − x̂| + w_p · perceptual) / b + ln b + λ · w_d · (−D(x̂)) + rate, and the discriminator's own hinge loss.
    The scale b is learned: the likelihood is Laplace, and is in the optimizer. λ = |∇ nll| / (|∇ −D(x̂)| + 1e-4), gradients
    with respect to the decoder's last layer. Autoencoder and discriminator step at once, from one pass through the decoder (the
    paper's code alternates): the discriminator's weights are constants in the decoder's loss, the image in the discriminator's.
    """

    def __init__(self, elbo: VaeObjective, options: LdmChoice, perceptual: Perceptual, discriminator: PatchDiscriminator):
        super().__init__(elbo.autoencoder, elbo.likelihood, elbo.batches, elbo.regulariser)
        self.options, self.perceptual, self.discriminator = options, perceptual, discriminator
        self.module["discriminator"] = discriminator

    def parameter_groups(self) -> list[dict[str, Any]]:
        group = {"params": list(self.discriminator.parameters()), "clip_group": 1, "betas": (0.5, 0.9)}
        return [*super().parameter_groups(), group]

    def compile(self) -> None:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # the adaptive weight goes back through the graph before the step does
        super().compile()

    def _distortion(self, x: Tensor, output: Tensor, negative: Tensor, seen: int) -> tuple[Tensor, dict[str, Tensor]]:
        options, discriminator, mean = self.options, self.discriminator, self.likelihood.mean(output)
        perceptual = self.perceptual(x, mean).mean()
        negative = negative + options.perceptual_weight * perceptual * torch.exp(-self.likelihood.log_scale)
        metrics = {"perceptual": perceptual, "l1": (x - mean).abs().mean()}
        if seen < options.discriminator_start or not options.discriminator_weight:
            # DDP waits for the gradients of every parameter: let each take part in every loss
            idle = sum(0.0 * p.sum() for p in discriminator.parameters())
            nothing = dict.fromkeys(("adversarial_weight", "real_logits", "fake_logits"), torch.zeros((), device=x.device))
            return negative + idle, metrics | nothing
        from ldm.base import distributed

        constant = {name: p.detach() for name, p in discriminator.named_parameters()}
        fooling = -torch.func.functional_call(discriminator, constant, (mean,)).float().mean()
        last = self.autoencoder.decoder.conv_out.weight
        gradients = (torch.autograd.grad(loss, last, retain_graph=True)[0].float() for loss in (negative, fooling))
        pulls = [distributed.mean(gradient).norm() for gradient in gradients]  # of this part of the batch, over all ranks
        weight = options.discriminator_weight * (pulls[0] / (pulls[1] + SMALL)).clamp(max=LARGEST_WEIGHT).detach()
        real, fake = (discriminator(images).float() for images in (x, mean.detach()))
        hinge = 0.5 * (torch.relu(1 - real) + torch.relu(1 + fake)).mean()
        metrics |= {"adversarial_weight": weight, "real_logits": real.mean(), "fake_logits": fake.mean()}
        return negative + weight * fooling + hinge, metrics


class VaeChoice(Choice):
    def check(self, root: Path, likelihood: Family) -> None:
        """Raise a `ValueError` if its files are not there, or it needs another likelihood."""

    def build(self, elbo: VaeObjective, root: Path, seed: int, image: tuple[int, int, int]) -> VaeObjective:
        """From the plain objective. `seed` initialises further networks; `image`: the smallest image's shape (C, H, W)."""
        return elbo


class ElboChoice(VaeChoice):
    kind: Literal["elbo"] = "elbo"


class LdmChoice(VaeChoice):
    """Absolute error, perceptual distance and discriminator, as in the latent diffusion paper (Rombach et al. 2022)."""

    kind: Literal["ldm"] = "ldm"
    perceptual: Annotated[str, Field(min_length=1)] = "random"  # or a file of VGG-16 weights
    perceptual_sha256: str | None = None  # of that file
    perceptual_weight: NonNegative = 1.0
    discriminator_weight: NonNegative = 0.5  # 0 leaves it out
    discriminator_start: Count = 4800  # images seen before it joins
    discriminator_channels: Positive = 32
    discriminator_layers: Positive = 2

    def check(self, root: Path, likelihood: Family) -> None:
        if (self.perceptual == "random") != (self.perceptual_sha256 is None):
            raise ValueError("train_vae.objective: perceptual_sha256 is that of the file perceptual names, null for `random`")
        if (likelihood.kind, likelihood.scale) != ("laplace", "learned"):
            raise ValueError("objective ldm is absolute error with a learned scale: set likelihood {kind: laplace}")
        if self.perceptual != "random" and not (root / self.perceptual).is_file():
            raise ValueError(f"train_vae.objective.perceptual: found {self.perceptual!r}, neither random nor a file")

    def build(self, elbo: VaeObjective, root: Path, seed: int, image: tuple[int, int, int]) -> VaeObjective:
        from ldm.nets.adversary import PatchDiscriminator, Perceptual

        torch.manual_seed(seed)
        discriminator = PatchDiscriminator(image[0], self.discriminator_channels, self.discriminator_layers)
        sha256, x = self.perceptual_sha256, torch.zeros(1, *image)
        perceptual = Perceptual.from_file(root / self.perceptual, sha256) if sha256 else Perceptual()
        for name, network in (("discriminator_layers", discriminator), ("perceptual", partial(perceptual, x))):
            try:
                with torch.no_grad():
                    network(x)
            except RuntimeError as error:
                reason = f"too deep for images of {image[2]} x {image[1]} pixels (data.image_size, data.shapes)"
                raise InputError(f"train_vae.objective.{name}: {reason}") from error
        device = next(elbo.autoencoder.parameters()).device
        placed = discriminator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return AdversarialObjective(elbo, self, perceptual.to(device), placed)
