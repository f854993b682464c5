"""Likelihoods p(x | z) of images given the decoder's output, every pixel by itself (`README.md` beside this file).

All are location-scale families except Bernoulli. The log-scale is a number that is "fixed", a number that is "learned",
or, "per_pixel", the second half of the decoder's channels. Continuous kinds give densities over the coding of images in
[-1, 1]; discrete ones give probabilities of 8-bit values, so that -log2 p(x | z) / dims is a code length in bits/dim.
"""

import json
import math
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.special import erfcx

from ldm.base.errors import InputError
from ldm.base.pixels import BIN, to_float, to_uint8

FILE = "likelihood.safetensors"
SCALES = ("fixed", "learned", "per_pixel")
LOG_SCALES = (-7.0, 2.0)  # of a pixel: from a ninth of BIN, where one value has it all, to several times the whole range


def _levels(x: Tensor) -> Tensor:
    """The 8-bit value of x in bins from the middle of the range: -127.5, -126.5, …, 127.5, exact in float32."""
    return (x / BIN + 127.5).round() - 127.5


class Likelihood(nn.Module):
    """p(x | z), factorised over the values of an image; `output` is what the decoder made of z.

    `log_scale` is the fixed scale, the initial one where it is learned, and per pixel the one for an output of 0.
    """

    kind: ClassVar[str]
    discrete: ClassVar[bool] = False  # whether `log_prob` is of probabilities, not of densities
    log_scale: Tensor

    def __init__(self, log_scale: float = -3.0, scale: str = "learned"):
        super().__init__()
        if scale not in SCALES:
            raise InputError(f"likelihood scale {scale!r}: expected one of {', '.join(SCALES)}")
        self.scale = scale
        value = torch.tensor(float(log_scale))
        if scale == "learned":
            self.log_scale = nn.Parameter(value)
        else:
            self.register_buffer("log_scale", value)

    def outputs(self, channels: int) -> int:
        """Channels that the decoder must have for images of `channels` channels."""
        return 2 * channels if self.scale == "per_pixel" else channels

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Log-probability (discrete kinds) or log-density in nats of every value of x (B, C, H, W); like x."""
        return self._log_prob(x, *self._location_scale(output.to(x.dtype)))

    def mean(self, output: Tensor) -> Tensor:
        """The image that the decoder means, (B, C, H, W) in [-1, 1] coding.

        E[x | z]; for a discretised kind that of the distribution before it was discretised: the mean of the 256 values is within
        half a BIN of it, except where the range ends within the tails and all that lies beyond counts as the last value.
        """
        return self._location_scale(output)[0]

    @torch.no_grad()
    def sample(self, output: Tensor, rng: torch.Generator) -> Tensor:
        """x ~ p(x | z), (B, C, H, W); discrete kinds give 8-bit values in [-1, 1] coding."""
        location, log_scale = self._location_scale(output.to(torch.promote_types(output.dtype, torch.float32)))
        x = location + log_scale.exp() * self._noise(location.shape, rng).to(location)
        return to_float(to_uint8(x)).to(x) if self.discrete else x

    def _location_scale(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Location (B, C, H, W) and log-scale, () or like it."""
        if self.scale != "per_pixel":
            return output, self.log_scale
        location, raw = output.chunk(2, dim=1)
        low, high = LOG_SCALES
        middle, half = (low + high) / 2, (high - low) / 2
        # bounded softly, about the identity in the middle: a pixel at an end still has a gradient to leave it
        return location, middle + half * torch.tanh((self.log_scale + raw - middle) / half)

    def _log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        raise NotImplementedError

    def _noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Draws of the family at location 0 and scale 1."""
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> None:
        """Write kind and scale beside the autoencoder's weights."""
        settings = json.dumps({"kind": self.kind, "scale": self.scale})  # one entry: safetensors writes several in any order
        save_file(self.state_dict(), folder / FILE, metadata={"likelihood": settings})


class Gaussian(Likelihood):
    """A density N(location, scale²)."""

    kind = "gaussian"

    def _log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return -0.5 * ((x - location) * torch.exp(-log_scale)).square() - (log_scale + 0.5 * math.log(2 * math.pi))

    def _noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=rng, device=rng.device)


class Laplace(Likelihood):
    """A density of mean absolute deviation `scale`: exp(-|x - location| / scale) / (2 scale)."""

    kind = "laplace"

    def _log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        return -(x - location).abs() * torch.exp(-log_scale) - (log_scale + math.log(2))

    def _noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        first, second = torch.empty((2, *shape), device=rng.device).exponential_(generator=rng)
        return first - second


def _log_cdf(x: Tensor) -> Tensor:
    """ln Phi(x), with a gradient that is right in the far tail too (of torch's log_ndtr, 1 % is wrong at -1e7, all at -1e9)."""
    tail, rest = x.clamp(max=-1.0), x.clamp(min=-1.0)
    below = torch.log(erfcx(-tail * math.sqrt(0.5)) / 2) - 0.5 * tail.square()
    return torch.where(x < -1, below, torch.log1p(-0.5 * torch.erfc(rest * math.sqrt(0.5))))


class DiscretizedGaussian(Gaussian):
    """A Gaussian integrated over each of the 256 values of an 8-bit pixel, the outermost ones reaching to infinity.

    (Ho et al. 2020, "Denoising diffusion probabilistic models", equation 13.)
    """

    kind = "discretized_gaussian"
    discrete = True

    def _log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        # In float64 whatever x is: a narrow bin's mass is a difference of two nearly equal numbers.
        distance = _levels(x.double()) * BIN - location.double()
        precision = torch.exp(-log_scale.double())
        # By symmetry the bin lies below the mean: Phi(near) - Phi(far), as Phi(near) (1 - Phi(far) / Phi(near)).
        # An outermost one is Phi(near) alone, with whichever of its edges is not at infinity.
        outermost = x.abs() > 1 - BIN / 2
        depth = torch.where(outermost, -distance * x.sign(), -distance.abs())
        near, far = (BIN / 2 + depth) * precision, (-BIN / 2 - distance.abs()) * precision
        log_near = _log_cdf(near)
        rest = torch.log(-torch.expm1(_log_cdf(far) - log_near))
        return torch.where(outermost, log_near, log_near + rest).to(x.dtype)


class DiscretizedLogistic(Likelihood):
    """A logistic distribution integrated over each of the 256 values of an 8-bit pixel.

    Salimans et al. 2017 (PixelCNN++), equation 2 with a single component: the outermost bins reach to infinity,
    so that the probabilities of the 256 values sum to 1.
    """

    kind = "discretized_logistic"
    discrete = True

    def _log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        width = BIN * torch.exp(-log_scale)  # of a bin, in scales
        # Counted in bins, neighbours share the very same edge, so that the 256 probabilities sum to 1 in float32 too.
        distance = torch.sub(_levels(x), location, alpha=1 / BIN)
        upper, lower = (distance + 0.5) * width, (distance - 0.5) * width
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), exact in every tail
        below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
        inner = below + above + torch.log(-torch.expm1(-width))
        return torch.where(x < -1 + BIN / 2, below, torch.where(x > 1 - BIN / 2, above, inner))

    def _noise(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=rng, device=rng.device, dtype=torch.float64).logit(eps=1e-16)


class Bernoulli(Likelihood):
    """Binary images, 8-bit values 0 and 255 only: the decoder's output is the logit of 255. There is no scale."""

    kind = "bernoulli"
    discrete = True

    def __init__(self, log_scale: float = 0.0, scale: str = "fixed"):
        if scale == "per_pixel":
            raise InputError("a bernoulli likelihood has no scale, so none per_pixel: leave the scale out")
        super().__init__(0.0, "fixed")  # there to be like the others and never used

    def mean(self, output: Tensor) -> Tensor:
        return torch.tanh(output / 2)

    def _log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        if bool((grey := x.abs() != 1).any()):
            raise InputError(
                f"train_vae.likelihood bernoulli needs images of 0 and 255 only, found {int(to_uint8(x[grey][0]))}: "
                "threshold them at data.image_size, or choose a discretized likelihood"
            )
        return F.logsigmoid(x * location)

    @torch.no_grad()
    def sample(self, output: Tensor, rng: torch.Generator) -> Tensor:
        uniform = torch.rand(output.shape, generator=rng, device=rng.device).to(output)
        return torch.where(uniform < torch.sigmoid(output), 1.0, -1.0).to(output)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    c.kind: c for c in (Gaussian, Laplace, DiscretizedGaussian, DiscretizedLogistic, Bernoulli)
}


def make_likelihood(kind: str, scale: str = "learned", log_scale: float = -3.0) -> Likelihood:
    """A likelihood by its kind; a Bernoulli has no scale and takes no notice of one."""
    if kind not in LIKELIHOODS:
        raise InputError(f"likelihood {kind!r}: expected one of {', '.join(LIKELIHOODS)}")
    return LIKELIHOODS[kind](log_scale, scale)


def load_likelihood(folder: Path) -> Likelihood:
    """What `save_pretrained` wrote. A file that does not say its kind is a discretised logistic with a learned scale."""
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{path} is missing: expected an autoencoder that train_vae wrote, likelihood and all")
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("likelihood", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): run train_vae again") from None
    if list(state) != ["log_scale"]:
        raise InputError(f"{path} holds {', '.join(sorted(state)) or 'nothing'}: expected log_scale alone")
    try:
        likelihood = make_likelihood(settings.get("kind", DiscretizedLogistic.kind), settings.get("scale", "learned"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    likelihood.load_state_dict(state)
    return likelihood
