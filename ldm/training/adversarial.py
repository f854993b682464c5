"""The latent diffusion paper's objective for autoencoders (Rombach et al. 2022, appendix G; Esser et al. 2021, eq. 6, 7)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.base import distributed
from ldm.nets.adversary import PatchDiscriminator, Perceptual
from ldm.training.objectives import LdmChoice, Parts
from ldm.training.vae import VaeObjective

LARGEST_WEIGHT, SMALL = 1e4, 1e-4  # of the adaptive weight, and in its denominator


class AdversarialObjective(VaeObjective):
    """(|x − x̂| + w_p · perceptual) / b + ln b + λ · w_d · (−D(x̂)) + rate, and the discriminator's own hinge loss.

    The scale b is learned: the likelihood is Laplace, and is in the optimizer. λ = |∇ nll| / (|∇ −D(x̂)| + 1e-4), gradients
    with respect to the decoder's last layer. Autoencoder and discriminator step at once, from one pass through the decoder (the
    paper's code alternates): the discriminator's weights are constants in the decoder's loss, the image in the discriminator's.
    """

    def __init__(self, parts: Parts, options: LdmChoice, perceptual: Perceptual, discriminator: PatchDiscriminator):
        super().__init__(*parts)
        self.options, self.perceptual, self.discriminator = options, perceptual, discriminator
        self.module["discriminator"] = discriminator

    def parameter_groups(self) -> list[dict[str, Any]]:
        group = {"params": list(self.discriminator.parameters()), "clip_group": 1, "betas": (0.5, 0.9)}
        return [*super().parameter_groups(), group]

    def compile(self) -> None:
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # the adaptive weight goes back through the graph before the step does
        super().compile()

    def _distortion(self, x: Tensor, output: Tensor, images_seen: int) -> tuple[Tensor, dict[str, Tensor]]:
        options, discriminator = self.options, self.discriminator
        likelihood = -self.likelihood.log_prob(x, output).mean()
        mean = self.likelihood.mean(output)
        perceptual = self.perceptual(x, mean).mean()
        negative = likelihood + options.perceptual_weight * perceptual * torch.exp(-self.likelihood.log_scale)
        metrics = {"distortion_nats": likelihood * x[0].numel(), "perceptual": perceptual, "l1": (x - mean).abs().mean()}
        if images_seen < options.discriminator_start or not options.discriminator_weight:
            # DDP waits for the gradients of every parameter: let each take part in every loss
            idle = sum(0.0 * p.sum() for p in discriminator.parameters())
            nothing = dict.fromkeys(("adversarial_weight", "real_logits", "fake_logits"), torch.zeros((), device=x.device))
            return negative + idle, metrics | nothing
        constant = {name: p.detach() for name, p in discriminator.named_parameters()}
        fooling = -torch.func.functional_call(discriminator, constant, (mean,)).float().mean()
        weight = options.discriminator_weight * adaptive_weight(negative, fooling, self.autoencoder.decoder.conv_out.weight)
        real, fake = (discriminator(images).float() for images in (x, mean.detach()))
        hinge = 0.5 * (F.relu(1 - real) + F.relu(1 + fake)).mean()
        metrics |= {"adversarial_weight": weight, "real_logits": real.mean(), "fake_logits": fake.mean()}
        return negative + weight * fooling + hinge, metrics


def adaptive_weight(negative: Tensor, fooling: Tensor, layer: Tensor) -> Tensor:
    """λ of Esser et al. 2021, equation 7, detached: of one part of the batch, over all ranks."""
    gradients = (torch.autograd.grad(loss, layer, retain_graph=True)[0].float() for loss in (negative, fooling))
    pulls = [distributed.mean(gradient).norm() for gradient in gradients]
    return (pulls[0] / (pulls[1] + SMALL)).clamp(max=LARGEST_WEIGHT).detach()
