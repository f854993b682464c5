"""What `train_vae.optimizer` can name, and of these `train_unet.optimizer` the minimisers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from ldm.base.lazy import torch
from ldm.base.options import Choice, NonNegative


class Optimizer(Choice):
    clips: ClassVar[bool] = True  # whether gradients may be clipped

    def build(self, groups: list[dict[str, Any]], lr: float, seed: int, num_data: int) -> torch.optim.Optimizer:
        """For parameter groups; `num_data`: that the loss would be a mean of if it were of all data."""
        raise NotImplementedError


class Minimiser(Optimizer):
    """Goes to one point, rather than sampling many: what `train_unet.optimizer` can name."""


class AdamW(Minimiser):  # Loshchilov & Hutter 2019
    kind: Literal["adamw"] = "adamw"
    weight_decay: NonNegative = 0.0

    def build(self, groups: list[dict[str, Any]], lr: float, seed: int, num_data: int) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=lr, weight_decay=self.weight_decay, betas=(0.9, 0.99), fused=True)


class Sgld(Optimizer):
    """Stochastic gradient Langevin dynamics (`ldm/langevin/README.md`): `lr` is the step size, gradients are not clipped."""

    kind: Literal["sgld"] = "sgld"
    clips: ClassVar[bool] = False
    prior_precision: NonNegative = 1.0  # of a Gaussian prior of the weights; 0 is flat
    temperature: NonNegative = 1.0  # 1 is the posterior

    def build(self, groups: list[dict[str, Any]], lr: float, seed: int, num_data: int) -> torch.optim.Optimizer:
        from ldm.base.randomness import seed_for
        from ldm.langevin.sgld import SGLD

        return SGLD(groups, lr, num_data=num_data, **self.model_dump(exclude={"kind"}), seed=seed_for(seed, "langevin"))
