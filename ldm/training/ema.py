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
        parameters, kept = dict(module.named_parameters()), module.state_dict(keep_vars=True)
        live = parameters | {name: tensor for name, tensor in kept.items() if name not in parameters}
        self._names, self._live, self._parameters = list(live), list(live.values()), len(parameters)
        self._average = [tensor.detach().clone() for tensor in self._live]

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        """Move the average towards the weights after a batch; a half-life of 0 copies them."""
        halflife = min(self.halflife_images, RAMP * images_seen)
        weight = 1 - 0.5 ** (batch_size / halflife) if halflife > 0 else 1.0
        n = self._parameters
        torch._foreach_lerp_(distributed.local_shards(self._average[:n]), distributed.local_shards(self._live[:n]), weight)
        for average, buffer in zip(self._average[n:], self._live[n:], strict=True):
            average.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self._average, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        distributed.load(self.state_dict(), state)


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
