"""The Bernoulli likelihood of binary images."""

from __future__ import annotations

from typing import ClassVar, Literal

from ldm.base.errors import InputError
from ldm.base.lazy import Tensor, torch
from ldm.bayes.likelihoods.family import Family


class Bernoulli(Family):
    """Binary images, 8-bit values 0 and 255 only: the decoder's output is the logit of 255. There is no scale."""

    kind: Literal["bernoulli"] = "bernoulli"
    discrete: ClassVar[bool] = True
    scale: ClassVar = "fixed"  # type: ignore[misc]  # no option: the scale is not used
    log_scale: ClassVar = 0.0  # type: ignore[misc]

    def log_prob(self, x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        from ldm.base.pixels import to_uint8

        if bool((grey := x.abs() != 1).any()):
            raise InputError(
                f"train_vae.likelihood bernoulli needs images of 0 and 255 only, found {int(to_uint8(x[grey][0]))}: "
                "threshold them at data.image_size, or choose a discretized likelihood"
            )
        return torch.nn.functional.logsigmoid(x * location)

    def mean(self, location: Tensor) -> Tensor:
        return (location / 2).tanh()

    def sample(self, location: Tensor, log_scale: Tensor, rng: torch.Generator) -> Tensor:
        uniform = torch.rand(location.shape, generator=rng, device=rng.device).to(location)
        return torch.where(uniform < torch.sigmoid(location), 1.0, -1.0).to(location)
