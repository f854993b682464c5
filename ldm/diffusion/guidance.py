"""Guidance wraps a denoiser and is itself a denoiser."""

from collections.abc import Callable

import torch
from torch import Tensor

DenoiseFn = Callable[..., Tensor]


def classifier_free(
    denoiser: DenoiseFn, scale: float, context: Tensor, context_mask: Tensor, null: Tensor, null_mask: Tensor
) -> DenoiseFn:
    """D_null + scale (D_text - D_null): classifier-free guidance (Ho & Salimans 2022), `scale` 1 being none.

    `context` (B, T, D) and its mask (B, T) condition on the prompts; `null` (T, D) and `null_mask` (T,) embed
    the empty caption. Both halves run as one batch.
    """
    if scale == 1:
        return lambda x, sigma: denoiser(x, sigma, context=context, context_mask=context_mask)
    both = torch.cat([context, null.expand_as(context)])
    both_mask = torch.cat([context_mask, null_mask.expand_as(context_mask)])

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        text, empty = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), context=both, context_mask=both_mask).chunk(2)
        return torch.lerp(empty, text, scale)

    return guided
