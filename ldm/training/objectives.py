"""What the autoencoder is trained for: what `train_vae.objective` can name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from ldm.base.errors import InputError
from ldm.base.lazy import torch
from ldm.base.options import Choice, Count, NonNegative, Positive
from ldm.bayes.likelihoods.family import Family

if TYPE_CHECKING:
    from ldm.bayes.likelihoods.likelihood import Likelihood
    from ldm.data.batches import Batches
    from ldm.nets.autoencoder import Autoencoder
    from ldm.nets.regulariser import Regulariser
    from ldm.training.vae import VaeObjective


class Parts(NamedTuple):  # what every objective trains with
    autoencoder: Autoencoder
    likelihood: Likelihood
    batches: Batches
    regulariser: Regulariser


class VaeChoice(Choice):
    def check(self, root: Path, likelihood: Family) -> None:
        """Raise a `ValueError` if its files are not there, or it needs another likelihood."""

    def build(self, parts: Parts, root: Path, seed: int, image: tuple[int, int, int]) -> VaeObjective:
        """`seed` initialises further networks; `image` is the shape (C, H, W) of an image."""
        raise NotImplementedError


class ElboChoice(VaeChoice):
    """The evidence lower bound."""

    kind: Literal["elbo"] = "elbo"

    def build(self, parts: Parts, root: Path, seed: int, image: tuple[int, int, int]) -> VaeObjective:
        from ldm.training.vae import VaeObjective

        return VaeObjective(*parts)


class LdmChoice(VaeChoice):
    """Absolute error, perceptual distance and discriminator, as in the latent diffusion paper (Rombach et al. 2022)."""

    kind: Literal["ldm"] = "ldm"
    perceptual: Annotated[str, Field(min_length=1)] = "random"  # or a file of VGG-16 weights
    perceptual_sha256: str | None = None  # of that file
    perceptual_weight: NonNegative = 1.0
    discriminator_weight: NonNegative = 0.5  # 0 leaves it out
    discriminator_start: Count = 4800  # images seen before it joins
    discriminator_channels: Positive = 32
    discriminator_layers: Positive = 2

    @model_validator(mode="after")
    def _a_file_has_a_hash(self) -> LdmChoice:
        if (self.perceptual == "random") != (self.perceptual_sha256 is None):
            raise ValueError("perceptual_sha256 is the sha256 of the file that perceptual names, and null for `random`")
        return self

    def check(self, root: Path, likelihood: Family) -> None:
        if (likelihood.kind, likelihood.scale) != ("laplace", "learned"):
            raise ValueError("objective ldm is absolute error with a learned scale: set likelihood {kind: laplace}")
        if self.perceptual != "random" and not (root / self.perceptual).is_file():
            raise ValueError(f"train_vae.objective.perceptual: found {self.perceptual!r}, neither random nor a file")

    def build(self, parts: Parts, root: Path, seed: int, image: tuple[int, int, int]) -> VaeObjective:
        from ldm.nets.adversary import PatchDiscriminator, Perceptual
        from ldm.training.adversarial import AdversarialObjective

        torch.manual_seed(seed)
        discriminator = PatchDiscriminator(image[0], self.discriminator_channels, self.discriminator_layers)
        sha256, x = self.perceptual_sha256, torch.zeros(1, *image)
        perceptual = Perceptual.from_file(root / self.perceptual, sha256) if sha256 else Perceptual()
        for name, network in (("discriminator_layers", discriminator), ("perceptual", partial(perceptual, x))):
            try:
                with torch.no_grad():
                    network(x)
            except RuntimeError as error:
                reason = f"too deep for images of {image[-1]} pixels (data.image_size)"
                raise InputError(f"train_vae.objective.{name}: {reason}") from error
        device = next(parts.autoencoder.parameters()).device
        placed = discriminator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return AdversarialObjective(parts, self, perceptual.to(device), placed)
