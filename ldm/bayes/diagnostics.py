"""What the latents of a split carry: active units, the two parts of the KL term, posterior collapse (`README.md`)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.base.errors import InputError
from ldm.base.randomness import generator
from ldm.nets.autoencoder import DiagonalGaussian

ACTIVE = 0.01  # variance of E[z | x] over x (Burda et al. 2016, section 4.2)
COLLAPSED = 0.1  # nats a position: a squared correlation of 1 - exp(-0.2) = 18 % with the image; channels in use have 0.5 to 5
VALUES = 2048  # posteriors in the mixture of a channel's marginal
IMAGES = 1024  # images in the mixture of whole latents
CHUNK = 1 << 22  # numbers worked on at a time
STANDARD_NORMAL = DiagonalGaussian(torch.zeros(()), torch.zeros(()))


@dataclass(frozen=True)
class Diagnostics:
    """Of the posteriors of a split's images; information in nats; tensors per channel (c,), float64."""

    positions: int  # h w
    active_units: int  # latents, of c h w, whose posterior mean has a variance above ACTIVE
    kl: Tensor  # E KL(q(z | x) || N(0, I)), per image
    mean: Tensor  # of the aggregate posterior, over images and positions
    std: Tensor  # of the aggregate posterior
    aggregate_kl: Tensor  # KL(q(z) || N(0, 1)) of one value, regardless of its position
    value_information: Tensor  # I(image and position; z) of one value: kl / positions - aggregate_kl
    value_ceiling: float  # largest estimate of value_information, but for noise
    mutual_information: float  # I(x; z) of whole latents, per image
    ceiling: float  # largest estimate of mutual_information

    @property
    def collapsed(self) -> list[int]:
        """Channels that carry less than COLLAPSED nats a position."""
        return torch.nonzero(self.kl / self.positions < COLLAPSED).flatten().tolist()

    def warning(self) -> str | None:
        """Which channels have collapsed and what to change; None if all are in use."""
        if not (found := self.collapsed):
            return None
        used, most = len(self.kl) - len(found), float(self.kl[found].max()) / self.positions
        which = f"{len(found)} of {len(self.kl)} latent channels ({', '.join(map(str, found))})"
        change = "lower autoencoder.regulariser.beta, or set its beta_warmup_images or free_bits"
        change += f", or use fewer autoencoder.latent_channels ({used} carry all there is)" if used else ""
        return f"posterior collapse: {which} carry less than {COLLAPSED} nats a position, at most {most:.2g}: {change}"

    def metrics(self) -> dict[str, float]:
        """Names and numbers for a tracker."""
        names = ("kl_nats", "latent_mean", "latent_std", "aggregate_kl_nats", "value_information_nats")
        channels = zip(names, (self.kl, self.mean, self.std, self.aggregate_kl, self.value_information), strict=True)
        return {
            "active_units": float(self.active_units),
            "active_units_fraction": self.active_units / (len(self.kl) * self.positions),
            "collapsed_channels": float(len(self.collapsed)),
            "value_information_ceiling_nats": self.value_ceiling,
            "mutual_information_nats": self.mutual_information,
            "mutual_information_ceiling_nats": self.ceiling,
            **{f"{name}_channel_{i}": float(v) for name, values in channels for i, v in enumerate(values)},
        }


@torch.no_grad()
def diagnose(mean: Tensor, logvar: Tensor, seed: int = 0) -> Diagnostics:
    """Diagnostics of the posteriors N(mean, exp(logvar)) of a split's images, each (N, c, h, w); the prior is N(0, I).

    Moments, active units and KL use all images. The information terms are Monte-Carlo estimates, with one draw from each of M
    posteriors (by `seed`), whose mixture stands for q(z): VALUES for the marginal of a channel, IMAGES for whole latents. They
    saturate at ln M, the ceiling (Poole et al. 2019, equation 12); near it, aggregate_kl is overestimated.
    """
    if mean.shape != logvar.shape or mean.ndim != 4:
        raise ValueError(f"expected mean and logvar (N, c, h, w), found {tuple(mean.shape)} and {tuple(logvar.shape)}")
    if (count := len(mean)) < 2:
        raise InputError(f"diagnostics compare posteriors of different images: found {count}, give 2 or more")
    rng, positions = generator(seed, "diagnostics"), mean.shape[2] * mean.shape[3]
    sums = torch.zeros((4, *mean.shape[1:]), dtype=torch.float64, device=mean.device)  # (4, c, h, w)
    rows = max(1, CHUNK // mean[0].numel())
    for parts in zip(mean.split(rows), logvar.split(rows), strict=True):
        q = DiagonalGaussian(*(part.double() for part in parts))
        sums += torch.stack([part.sum(0) for part in (q.mean, q.mean.square(), q.logvar.exp(), q.kl())])
    centre, square, variance, kl = sums.cpu() / count
    spread = (square - centre.square()) * count / (count - 1)  # unbiased variance of E[z | x] over x
    total = square.mean((1, 2)) - centre.mean((1, 2)).square() + variance.mean((1, 2))
    kl, aggregate = kl.sum((1, 2)), torch.stack([_aggregate_kl(mean[:, c], logvar[:, c], rng) for c in range(mean.shape[1])])
    return Diagnostics(
        positions, active_units=int((spread > ACTIVE).sum()), kl=kl, mean=centre.mean((1, 2)), std=total.sqrt(),
        aggregate_kl=aggregate, value_information=kl / positions - aggregate,
        value_ceiling=math.log(min(count * positions, VALUES)),
        mutual_information=_mutual_information(mean, logvar, rng), ceiling=math.log(min(count, IMAGES)),
    )  # fmt: skip


def _aggregate_kl(mean: Tensor, logvar: Tensor, rng: torch.Generator) -> Tensor:
    """KL between the marginal of one channel (N, h, w), over images and positions, and N(0, 1)."""
    at = _spread_out(mean.numel(), VALUES, rng).to(mean.device)
    q = DiagonalGaussian(*(t.take(at).double().cpu() for t in (mean, logvar)))  # (M,)
    noise = torch.randn(len(q.mean), generator=rng, dtype=torch.float64)
    pairs = q.log_prob((z := q.sample(noise))[:, None])  # (M, M): of draw i under posterior j
    pairs.diagonal().copy_(STANDARD_NORMAL.log_prob(noise) - 0.5 * q.logvar)  # exact, however narrow q is
    return (pairs.logsumexp(1) - math.log(len(z)) - STANDARD_NORMAL.log_prob(z)).mean()


def _mutual_information(mean: Tensor, logvar: Tensor, rng: torch.Generator) -> float:
    """I(x; z): how much better a draw's own posterior explains it than the mixture of all."""
    chosen = _spread_out(len(mean), IMAGES, rng)
    own, pairs = (torch.zeros(shape, dtype=torch.float64) for shape in ((len(chosen),), (len(chosen), len(chosen))))
    for channel in range(mean.shape[1]):  # one at a time, to save memory
        q = DiagonalGaussian(*(t[chosen.to(t.device), channel].double().cpu().flatten(1) for t in (mean, logvar)))  # (M, h w)
        noise = torch.randn(q.mean.shape, generator=rng, dtype=torch.float64)
        z, precision = q.sample(noise), torch.exp(-q.logvar)
        # log q(z_i | x_j): the square expanded into matrix products, and the terms without z, which are log q(0 | x_j)
        pairs += z @ (q.mean * precision).T - 0.5 * z.square() @ precision.T
        pairs += q.log_prob(torch.zeros(())).sum(1)
        own += (STANDARD_NORMAL.log_prob(noise) - 0.5 * q.logvar).sum(1)  # log q(z_i | x_i), exact however narrow q is
    pairs.diagonal().copy_(own)
    return float((own - pairs.logsumexp(1)).mean()) + math.log(len(chosen))


def _spread_out(count: int, most: int, rng: torch.Generator) -> Tensor:
    """At most `most` of `count` indices, one from each of as many equal parts; all of them if there are no more."""
    edges = torch.arange(min(count, most) + 1) * count // min(count, most)
    return edges[:-1] + (torch.rand(len(edges) - 1, generator=rng, dtype=torch.float64) * edges.diff()).long()
