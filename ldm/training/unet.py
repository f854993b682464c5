"""The U-Net's objective: denoising of cached latents under their captions."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldm.base import distributed
from ldm.base.randomness import fill_rows
from ldm.data.batches import Order, draws, fractions
from ldm.data.latents import EMPTY, Latents
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise import NoiseLevels
from ldm.nets.text.encoder import TextEncoder
from ldm.training.weighting import LossWeight

if TYPE_CHECKING:
    from ldm.training.options import TrainUnet

FREQUENCIES = 64  # of an uncertainty's features
DEVICE_SHARE = 0.5  # of a GPU's free memory that latents may take
LOADED = 4096  # latents copied to the device at a time


class UnetObjective:
    """The denoiser's loss on fresh posterior samples; beside it `mse`, unweighted, and means in each quarter of noise levels.

    `encoder` embeds the captions of a batch where the cache has them as text.
    """

    def __init__(
        self, denoiser: Denoiser, latents: Latents, options: TrainUnet, seed: int, device: torch.device,
        encoder: TextEncoder | None = None,
    ):  # fmt: skip
        self.denoiser, self.latents, self.options, self.seed, self.device = denoiser, latents, options, seed, device
        self.loss_weight: LossWeight = options.loss_weight
        self.module, self.weight = nn.ModuleDict({"unet": denoiser.net}), self.loss_weight.module()
        if self.weight is not None:
            self.module["weight"] = self.weight.to(device)
        self._quarters = tuple(part.to(device) for part in quarters(denoiser.levels))
        self._order = Order(seed, list(latents.groups.values()))
        self.source: Source = Resident(latents, device) if is_small(latents, device) else Mapped(latents, device, encoder)
        self._held: tuple[int, Share] | None = None  # this rank's part of a batch, which may be divided further
        self._ahead: dict[int, Any] = {}  # by position: what is being read for the next batch

    def parameter_groups(self) -> list[dict[str, Any]]:
        weight = [{"params": list(self.weight.parameters()), "clip_group": 1, "weight_decay": 0.0}] if self.weight else []
        return [{"params": list(self.denoiser.net.parameters())}, *weight]

    def loss(self, images_seen: int, batch_size: int, rng: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        share, first = self._share(images_seen, batch_size)
        mean, std, context, mask = (tensor[part.start - first : part.stop - first] for tensor in share)
        first_image, noises = images_seen + part.start, torch.empty((len(mean), 2, *mean.shape[1:]), device=self.device)
        posterior_noise, noise = fill_rows(noises, range(first_image, first_image + len(mean)), self.seed, "noise").unbind(1)
        sigma = to_device(self.denoiser.levels.draw(batch_size, rng)[part], self.device)
        standard = self.denoiser.loss(mean + std * posterior_noise, noise, sigma, context=context, context_mask=mask)
        metrics = by_quarter(standard.detach(), sigma, *self._quarters)
        loss = self.loss_weight.weighted(standard, sigma, self.denoiser, self.weight)
        return loss.mean(), metrics if loss is standard else {"mse": standard.mean()} | metrics

    def _share(self, images_seen: int, batch_size: int) -> tuple[Share, int]:
        """This rank's part of the batch at a position, and the number of its first image in the batch."""
        count = batch_size // distributed.ranks()
        first, following = distributed.rank() * count, images_seen + batch_size
        if self._held is None or self._held[0] != images_seen:
            begun = self._ahead.pop(images_seen, None) or self.source.begin(*self._chosen(images_seen, batch_size, first, count))
            self._held = images_seen, self.source.end(begun)
            self._ahead = {following: self.source.begin(*self._chosen(following, batch_size, first, count))}
        return self._held[1], first

    def _chosen(self, images_seen: int, batch_size: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Latents, and a caption of each, of `count` images of the batch at a position, from its image `first` on."""
        index, start = self._order.at(images_seen, batch_size)[first : first + count], images_seen + first
        captions = self.latents.captions(index, draws(self.seed, start, count, "caption"))
        dropped = fractions(draws(self.seed, start, count, "caption dropout")) < self.options.caption_dropout
        return index, np.where(dropped, EMPTY, captions)

    def batch(self, images_seen: int, batch_size: int) -> dict[str, Tensor]:
        """The indices of the latents at a position, int64 (N,)."""
        return {"index": torch.from_numpy(self._order.at(images_seen, batch_size))}

    def compile(self) -> None:
        self.denoiser.net.compile()


class Share(NamedTuple):
    """A rank's part of a batch, on its device."""

    mean: Tensor  # of the posterior of each standardised latent, (N, c, h, w)
    std: Tensor
    context: Tensor  # (N, T, D), for the T tokens of the longest caption
    mask: Tensor  # of real tokens, (N, T)


class Source:
    """Where latents and captions are read from. What `begin` returns goes to `end`, which gives tensors on the device."""

    def __init__(self, latents: Latents, device: torch.device) -> None:
        self.latents, self.device = latents, device
        # each channel's mean and standard deviation over the training latents, float32 (1, c, 1, 1)
        moments = (torch.tensor(latents.manifest[name]).view(1, -1, 1, 1) for name in ("latent_mean", "latent_std"))
        self._shift, self._scale = (moment.to(device) for moment in moments)

    def begin(self, index: np.ndarray, captions: np.ndarray) -> Any:
        raise NotImplementedError

    def end(self, begun: Any) -> Share:
        raise NotImplementedError

    def standardised(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posteriors of standardised latents of one shape, on the device."""
        return self._standardised(*self.latents.moments(index))

    def _standardised(self, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = to_device(mean, self.device), to_device(logvar, self.device)
        return (mean - self._shift) / self._scale, (0.5 * logvar).exp() / self._scale


class Mapped(Source):
    """Latents and captions stay in their files. A thread reads what is next while the device computes."""

    def __init__(self, latents: Latents, device: torch.device, encoder: TextEncoder | None) -> None:
        super().__init__(latents, device)
        self._encoder, self._pool = encoder, ThreadPoolExecutor(1)

    def begin(self, index: np.ndarray, captions: np.ndarray) -> Future[Any]:
        read = self.latents.embeddings if self.latents.embedded else self.latents.texts
        return self._pool.submit(lambda: (self.latents.moments(index), read(captions)))

    def end(self, begun: Future[Any]) -> Share:
        moments, found = begun.result()
        if self.latents.embedded:
            context, mask = (to_device(tensor, self.device) for tensor in found)
        else:
            assert self._encoder, "captions are kept as text: a text encoder has to embed them"
            context, mask = self._encoder(found)
        return Share(*self._standardised(*moments), context.float(), mask)


class Resident(Source):
    """Latents and embeddings are copied to the device at the start."""

    def __init__(self, latents: Latents, device: torch.device) -> None:
        super().__init__(latents, device)
        self._group, self._place = np.empty(len(latents), dtype=np.int64), np.empty(len(latents), dtype=np.int64)
        self._moments = []  # mean and standard deviation of each shape
        for number, (shape, group) in enumerate(latents.groups.items()):
            self._group[group], self._place[group] = number, np.arange(len(group))
            kept = torch.empty((2, len(group), latents.channels, *shape), device=device)
            for start in range(0, len(group), LOADED):
                for moment, part in zip(kept, self.standardised(group[start : start + LOADED]), strict=True):
                    moment[start : start + LOADED] = part
            self._moments.append(kept)
        self._rows, end = torch.empty((latents.all_tokens, latents.width), dtype=torch.bfloat16, device=device), 0
        for rows in latents.all_rows():
            self._rows[end : end + len(rows)] = to_device(rows, device)
            end += len(rows)

    def begin(self, index: np.ndarray, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return index, captions

    def end(self, begun: tuple[np.ndarray, np.ndarray]) -> Share:
        index, captions = begun
        places = to_device(torch.from_numpy(self._place[index]), self.device)
        mean, std = (moment.index_select(0, places) for moment in self._moments[self._group[index[0]]])
        starts, counts = self.latents.rows(captions)
        tokens = np.arange(int(counts.max()))
        mask = to_device(torch.from_numpy(tokens < counts[:, None]), self.device)
        rows = to_device(torch.from_numpy(np.minimum(starts[:, None] + tokens, len(self._rows) - 1)), self.device)
        return Share(mean, std, self._rows[rows].float() * mask[..., None], mask)


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


def is_small(latents: Latents, device: torch.device) -> bool:
    """Whether latents and captions may be kept on the device: embedded, and within `DEVICE_SHARE` of a GPU's free memory."""
    return latents.embedded and device.type == "cuda" and latents.nbytes <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on a device, through pinned memory: a copy from other memory makes a GPU finish its work first."""
    pinned = x.device.type != device.type == "cuda"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)
