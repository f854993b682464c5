"""Guidance wraps a denoiser and is itself a denoiser: D_bad + scale (D_good - D_bad)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.samplers.sampler import DenoiseFn


@dataclass(frozen=True)
class Guidance:
    scale: float = 1.0  # 1 is no guidance
    interval: tuple[float, float] | None = None  # only at noise levels in (low, high] (Kynkäänniemi et al. 2024)
    rescale: float = 0.0  # 0 to 1: how far images get back the deviation of unguided ones (Lin et al. 2023, eq. 15, 16, of x0)

    def at(self, sigma: Tensor) -> bool:
        """Whether there is guidance at `sigma` (B,), which is the same level for all images."""
        return self.scale != 1 and (self.interval is None or self.interval[0] < float(sigma[0]) <= self.interval[1])

    def combine(self, good: Tensor, bad: Tensor) -> Tensor:
        """The guided estimate (B, C, H, W)."""
        guided = torch.lerp(bad, good, self.scale)
        if not self.rescale:
            return guided
        wanted, found = (x.flatten(1).std(1).view(-1, 1, 1, 1) for x in (good, guided))
        return guided * torch.lerp(torch.ones_like(found), wanted / found, self.rescale)


def classifier_free(
    denoiser: Callable[..., Tensor], guidance: Guidance, context: Tensor, context_mask: Tensor, null: Tensor, null_mask: Tensor
) -> DenoiseFn:
    """Guide away from the prompt `null` (Ho & Salimans 2022). Contexts (B, T, D) and masks (B, T); those of `null` may lack B."""
    both = torch.cat([context, null.expand_as(context)])
    both_mask = torch.cat([context_mask, null_mask.expand_as(context_mask)])

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        if not guidance.at(sigma):
            return denoiser(x, sigma, context=context, context_mask=context_mask)
        halves = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), context=both, context_mask=both_mask).chunk(2)
        return guidance.combine(*halves)

    return guided


def autoguidance(denoiser: DenoiseFn, weaker: DenoiseFn, guidance: Guidance) -> DenoiseFn:
    """Guide away from a model that is smaller or trained less (Karras et al. 2024). Both already have their prompts."""

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        good = denoiser(x, sigma)
        return guidance.combine(good, weaker(x, sigma)) if guidance.at(sigma) else good

    return guided
