"""The likelihood p(x | z) of images given the decoder's output, as a module that holds the scale."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.base.errors import InputError
from ldm.base.options import chosen, kinds
from ldm.base.pixels import to_float, to_uint8
from ldm.base.tensors import save_tensors
from ldm.bayes.likelihoods.family import Family

FILE = "likelihood.safetensors"
LOG_SCALES = (-7.0, 2.0)  # of a pixel: from a ninth of a bin, where one value has all the mass, to several times the range


class Likelihood(nn.Module):
    """p(x | z), a product over the values of an image; `output` is what the decoder computes from z."""

    log_scale: Tensor  # per pixel, that of an output of 0

    def __init__(self, family: Family):
        super().__init__()
        self.family, self.kind, self.scale, self.discrete = family, family.kind, family.scale, family.discrete
        value = torch.tensor(float(family.log_scale))
        if self.scale == "learned":
            self.log_scale = nn.Parameter(value)
        else:
            self.register_buffer("log_scale", value)

    def outputs(self, channels: int) -> int:
        """Channels that the decoder must have for images of `channels` channels."""
        return 2 * channels if self.scale == "per_pixel" else channels

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Log-probability (discrete families) or log-density in nats of every value of x (B, C, H, W); like x."""
        return self.family.log_prob(x, *self._location_scale(output.to(x.dtype)))

    def mean(self, output: Tensor) -> Tensor:
        """E[x | z], (B, C, H, W) in [-1, 1]; see `Family.mean`."""
        return self.family.mean(self._location_scale(output)[0])

    @torch.no_grad()
    def sample(self, output: Tensor, rng: torch.Generator) -> Tensor:
        """x ~ p(x | z), (B, C, H, W); discrete families give 8-bit values, coded in [-1, 1]."""
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        x = self.family.sample(*self._location_scale(output), rng)
        return to_float(to_uint8(x)).to(x) if self.discrete else x

    def _location_scale(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Location (B, C, H, W) and log-scale, () or like it."""
        if self.scale != "per_pixel":
            return output, self.log_scale
        location, raw = output.chunk(2, dim=1)
        middle, half = sum(LOG_SCALES) / 2, (LOG_SCALES[1] - LOG_SCALES[0]) / 2
        # tanh is close to the identity in the middle, and its gradient lets a pixel leave either end of the range
        return location, middle + half * torch.tanh((self.log_scale + raw - middle) / half)

    def save_pretrained(self, folder: Path) -> None:
        """Write kind and scale beside the autoencoder's weights."""
        settings = json.dumps({"kind": self.kind, "scale": self.scale})  # one entry: safetensors writes several in any order
        save_tensors(self.state_dict(), folder / FILE, metadata={"likelihood": settings})


def load_likelihood(folder: Path) -> Likelihood:
    """What `save_pretrained` wrote. A file that does not say its kind is a discretised logistic with a learned scale."""
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{path} is missing: expected an autoencoder that train_vae wrote, likelihood and all")
    try:
        with safe_open(path, "pt") as file:
            settings = {"kind": "discretized_logistic"} | json.loads((file.metadata() or {}).get("likelihood", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if list(state) != ["log_scale"]:
            raise InputError(f"holds {', '.join(sorted(state)) or 'nothing'}, expected log_scale alone")
        fields = kinds(Family).get(settings["kind"], Family).model_fields  # not every family can choose its scale
        likelihood = chosen(Family, {name: value for name, value in settings.items() if name in fields}).build()
    except (SafetensorError, json.JSONDecodeError, InputError) as error:
        raise InputError(f"{path}: {error}; run train_vae again") from None
    likelihood.load_state_dict(state)
    return likelihood


def as_discrete(likelihood: Likelihood) -> Likelihood | None:
    """The same distribution integrated over 8-bit values: itself if discrete, DiscretizedX of a per-pixel X, else None."""
    if likelihood.discrete or likelihood.scale != "per_pixel":
        return likelihood if likelihood.discrete else None
    family = kinds(Family)[f"discretized_{likelihood.kind}"]
    return family(scale="per_pixel", log_scale=float(likelihood.log_scale)).build().to(likelihood.log_scale.device)
