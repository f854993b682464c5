"""The U-Net's objective: denoising of cached latents under their captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.data.batches import order
from ldm.data.latents import Latents
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import NoiseLevels
from ldm.nets.text.encoder import trim
from ldm.training.weighting import LossWeight

if TYPE_CHECKING:
    from ldm.training.options import TrainUnet

FREQUENCIES, DEVICE_SHARE = 64, 0.5  # of an uncertainty's features; of a GPU's free memory that latents may take


class UnetObjective:
    """The denoiser's loss on fresh posterior samples; beside it `mse`, unweighted, and means in each quarter of noise levels."""

    def __init__(self, denoiser: Denoiser, latents: Latents, options: TrainUnet, seed: int, device: torch.device):
        self.denoiser, self.options, self.seed, self.device = denoiser, options, seed, device
        self.loss_weight: LossWeight = options.loss_weight
        self.module, self.weight = nn.ModuleDict({"unet": denoiser.net}), self.loss_weight.module()
        if self.weight is not None:
            self.module["weight"] = self.weight.to(device)
        self._quarters = tuple(part.to(device) for part in quarters(denoiser.levels))
        self._storage = storage_device(latents, device)
        # each channel's mean and standard deviation over the training latents, float32 (1, c, 1, 1)
        shift, scale = (torch.tensor(latents.manifest[name]).view(1, -1, 1, 1) for name in ("latent_mean", "latent_std"))
        moments = (latents.mean - shift) / scale, (0.5 * latents.logvar).exp() / scale
        kept = *moments, latents.caption, *trim(latents.text, latents.text_mask)
        self._mean, self._std, self._caption, self._text, self._mask = (tensor.to(self._storage) for tensor in kept)

    def parameter_groups(self) -> list[dict[str, Any]]:
        weight = [{"params": list(self.weight.parameters()), "clip_group": 1, "weight_decay": 0.0}] if self.weight else []
        return [{"params": list(self.denoiser.net.parameters())}, *weight]

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        shape = (batch_size, *self._mean.shape[1:])
        posterior_noise, noise = to_device(torch.randn((2, *shape), generator=rng)[:, part], self.device)
        sigma = to_device(self.denoiser.levels.draw(batch_size, rng)[part], self.device)
        dropped = to_device((torch.rand(batch_size, generator=rng) < self.options.caption_dropout)[part], self._storage)
        index = to_device(self.batch(images_seen, batch_size)["index"][part], self._storage)
        mean, std = (to_device(moment.index_select(0, index), self.device) for moment in (self._mean, self._std))
        caption = torch.where(dropped, len(self._text) - 1, self._caption[index])
        context, mask = (to_device(tensor[caption], self.device) for tensor in (self._text, self._mask))
        standard = self.denoiser.loss(mean + std * posterior_noise, noise, sigma, context=context, context_mask=mask)
        metrics = by_quarter(standard.detach(), sigma, *self._quarters)
        loss = self.loss_weight.weighted(standard, sigma, self.denoiser, self.weight)
        return loss.mean(), metrics if loss is standard else {"mse": standard.mean()} | metrics

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]:
        """The indices of the latents at a position, int64 (N,)."""
        return {"index": torch.from_numpy(order(self.seed, len(self._mean), images_seen, batch_size))}

    def compile(self) -> None:
        self.denoiser.net.compile()


class Uncertainty(nn.Module):
    """loss / exp(u) + u: u(sigma), linear in Fourier features of ln(sigma) / 4, comes to ln of the level's mean loss (EDM2)."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        # evenly spread quantiles of |N(0, 1)|, where EDM2 draws; the first one is 0, whose cosine is a bias
        spread = torch.special.ndtri(0.5 + torch.arange(FREQUENCIES, dtype=torch.float64) / (2 * FREQUENCIES))
        self.register_buffer("frequencies", (2 * torch.pi * spread).float(), persistent=False)
        self.weight = nn.Parameter(torch.zeros(2 * FREQUENCIES))  # u = 0

    def u(self, sigma: Tensor) -> Tensor:
        angles = sigma.log()[:, None] / 4 * self.frequencies
        return (torch.cat([angles.cos(), angles.sin()], dim=1) * self.weight).sum(1)

    def forward(self, loss: Tensor, sigma: Tensor) -> Tensor:
        return loss * torch.exp(-(u := self.u(sigma))) + u


def quarters(levels: NoiseLevels) -> tuple[Tensor, Tensor]:
    """The levels between the quarters of the distribution, float32 (3,), each in the quarter above; the shares of each (4,)."""
    boundaries, count = levels.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).float(), len(levels.table)
    evenly = levels.quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()
    members = torch.bucketize(evenly, boundaries, right=True).bincount(minlength=4)
    return boundaries, members.clamp(min=1) / count  # of a table of two or three, some quarters are empty


def by_quarter(loss: Tensor, sigma: Tensor, boundaries: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """Unbiased estimates of the mean loss in each quarter from losses (B,): means over the batch, so any parts of it add up."""
    inside = torch.bucketize(sigma, boundaries, right=True)[:, None] == torch.arange(4, device=sigma.device)  # (B, 4)
    return {f"loss_noise_q{i}": mean for i, mean in enumerate((loss[:, None] * inside).mean(0) / shares, start=1)}


def storage_device(latents: Latents, device: torch.device) -> torch.device:
    """Where latents and texts are kept: on the device if they fit into `DEVICE_SHARE` of its free memory, else on the host."""
    size = sum(tensor.nbytes for tensor in (latents.mean, latents.logvar, latents.text))
    crowded = device.type == "cuda" and size > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    return torch.device("cpu") if crowded else device


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, through pinned memory: a copy from other memory makes a GPU finish its work first."""
    pinned = x.device.type != device.type == "cuda"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)
