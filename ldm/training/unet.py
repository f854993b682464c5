"""The U-Net's objective: denoising of cached latents under their captions."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ldm.data.batches import order
from ldm.data.latents import Latents
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import NoiseLevels
from ldm.nets.text import trim

FREQUENCIES = 64  # of the features by which an uncertainty depends on the noise level
DEVICE_SHARE = 0.5  # of a GPU's free memory that latents may take


class Options(Protocol):
    """The part of the settings that the objective reads; see `ldm.config.TrainUnet`."""

    caption_dropout: float
    loss_weight: Literal["standard", "min_snr", "learned"]
    min_snr_gamma: float


class UnetObjective:
    """The denoiser's loss on fresh posterior samples, with captions dropped for classifier-free guidance.

    `loss_weight` is `standard`, the kind's own; `min_snr`; or `learned`, see `Uncertainty`. What is reported beside the
    loss is never weighted: `mse`, where that is not the loss, and the mean in each quarter of the noise levels drawn, from
    the least noise, `loss_noise_q1`, to the most, `loss_noise_q4`. No loader runs.
    """

    def __init__(self, denoiser: Denoiser, latents: Latents, options: Options, seed: int, device: torch.device):
        self.denoiser, self.options, self.seed, self.device = denoiser, options, seed, device
        self.module = nn.ModuleDict({"unet": denoiser.net})
        if options.loss_weight == "learned":
            self.module["uncertainty"] = Uncertainty().to(device)
        self._quarters = tuple(part.to(device) for part in quarters(denoiser.levels))
        self._home = home_of(latents, device)
        shift, scale = latent_affine(latents.manifest)
        moments = (latents.mean - shift) / scale, (0.5 * latents.logvar).exp() / scale
        self._mean, self._std = (moment.to(self._home) for moment in moments)
        conditions = latents.caption, *trim(latents.text, latents.text_mask)
        self._caption, self._text, self._mask = (tensor.to(self._home) for tensor in conditions)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": list(self.module["unet"].parameters())}]
        if "uncertainty" in self.module:
            groups.append({"params": list(self.module["uncertainty"].parameters()), "player": 1, "weight_decay": 0.0})
        return groups

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        shape = (batch_size, *self._mean.shape[1:])
        posterior_noise, noise = moved(torch.randn((2, *shape), generator=rng)[:, part], self.device)
        sigma = moved(self.denoiser.levels.draw(batch_size, rng)[part], self.device)
        dropped = moved((torch.rand(batch_size, generator=rng) < self.options.caption_dropout)[part], self._home)
        index = moved(self.batch(images_seen, batch_size)["index"][part], self._home)
        mean, std = (moved(moment.index_select(0, index), self.device) for moment in (self._mean, self._std))
        caption = torch.where(dropped, len(self._text) - 1, self._caption[index])
        context, mask = (moved(tensor[caption], self.device) for tensor in (self._text, self._mask))
        x0 = mean + std * posterior_noise
        standard = self.denoiser.loss(x0, noise, sigma, context=context, context_mask=mask)
        loss = self.weighted(standard, sigma).mean()
        metrics = {} if self.options.loss_weight == "standard" else {"mse": standard.mean()}
        return loss, metrics | by_quarter(standard.detach(), sigma, *self._quarters)

    def weighted(self, standard: Tensor, sigma: Tensor) -> Tensor:
        """What is minimised of the standard losses (B,) at noise levels sigma (B,)."""
        if self.options.loss_weight == "learned":
            return self.module["uncertainty"](standard, sigma)
        if self.options.loss_weight == "min_snr":
            return min_snr_weight(self.denoiser, sigma, self.options.min_snr_gamma) * standard
        return standard

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]:
        """Which latents are fed in at a position, int64 (N,)."""
        return {"index": torch.from_numpy(order(self.seed, len(self._mean), images_seen, batch_size))}

    def compile(self) -> None:
        self.denoiser.net.compile()


class Uncertainty(nn.Module):
    """A weight for each noise level, learned: loss / exp(u) + u, where u(sigma) comes to ln of the level's mean loss.

    Karras et al. 2024 (EDM2), after Kendall & Gal 2018. u is linear in Fourier features of ln(sigma) / 4.
    """

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        # evenly spread quantiles of |N(0, 1)|, where EDM2 draws; the first one is 0, whose cosine is a bias
        spread = torch.special.ndtri(0.5 + torch.arange(FREQUENCIES, dtype=torch.float64) / (2 * FREQUENCIES))
        self.register_buffer("frequencies", (2 * torch.pi * spread).float(), persistent=False)
        self.weight = nn.Parameter(torch.zeros(2 * FREQUENCIES))  # u = 0

    def u(self, sigma: Tensor) -> Tensor:
        """Like sigma (B,); float32 under autocast, too."""
        angles = sigma.log()[:, None] / 4 * self.frequencies
        return (torch.cat([angles.cos(), angles.sin()], dim=1) * self.weight).sum(1)

    def forward(self, loss: Tensor, sigma: Tensor) -> Tensor:
        u = self.u(sigma)
        return loss * torch.exp(-u) + u


def min_snr_weight(denoiser: Denoiser, sigma: Tensor, gamma: float) -> Tensor:
    """Weight of the standard loss, like sigma: min(1 / sigma², gamma) of the error of x0, for every kind.

    Hang et al. 2023, section 3.4; with the signal-to-noise ratio 1 / sigma², and x0 off by c_out times the output's error.
    """
    return denoiser.scalings(sigma).out.square() * (1 / sigma**2).clamp(max=gamma)


def quarters(levels: NoiseLevels) -> tuple[Tensor, Tensor]:
    """The noise levels that part those of training into quarters, float32 (3,), and each quarter's share of them (4,).

    A level belongs to the quarter above it. Of a table whose length is no multiple of four, shares are about a quarter.
    """
    boundaries = levels.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).float()
    count = len(levels.table)
    evenly = levels.quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()
    members = torch.bucketize(evenly, boundaries, right=True).bincount(minlength=4)
    return boundaries, members.clamp(min=1) / count  # of a table of two or three, some quarters are empty


def by_quarter(loss: Tensor, sigma: Tensor, boundaries: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """Unbiased estimates of the mean loss in each quarter from losses (B,): means over the batch, so any parts of it add up."""
    inside = torch.bucketize(sigma, boundaries, right=True)[:, None] == torch.arange(4, device=sigma.device)  # (B, 4)
    means = (loss[:, None] * inside).mean(0) / shares
    return {f"loss_noise_q{i}": mean for i, mean in enumerate(means, start=1)}


def home_of(latents: Latents, device: torch.device) -> torch.device:
    """Where latents and texts are kept: on the device, or in the host's memory where a GPU has better use for its own."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (latents.mean, latents.logvar, latents.text))
    if device.type == "cuda" and size > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device


def moved(x: Tensor, device: torch.device) -> Tensor:
    """x on a device. Out of memory that is not pinned, a copy to a GPU would wait for all that it has yet to do."""
    pinned = x.device.type != device.type == "cuda"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)


def latent_affine(manifest: dict[str, Any], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation of the training latents, float32 (1, c, 1, 1)."""
    mean, std = (torch.tensor(manifest[name], dtype=torch.float32, device=device) for name in ("latent_mean", "latent_std"))
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
