"""The latent diffusion paper's objective for autoencoders (Rombach et al. 2022, appendix G; Esser et al. 2021, eq. 6, 7)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.base import distributed
from ldm.bayes.likelihoods import Likelihood
from ldm.data.batches import Batches
from ldm.nets.adversary import PatchDiscriminator, Perceptual
from ldm.nets.autoencoder import Autoencoder
from ldm.training.vae import Rate, VaeObjective

LARGEST_WEIGHT, SMALL = 1e4, 1e-4  # of the adaptive weight, and in its denominator


@dataclass(frozen=True)
class Adversary:
    """What joins the absolute error: a perceptual distance, and a discriminator from an image count on."""

    perceptual: Perceptual
    perceptual_weight: float
    discriminator: PatchDiscriminator
    discriminator_weight: float
    discriminator_start: int  # images seen


class AdversarialObjective(VaeObjective):
    """(|x − x̂| + w_p · perceptual) / b + ln b + λ · w_d · (−D(x̂)) + rate, and the discriminator's own hinge loss.

    The scale b is learned: the likelihood is Laplace, and is in the optimizer. λ = |∇ nll| / (|∇ −D(x̂)| + 1e-4), gradients
    with respect to the decoder's last layer. Both players take their step at once, from one pass through the decoder, where
    the paper's code lets them take turns; the discriminator's weights are constants in the decoder's loss, and the image a
    constant in the discriminator's.
    """

    def __init__(self, autoencoder: Autoencoder, likelihood: Likelihood, batches: Batches, rate: Rate, adversary: Adversary):
        super().__init__(autoencoder, likelihood, batches, rate)
        self.adversary = adversary
        self.module["discriminator"] = adversary.discriminator

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        its = list(self.adversary.discriminator.parameters())
        return [*super().parameter_groups(lr), {"params": its, "player": 1, "betas": (0.5, 0.9)}]

    def compile(self) -> None:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # the adaptive weight goes back through the graph before the step does
        super().compile()

    def _distortion(self, x: Tensor, output: Tensor, images_seen: int) -> tuple[Tensor, dict[str, Tensor]]:
        ours = self.adversary
        likelihood = -self.likelihood.log_prob(x, output).mean()
        mean = self.likelihood.mean(output)
        perceptual = ours.perceptual(x, mean).mean()
        negative = likelihood + ours.perceptual_weight * perceptual * torch.exp(-self.likelihood.log_scale)
        metrics = {"distortion_nats": likelihood * x[0].numel(), "perceptual": perceptual, "l1": (x - mean).abs().mean()}
        if images_seen < ours.discriminator_start or not ours.discriminator_weight:
            # every parameter takes part in every loss: processes wait for each other's gradients
            idle = sum(0.0 * p.sum() for p in ours.discriminator.parameters())
            nothing = torch.zeros((), device=x.device)
            return negative + idle, metrics | dict.fromkeys(("adversarial_weight", "real_logits", "fake_logits"), nothing)
        constant = {name: p.detach() for name, p in ours.discriminator.named_parameters()}
        fooling = -torch.func.functional_call(ours.discriminator, constant, (mean,)).float().mean()
        weight = ours.discriminator_weight * adaptive_weight(negative, fooling, last_layer(self.autoencoder))
        real, fake = (ours.discriminator(images).float() for images in (x, mean.detach()))
        judging = 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean()
        metrics |= {"adversarial_weight": weight, "real_logits": real.mean(), "fake_logits": fake.mean()}
        return negative + weight * fooling + judging, metrics


def last_layer(autoencoder: Autoencoder) -> Tensor:
    return autoencoder.decoder.conv_out.weight


def adaptive_weight(negative: Tensor, fooling: Tensor, layer: Tensor) -> Tensor:
    """λ of Esser et al. 2021, equation 7, a constant for autograd: of one part of the batch, over all processes."""
    norms = [
        distributed.mean(torch.autograd.grad(loss, layer, retain_graph=True)[0].float()).norm() for loss in (negative, fooling)
    ]
    return (norms[0] / (norms[1] + SMALL)).clamp(max=LARGEST_WEIGHT).detach()
