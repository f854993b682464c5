"""How the denoising loss weighs noise levels: what `train_unet.loss_weight` can name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ldm.base.lazy import Tensor, torch
from ldm.base.options import Choice, Rate

if TYPE_CHECKING:
    from ldm.diffusion.denoiser import Denoiser


class LossWeight(Choice):
    def module(self) -> torch.nn.Module | None:
        """What is trained with the network, if anything."""

    def weighted(self, losses: Tensor, sigma: Tensor, denoiser: Denoiser, module: torch.nn.Module | None) -> Tensor:
        """What is minimised of the standard losses (B,) at noise levels sigma (B,)."""
        return losses


class Standard(LossWeight):
    kind: Literal["standard"] = "standard"


class MinSnr(LossWeight):
    """min(1 / sigma², gamma) times the squared error of x0, c_out times the network's (Hang et al. 2023, section 3.4)."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: Rate = 5.0

    def weighted(self, losses: Tensor, sigma: Tensor, denoiser: Denoiser, module: torch.nn.Module | None) -> Tensor:
        return denoiser.scalings(sigma).out.square() * (1 / sigma**2).clamp(max=self.gamma) * losses


class Learned(LossWeight):
    """Weighted by an uncertainty for each noise level, which is trained too (Karras et al. 2024, EDM2)."""

    kind: Literal["learned"] = "learned"

    def module(self) -> torch.nn.Module:
        from ldm.training.unet import Uncertainty

        return Uncertainty()

    def weighted(self, losses: Tensor, sigma: Tensor, denoiser: Denoiser, module: torch.nn.Module | None) -> Tensor:
        return module(losses, sigma)  # type: ignore[misc]
