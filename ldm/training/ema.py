"""Exponential moving average of weights, its half-life counted in images."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldm.base import distributed

RAMP = 0.05  # early on the half-life is at most this share of the images seen (Karras et al. 2024, EDM2)


class Ema:
    """Averages the parameters of a module. `state_dict` has the module's own keys; its buffers are copied."""

    def __init__(self, module: nn.Module, halflife_images: int):
        self.halflife_images = halflife_images
        live = module.state_dict(keep_vars=True)
        self._average = {name: tensor.detach().clone() for name, tensor in live.items()}
        pairs = [(self._average[name], tensor) for name, tensor in live.items()]
        self._weights = [pair for pair in pairs if isinstance(pair[1], nn.Parameter)]
        self._buffers = [pair for pair in pairs if not isinstance(pair[1], nn.Parameter)]

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        """Move the average towards the weights after a batch; a half-life of 0 copies them."""
        halflife = min(self.halflife_images, RAMP * images_seen)
        weight = 1 - 0.5 ** (batch_size / halflife) if halflife > 0 else 1.0
        averages, weights = (distributed.local_shards(tensors) for tensors in zip(*self._weights, strict=True))
        torch._foreach_lerp_(averages, weights, weight)
        for average, buffer in self._buffers:
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        return self._average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        distributed.load(self._average, state)


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
