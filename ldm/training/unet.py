"""The U-Net's objective: denoising of cached latents under their captions."""

from typing import Any

import torch
from torch import Tensor

from ldm.data.batches import order
from ldm.data.latents import Latents
from ldm.diffusion.denoiser import Denoiser
from ldm.nets.text import trim


class UnetObjective:
    """The denoiser's standard loss on fresh posterior samples, with captions dropped for classifier-free guidance.

    The latents live on the device; no loader runs.
    """

    def __init__(self, denoiser: Denoiser, latents: Latents, caption_dropout: float, seed: int, device: torch.device):
        self.module, self.denoiser = denoiser.net, denoiser
        self.caption_dropout, self.seed, self.device = caption_dropout, seed, device
        shift, scale = latent_affine(latents.manifest, device)
        self._mean = (latents.mean.to(device) - shift) / scale
        self._std = (0.5 * latents.logvar.to(device)).exp() / scale
        text, mask = trim(latents.text, latents.text_mask)
        self._caption, self._text, self._mask = latents.caption.to(device), text.to(device), mask.to(device)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters())}]

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        index = self.batch(images_seen, batch_size)["index"][part].to(self.device)
        shape = (batch_size, *self._mean.shape[1:])
        posterior_noise, noise = torch.randn((2, *shape), generator=rng)[:, part].to(self.device)
        sigma = self.denoiser.levels.draw(batch_size, rng)[part].to(self.device)
        dropped = (torch.rand(batch_size, generator=rng) < self.caption_dropout)[part].to(self.device)
        x0 = self._mean.index_select(0, index) + self._std.index_select(0, index) * posterior_noise
        caption = torch.where(dropped, len(self._text) - 1, self._caption[index])
        loss = self.denoiser.loss(x0, noise, sigma, context=self._text[caption], context_mask=self._mask[caption])
        return loss.mean(), {}

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]:
        """Which latents are fed in at a position, int64 (N,)."""
        return {"index": torch.from_numpy(order(self.seed, len(self._mean), images_seen, batch_size))}

    def compile(self) -> None:
        self.module.compile()


def latent_affine(manifest: dict[str, Any], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of the training latents, float32 (1, c, 1, 1)."""
    mean, std = (torch.tensor(manifest[name], dtype=torch.float32, device=device) for name in ("latent_mean", "latent_std"))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
